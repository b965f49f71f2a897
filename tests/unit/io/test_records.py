"""A record is read as it was written; any other file is refused in one sentence, with its path and what to do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from retort.io.records import JsonObject, Record
from retort.teacher.records import Manifest
from support.records import (
    make_benchmark,
    make_check_record,
    make_checkpoint_record,
    make_comparison,
    make_corpus_record,
    make_index_record,
    make_manifest,
    make_metrics,
    make_plan,
    make_run_record,
    make_samples_record,
    make_score,
    make_synthesis_record,
    make_teacher_record,
    make_training_record,
    make_worker_record,
)

RECORDS: list[Record] = [
    make_run_record({"training": {"alpha": 0.5, "resume_from_checkpoint": None}}),
    make_training_record("mine"),
    make_manifest(),
    make_worker_record(),
    make_metrics(make_training_record("mine")),
    make_benchmark("arc", [make_score("arc", 0.5)]),
    make_index_record(900, num_parts=2),
    make_corpus_record(),
    make_synthesis_record(),
    make_samples_record(),
    make_checkpoint_record(),
    make_check_record(),
    make_comparison(),
    make_plan(),
    make_teacher_record(),
]


@pytest.fixture(params=RECORDS, ids=lambda record: type(record).__name__)
def record(request: pytest.FixtureRequest) -> Record:
    found: Record = request.param
    return found


def test_a_record_is_read_as_it_was_written_and_has_the_same_bytes(
    record: Record, tmp_path: Path
) -> None:
    record.write(tmp_path / "new" / "one.json")
    found = type(record).read(tmp_path / "new" / "one.json")
    assert found == record
    found.write(tmp_path / "two.json")
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "new" / "one.json").read_bytes()


def damage(content: dict[str, Any], case: str) -> Any:
    """Return what a damaged file holds: text, or a value for JSON."""
    key = next(key for key in content if key not in ("format", "version"))
    return {
        "not JSON": json.dumps(content)[:-9],
        "not UTF-8": b"\xff\xfe{}",
        "no object": [content],
        "another file": content | {"format": "retort-something"},
        "without a format": {k: v for k, v in content.items() if k != "format"},
        "newer": content | {"version": 99},
        "older": content | {"version": 0},
        "a missing key": {k: v for k, v in content.items() if k != key},
        "an unknown key": content | {"colour": "red"},
        "another type": content | {key: 3.5},
    }[case]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("not JSON", "is not JSON (EOF while parsing "),
        ("not UTF-8", "is not JSON ("),
        ("no object", "is another kind of file"),
        ("another file", "is another kind of file ('retort-something')"),
        ("without a format", "is another kind of file (None)"),
        ("newer", "was written by a newer Retort (version 99)"),
        ("older", "was written by an older Retort (version 0)"),
        ("a missing key", "has no '"),
        ("an unknown key", "has an unknown key 'colour'"),
        ("another type", " = 3.5 (input should be "),
    ],
)
def test_another_file_is_refused_in_one_sentence(
    record: Record, case: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    record.write(path)
    found = damage(json.loads(path.read_text()), case)
    text = json.dumps(found) if isinstance(found, dict | list) else found
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        type(record).read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ") and "\n" not in message
    assert message.endswith(
        f"; expected {record.format} version {record.version}: {record.remedy}."
    )


def test_a_missing_file_and_a_folder_are_refused_alike(record: Record, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.json", "does not exist;"), (tmp_path, "cannot be read (")):
        with pytest.raises(ValueError, match=re.escape(f"{path} {reason}")):
            type(record).read(path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path, record = tmp_path / "manifest.json", make_manifest(bytes_per_position=10.5)
    record.write(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"bytes_per_position": 9.5}))
    with pytest.raises(ValueError, match="was edited: its content does not have the digest"):
        Manifest.read(path)
    del content["digest"]  # of an earlier version
    path.write_text(json.dumps(content))
    assert Manifest.read(path) == record


def test_numbers_must_be_finite_and_of_their_type(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), "71.25"):
        with pytest.raises(ValueError, match="seconds"):
            make_run_record(seconds=value)


class _Renamed(Record, format="retort-test", version=2):
    """A record whose key was named otherwise in version 1."""

    dropped: int

    @classmethod
    def upgrade(cls, content: JsonObject, version: int) -> JsonObject | None:
        return {"dropped": content["fell"]} if version == 1 else None


def test_an_older_version_is_read_where_the_class_says_how(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"format": "retort-test", "version": 1, "fell": 3}')
    assert _Renamed.read(path) == _Renamed(dropped=3)
    path.write_text('{"format": "retort-test", "version": 0, "fell": 3}')
    with pytest.raises(ValueError, match="older Retort"):
        _Renamed.read(path)


def test_a_checkpoint_of_the_version_before_is_still_resumed_from(tmp_path: Path) -> None:
    path, record = tmp_path / "complete.json", make_checkpoint_record()
    record.write(path)
    content = json.loads(path.read_text()) | {"version": 2}
    del content["settings"]
    path.write_text(json.dumps(content))
    assert type(record).read(path) == record.model_copy(update={"settings": {}})
