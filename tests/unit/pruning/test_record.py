"""The record of a part, and the job that makes it: of the teacher that is recorded, and of no other."""

import re
from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.starts import student_content
from retort.config.handoff import Job
from retort.config.sections import Student
from retort.io.digests import digest
from retort.pruning.record import PruningRecord, choose_start
from retort.pruning.run import prune_model
from retort.tokens.index import TokenIndex
from support.checked import copy_teacher
from support.jobs import make_job
from support.sections import section
from support.tiny import record


def student(**keys: Any) -> Student:
    made: Student = section("student", **({"from_teacher": {"layers": 1}} | keys))
    return made


def job(teacher: Path, *, expected: dict[str, str] | None = None, **keys: Any) -> Job:
    of_teacher = section("teacher", model_path=str(teacher))
    return make_job(teacher=of_teacher, student=student(**keys), expected=expected)


def test_a_student_starts_from_the_part_that_it_asks_for(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    out = tmp_path / "pruned" / "pruned.json"
    prune_model(
        out, job(tiny_teacher), fingerprint_path=record(tmp_path, tiny_teacher), index_path=None
    )
    assert choose_start(student(), out).model_path == str(out.parent / "model")
    assert choose_start(student(config="a.json", from_teacher=None), None).config
    with pytest.raises(ValueError, match=r"give --start \(pruned\.json"):
        choose_start(student(), None)
    other = student(from_teacher={"layer_indices": [1]})
    with pytest.raises(ValueError, match=r"pruned to \{'layers': 1\}, but .* \{'layer_indices'"):
        choose_start(other, out)
    config = out.parent / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(
        ValueError, match=f"holds other weights .* Delete {re.escape(str(tmp_path))}"
    ):
        choose_start(student(), out)


def test_what_exists_is_not_made_again(tmp_path: Path, tiny_teacher: Path) -> None:
    out = tmp_path / "pruned.json"
    prune_model(out, job(tiny_teacher), fingerprint_path=None, index_path=None)
    made, weights = PruningRecord.read(out), tmp_path / "model" / "model.safetensors"
    date = weights.stat().st_mtime_ns
    prune_model(out, job(tiny_teacher), fingerprint_path=None, index_path=None)
    assert weights.stat().st_mtime_ns == date
    # A kill before the record was written, and one amid the writing of the model.
    out.unlink()
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "model.safetensors").write_bytes(b"half")
    prune_model(out, job(tiny_teacher), fingerprint_path=None, index_path=None)
    assert PruningRecord.read(out) == made
    assert not (tmp_path / ".model.tmp").exists()


def test_only_the_recorded_model_is_pruned(tmp_path: Path, tiny_teacher: Path) -> None:
    known = record(tmp_path, tiny_teacher)
    other = copy_teacher(tmp_path / "other", tiny_teacher, rope_theta=9.0)
    with pytest.raises(ValueError, match="holds other weights"):
        prune_model(
            tmp_path / "a" / "pruned.json", job(other), fingerprint_path=known, index_path=None
        )
    before = {"student": digest(student_content(student(model_path=str(tiny_teacher))))}
    changed = job(tiny_teacher, expected=before, model_path=str(other))
    with pytest.raises(ValueError, match="changed since the command began"):
        prune_model(tmp_path / "b" / "pruned.json", changed, fingerprint_path=None, index_path=None)
    same = job(tiny_teacher, expected=before, model_path=str(tiny_teacher))
    prune_model(tmp_path / "c" / "pruned.json", same, fingerprint_path=None, index_path=None)


def test_nothing_to_prune_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"--set student\.from_teacher\.layers=4"):
        nothing = job(tiny_teacher, config="a.json", from_teacher=None)
        prune_model(tmp_path / "pruned.json", nothing, fingerprint_path=None, index_path=None)


def test_what_is_measured_needs_text_and_is_the_same_whenever(
    tmp_path: Path, tiny_teacher: Path, index: TokenIndex
) -> None:
    part = {"layers": 1, "hidden_size": 8, "num_attention_heads": 1, "calibration_samples": 30}
    with pytest.raises(ValueError, match=r"measured on text: give --index"):
        prune_model(
            tmp_path / "a" / "pruned.json",
            job(tiny_teacher, from_teacher=part),
            fingerprint_path=None,
            index_path=None,
        )
    for name in ("a", "b"):
        prune_model(
            tmp_path / name / "pruned.json",
            job(tiny_teacher, from_teacher=part),
            fingerprint_path=None,
            index_path=index.path,
        )
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    assert PruningRecord.read(tmp_path / "a" / "pruned.json").part == part
