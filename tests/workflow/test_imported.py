"""From logits that others have published to a report, by real commands: `retort import`, then Snakemake."""

import json
import sys
from pathlib import Path

import pytest

from retort.evaluation.records import Metrics
from retort.training.record import TrainingRecord
from support.distillkit import QUICK_START, sample_texts, write_dataset
from support.place import Place, tiny
from support.tiny import NUM_TOKENS, WIDTH

CONFIG = {"d": WIDTH, "k": 64, "exact_k": 32} | QUICK_START


@pytest.fixture
def place(inputs: Place, tmp_path: Path) -> Place:
    """A user's folder: a student's config, and a dataset; no teacher, no corpus."""
    place = Place(tmp_path / "mine")
    place.path.mkdir()
    (place.path / "student.json").write_text((inputs.path / "student.json").read_text())
    teacher = inputs.path / "teacher"
    texts = sample_texts(teacher, 90, num_tokens=NUM_TOKENS, length=50)
    write_dataset(place.path / "published", texts, teacher, CONFIG, num_tokens=NUM_TOKENS)
    return place


def test_a_student_learns_from_published_logits(place: Place, inputs: Place) -> None:
    config = tiny(dataset=None, cache=None)
    place.write_config(config | {"teacher": {"imported": "theirs"}})
    before = place.try_snakemake("-n")
    assert before.returncode and "teacher.imported 'theirs' does not exist" in before.output
    command = [sys.executable, "-m", "retort", "import", "distillkit", "published"]
    command += ["--tokenizer", str(inputs.path / "teacher"), "--output", "theirs"]
    done = place.execute([*command, "--validation-fraction", "0.2"])
    assert done.returncode == 0 and "theirs: " in done.output, done.output
    assert place.plan() == {"check_inputs": 1, "train": 2, "evaluate": 2, "report": 1}
    place.snakemake()
    assert place.plan() == {}
    for run in ("hard", "both"):
        (folder,) = (place.results / "runs" / run).iterdir()
        record = TrainingRecord.read(folder / "training.json")
        (metrics,) = folder.glob("evaluation/*/metrics.json")
        found = Metrics.read(metrics)
        assert found.cache is not None and found.cache.imported is not None
        assert 0 < found.scores.student.metrics["loss"].value < 6 and found.teacher is None
        card = (folder / "final" / "README.md").read_text()
        learned = "published logits, imported as `theirs`" if run == "both" else "text alone"
        assert learned in card and str(place.path) not in card
        assert record.distillation_type == {"hard": "output", "both": "hybrid"}[run]
    assert "cache of both: top_p" in (place.results / "summary.txt").read_text()
    # Another import at the same path is another teacher.
    index = place.path / "theirs" / "tokens" / "index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"content": "0123456789ab"}))
    other = place.try_snakemake("-n")
    assert other.returncode and "are not of one import" in other.output
