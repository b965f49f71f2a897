"""Records of runs, from metrics.json and training_log.csv, and which runs can be compared.

A *group* is the runs that were evaluated on the same held-out positions: losses are compared only within a group. The
*baseline* of a distilled run is the cross-entropy run (`output`) of its group with the same settings of `student` and
`training`, except those of the loss: the same initial weights, seed, steps, learning rate, batch size, precision.
Undefined values are None.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from retort.config.schema import flatten
from retort.config.section import Section, changes_id
from retort.config.sections import Student, Training
from retort.evaluation.records import ClassRow, Metrics, Scorecard
from retort.io.run_record import RunRecord
from retort.models.samples import SAMPLES_FILE, Samples, read_samples
from retort.teacher.records import Manifest

# Keys of run.json that the report shows under another name, and the time.
_SHOWN_ELSEWHERE = {
    *("finished", "training.distillation_type", "training.alpha", "training.temperature"),
    *("training.seed", "training.max_steps", "training.device"),
}
# Settings that change a run's id but may differ from its baseline's: those of the loss, those that change only the
# rounding, and those that set the number of steps, which is compared itself.
_NOT_COMPARED = {
    *("training.distillation_type", "training.alpha", "training.temperature"),
    *("training.divergence", "training.use_cached_logits"),
    *("training.cpu_threads", "training.use_gradient_checkpointing"),
    *("training.max_steps", "training.num_epochs"),
}
STUDENT_SIZE, VALIDATION_SET, SETTINGS = "student parameters", "validation set", "settings"


@dataclass(frozen=True)
class CacheFacts:
    """Size and quality of a run's logit cache: bytes and probability per position, KL in nats."""

    method: str
    setting: str  # of the method: k = 64, p >= 0.003
    positions: int
    bytes_per_position: float
    tail_mass: float
    fidelity_kl: float
    fidelity_agreement: float

    @property
    def keeps_all(self) -> bool:
        """Whether the cache has the teacher's full distributions."""
        return self.method == "top_k" and self.tail_mass < 1e-9


@dataclass(frozen=True)
class Record:
    """One run, from its metrics.json. Losses and KL are in nats per token on held-out positions."""

    path: Path
    name: str
    id: str
    distillation_type: str
    alpha: float | None
    temperature: float | None
    seed: int
    student_parameters: int
    teacher: str | None
    teacher_parameters: int | None
    steps: int
    trained_tokens: int
    training_seconds: float
    device: str
    positions: int
    documents: int
    content: str | None  # digest of the held-out sequences
    sequences: int
    leaked_sequences: int  # how many of these are also in the training text
    loss: float
    perplexity: float
    kl_to_teacher: float | None
    agreement: float | None
    teacher_loss: float | None
    teacher_perplexity: float | None
    card: Scorecard
    teacher_card: Scorecard | None
    breakdown: Mapping[str, tuple[ClassRow, ...]]
    not_defined: Mapping[str, str]  # reasons why metrics are None
    trained: Mapping[str, Any]  # from run.json, by dotted keys: commit, training.alpha
    cache: CacheFacts | None

    @property
    def folder(self) -> Path:
        """The run's folder, with final/ and training_log.csv."""
        above = [p.parent for p in self.path.parents if p.name == "evaluation"]
        return above[0] if above else self.path.parent

    @property
    def is_distilled(self) -> bool:
        """Whether the teacher's distributions are part of the loss."""
        return self.distillation_type != "output"


@dataclass(frozen=True)
class TrainingLog:
    """One run's learning curve: steps, and the mean hard loss (nats/token) since the previous logged step."""

    steps: tuple[int, ...]
    hard_loss: tuple[float, ...]


def load_metrics(paths: Sequence[Path]) -> list[Record]:
    """Read the metrics.json of each run, in the order given; runs of equal names get their id appended.

    Raises ValueError when there are no runs, a number is missing or not finite, or a run is given twice.
    """
    records = [_read_record(Path(path)) for path in paths]
    if not records:
        raise ValueError("no runs to report on: give the metrics.json of at least one run.")
    counts = Counter(r.name for r in records)
    records = [
        replace(r, name=f"{r.name} {r.id[:6]}") if counts[r.name] > 1 else r for r in records
    ]
    for name, count in Counter(r.name for r in records).items():
        if count > 1:
            paths_of_run = ", ".join(str(r.path) for r in records if r.name == name)
            raise ValueError(
                f"run {name!r} is given {count} times: {paths_of_run}. Give each run once."
            )
    return records


