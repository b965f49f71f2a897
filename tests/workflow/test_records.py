"""Each JSON file of a finished workflow is a record of one class; it, or run.json beside it, says how it was made."""

import re
from collections.abc import Iterator
from pathlib import Path

from retort.cache.cost import CacheCost
from retort.estimate.records import Estimate
from retort.evaluation.records import Metrics
from retort.io.fingerprints import TeacherRecord
from retort.io.records import Record
from retort.io.run_record import RunRecord, name_cpu
from retort.models.samples import SamplesRecord
from retort.pipeline.preflight import CheckRecord
from retort.teacher.records import CacheRun, Manifest
from retort.tokens.index import IndexRecord
from retort.training.checkpoints import CheckpointRecord
from retort.training.record import TrainingRecord
from support.place import CONFIG_FILE, Place

# By their place below results/.
CLASSES: dict[str, type[Record]] = {
    "checks/*/inputs.json": CheckRecord,
    "checks/*/estimate.json": Estimate,
    "teachers/*/fingerprint.json": TeacherRecord,
    "teachers/*/run.json": RunRecord,
    "tokens/*/index.json": IndexRecord,
    "tokens/*/run.json": RunRecord,
    "logits/*/plan.json": CacheCost,
    "logits/*/manifest.json": Manifest,
    "logits/*/run.json": CacheRun,
    "validation/*/samples.json": SamplesRecord,
    "validation/*/run.json": RunRecord,
    "runs/*/*/training.json": TrainingRecord,
    "runs/*/*/run.json": RunRecord,
    "runs/*/*/checkpoint-*/complete.json": CheckpointRecord,
    "runs/*/*/evaluation/*/metrics.json": Metrics,
    "runs/*/*/evaluation/*/samples.json": SamplesRecord,
}
# The user's settings, and files of transformers.
OTHERS = re.compile(r"config\.json|.*/(final|checkpoint-\d+)/(?!complete)[^/]*\.json")


def read_records(place: Place) -> Iterator[tuple[Path, Record]]:
    """Yield (path below results/, record) of every JSON file, each read as its class."""
    for path in sorted(place.results.rglob("*.json")):
        found = path.relative_to(place.results)
        if path.name.startswith(".") or path.name == "config.json" or OTHERS.fullmatch(str(found)):
            continue
        kinds = [kind for pattern, kind in CLASSES.items() if found.match(pattern)]
        assert len(kinds) == 1, f"{found} is of no class"
        yield found, kinds[0].read(path)


def find_made(records: dict[Path, Record]) -> Iterator[tuple[str, RunRecord]]:
    """Yield (kind of artefact, how it was made) of every folder of results, and of every worker."""
    for path, record in records.items():
        if isinstance(record, RunRecord):
            yield path.parts[0], record
        if isinstance(record, CacheRun):
            yield from (("worker", w.made) for w in record.workers if w.parts_done)
        if isinstance(record, Metrics):
            assert record.trained == records[Path(*path.parts[:3], "run.json")]
            yield "evaluation", record.made
        if isinstance(record, CheckRecord):
            yield "checks", record.made


def test_every_folder_says_how_it_was_made(done: Place) -> None:
    records = dict(read_records(done))
    assert {type(record) for record in records.values()} == set(CLASSES.values())
    folders = {path.parent for path, record in records.items() if isinstance(record, RunRecord)}
    alone = ("checks", "reports")  # of one file, and a page that says it itself
    for path in records:
        top = Path(*path.parts[: 3 if path.parts[0] == "runs" else 2])
        assert top in folders or path.parts[0] in alone, f"{top} has no run.json"
    found = list(find_made(records))
    kinds = {kind for kind, _ in found}
    assert kinds == {
        "teachers",
        "tokens",
        "logits",
        "validation",
        "runs",
        "evaluation",
        "checks",
    } | {"worker"}
    for kind, made in found:
        assert name_cpu() in made.device, kind
        assert {"torch", "transformers", "numpy"} <= made.versions.keys()
        assert made.python and made.finished and made.command[0].endswith(".py")
        # The check is of a whole config, whose runs are in `made.config`.
        assert made.source == (None if kind == "checks" else CONFIG_FILE), kind
        of_runs = kind in ("runs", "evaluation")
        assert made.run in (("both", "hard") if of_runs else (None,)), kind
        has_model = kind in ("validation", "runs", "evaluation", "worker")
        assert made.dtype == ("float32" if has_model else None), kind


def test_a_damaged_record_is_one_sentence_when_the_snakefile_is_parsed(done: Place) -> None:
    (path,) = done.results.glob("teachers/*/fingerprint.json")
    whole = path.read_text()
    for text, reason in ((whole[:-9], "is not JSON"), ("{}", "is another kind of file")):
        path.write_text(text)
        refused = done.try_snakemake("-n")
        assert refused.returncode != 0 and "Traceback" not in refused.output
        (line,) = (line for line in refused.output.splitlines() if reason in line)
        assert str(path.relative_to(done.path)) in line
        assert line.endswith(": delete it and rerun the same command.")