def _read_record(path: Path) -> Record:
    found = Metrics.read(path)
    training, scores = found.training, found.scores

    def value(name: str, card: Scorecard | None = scores.student) -> float | None:
        return card.metrics[name].value if card and name in card.metrics else None

    return Record(
        path=path,
        name=training.run,
        id=training.id,
        distillation_type=training.distillation_type,
        alpha=training.alpha,
        temperature=training.temperature,
        seed=training.seed,
        student_parameters=training.summary.student_parameters,
        teacher=found.teacher,
        teacher_parameters=found.teacher_parameters,
        steps=training.summary.steps,
        trained_tokens=training.summary.trained_positions,
        training_seconds=training.summary.seconds,
        device=training.summary.device,
        positions=scores.student.positions,
        documents=scores.student.documents,
        content=found.content,
        sequences=found.sequences,
        leaked_sequences=found.leaked_sequences,
        loss=scores.student.metrics["loss"].value,
        perplexity=scores.student.metrics["perplexity"].value,
        kl_to_teacher=value("kl_to_teacher"),
        agreement=value("agreement"),
        teacher_loss=value("loss", scores.teacher),
        teacher_perplexity=value("perplexity", scores.teacher),
        card=scores.student,
        teacher_card=scores.teacher,
        breakdown=scores.breakdown,
        trained=_flatten_run(found.trained),
        not_defined=scores.not_defined,
        cache=_describe_cache(found.cache) if found.cache else None,
    )


def _flatten_run(run: RunRecord | None) -> dict[str, Any]:
    """Return what the report shows of a run.json, by dotted keys: the config that it was made from, and versions."""
    shown = ("commit", "uncommitted_changes", "python", "versions", "finished")
    return dict(flatten(run.model_dump(include=set(shown)) | run.config)) if run else {}


def _describe_cache(manifest: Manifest) -> CacheFacts:
    assert manifest.fidelity is not None, manifest
    is_top_k = manifest.top_k is not None
    return CacheFacts(
        method=manifest.method,
        setting=f"k = {manifest.top_k}" if is_top_k else f"p >= {manifest.min_probability:g}",
        positions=manifest.positions,
        bytes_per_position=manifest.bytes_per_position,
        tail_mass=manifest.fidelity.tail_mass,
        fidelity_kl=manifest.fidelity.kl,
        fidelity_agreement=manifest.fidelity.agreement,
    )


def load_logs(records: Sequence[Record]) -> list[TrainingLog | None]:
    """Read each run's training_log.csv; None when there is none, or it has no rows.

    Raises ValueError when a log is not as `train` writes it, or has a loss that is not finite.
    """
    return [_read_log(record.folder / "training_log.csv") for record in records]


def _read_log(path: Path) -> TrainingLog | None:
    if not path.exists():
        return None
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        points = [(int(row["step"]), float(row["hard_loss"])) for row in rows if row["hard_loss"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a training log of `train`: {error!r}. Train the run again."
        ) from None
    for step, loss in points:
        if not math.isfinite(loss):
            raise ValueError(
                f"{path}: hard_loss is {loss} at step {step}, expected a finite number. The run "
                "diverged: lower training.learning_rate, and train it again."
            )
    return TrainingLog(tuple(s for s, _ in points), tuple(x for _, x in points)) if points else None


def load_samples(records: Sequence[Record]) -> list[dict[str, Samples]]:
    """Read the samples of each run's student and teacher; an empty dictionary when there is no samples.json.

    Raises ValueError when a samples.json is damaged or is another run's.
    """
    paths = [record.path.with_name(SAMPLES_FILE) for record in records]
    return [
        read_samples(path, of=record.id, whose="student") if path.exists() else {}
        for path, record in zip(paths, records, strict=True)
    ]


def group_runs(records: Sequence[Record]) -> list[list[Record]]:
    """Return the runs grouped by their held-out sequences; groups and their runs are in the order given."""
    groups: dict[tuple[int, int, str | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record.positions, record.documents, record.content), []).append(record)
    return list(groups.values())


@cache
def _compared_settings() -> dict[str, Any]:
    """Return the settings that must be the same for a run and its baseline: dotted key -> default."""
    sections: dict[str, type[Section]] = {"student": Student, "training": Training}
    return {
        f"{name}.{key}": field.default
        for name, section in sections.items()
        for key, field in section.model_fields.items()
        if changes_id(section, key) and f"{name}.{key}" not in _NOT_COMPARED
    }


def compared_conditions(record: Record) -> dict[str, Any]:
    """Return by name the conditions that must be the same for a margin between two runs; keys as in the config.

    A setting that run.json does not have is at its default. Without run.json, a run matches no other.
    """
    settings = {k: record.trained.get(k, value) for k, value in _compared_settings().items()}
    is_known = any(key.startswith(("student.", "training.")) for key in record.trained)
    return settings | {
        VALIDATION_SET: (record.content, record.positions, record.documents),
        STUDENT_SIZE: record.student_parameters,
        "training.seed": record.seed,
        "training.max_steps": record.steps,
        SETTINGS: "known" if is_known else f"those of {record.id} are not",
    }


def find_differences(record: Record, other: Record) -> dict[str, tuple[Any, Any]]:
    """Return the conditions in which two runs differ: name -> (value of `record`, value of `other`)."""
    mine, theirs = compared_conditions(record), compared_conditions(other)
    return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def find_baseline(
    record: Record, records: Sequence[Record], *, baseline: str | None = None
) -> Record | None:
    """Return the cross-entropy run to compare a distilled run with, in any order of `records`; None without one.

    If `baseline` names a run, only that one is considered.
    """
    if not record.is_distilled:
        return None
    candidates = _find_cross_entropy(records, baseline)
    matching = [r for r in candidates if not find_differences(record, r)]
    return min(matching, key=lambda r: r.id, default=None)


def find_nearest(
    record: Record, records: Sequence[Record], *, baseline: str | None = None
) -> Record | None:
    """Return the cross-entropy run with the fewest differences from `record`; None if there is none."""

    def distance(other: Record) -> tuple[bool, int, str]:
        found = find_differences(record, other)
        return VALIDATION_SET in found, len(found), other.id

    return min(_find_cross_entropy(records, baseline), key=distance, default=None)


def _find_cross_entropy(records: Sequence[Record], name: str | None) -> list[Record]:
    return [r for r in records if not r.is_distilled and name in (None, r.name)]


def find_teachers(group: Sequence[Record]) -> list[Record]:
    """Return one record for each teacher of a group; teachers that differ only by rounding are one."""
    found: list[Record] = []
    for record in group:
        if record.teacher is None:
            continue
        if not any(_has_same_teacher(record, other) for other in found):
            found.append(record)
    return found


def name_teacher(record: Record, teachers: Sequence[Record]) -> str:
    """Return the name of a row for a record's teacher: "teacher" alone if there is only one."""
    return "teacher" if len(teachers) == 1 else f"teacher {record.teacher}"


def _has_same_teacher(one: Record, other: Record) -> bool:
    if (one.teacher, one.teacher_parameters) != (other.teacher, other.teacher_parameters):
        return False
    if one.teacher_loss is None or other.teacher_loss is None:
        return one.teacher_loss is other.teacher_loss
    return math.isclose(one.teacher_loss, other.teacher_loss, abs_tol=1e-3)


def find_caches(records: Sequence[Record]) -> list[tuple[list[str], CacheFacts]]:
    """Return each cache once, with the names of the runs that learned from it."""
    users: dict[CacheFacts, list[str]] = {}
    for record in records:
        if record.cache is not None and record.is_distilled:
            users.setdefault(record.cache, []).append(record.name)
    return [(names, cache) for cache, names in users.items()]


def find_settings(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the settings of the runs by name: a text for each run, "-" if it has none.

    From run.json come the commit, the versions, and the keys of the config in which the runs differ.
    """
    return {**_find_own_settings(records), **_find_recorded_settings(records)}


def _find_recorded_settings(records: Sequence[Record]) -> dict[str, list[str]]:
    found = {}
    for key in sorted({key for r in records for key in r.trained} - _SHOWN_ELSEWHERE):
        texts = [str(r.trained.get(key, "-")) for r in records]
        if key.startswith(("versions.", "commit", "python")) or len(set(texts)) > 1:
            found[key.removeprefix("versions.")] = texts
    return found


def _find_own_settings(records: Sequence[Record]) -> dict[str, list[str]]:
    return {
        "distillation type": [r.distillation_type for r in records],
        "alpha": ["-" if r.alpha is None else f"{r.alpha:g}" for r in records],
        "temperature": [
            f"{r.temperature:g}" if r.temperature and r.is_distilled else "-" for r in records
        ],
        "seed": [str(r.seed) for r in records],
        "steps": [f"{r.steps:,}" for r in records],
        "trained tokens": [f"{r.trained_tokens:,}" for r in records],
        "student parameters": [f"{r.student_parameters:,}" for r in records],
        "teacher": [r.teacher or "-" for r in records],
        "cache": [
            f"{r.cache.method}, {r.cache.setting}" if r.cache and r.is_distilled else "-"
            for r in records
        ],
        "device": [r.device for r in records],
    }
