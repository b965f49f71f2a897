"""Two ids are followed down to the key or the file that makes them two, and to nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retort.inventory.differing import explain
from support.place import Place, lay_out, tiny

SOFT = {"both": {"training": {"distillation_type": "hybrid", "alpha": 0.5}}}


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_teacher: Path,
    tiny_corpus: Path,
    tiny_student: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    path = tmp_path / "project"
    place = lay_out(path, teacher=tiny_teacher, corpus=tiny_corpus, student=tiny_student)
    place.write_config(tiny(runs=SOFT), "first.yaml")
    monkeypatch.chdir(path)
    return place


def list_causes(said: str) -> dict[str, tuple[str, str]]:
    """Return what differs, with both values, without the lines of ids."""
    rows = [line.split("  ") for line in said.splitlines()[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    kinds = ("run", "tokens", "logits", "teacher", "corpus", "pruned")
    return {row[0]: (row[1], row[2]) for row in cells if row[0].partition(",")[0] not in kinds}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dataset", "max_length", 32),
        ("dataset", "max_samples", 50),
        ("dataset", "append_eos", False),
        ("dataset", "streaming_chunk_size", 5),
        ("cache", "top_k", 4),
        ("cache", "temperatures", [1.0, 2.0]),
        ("training", "learning_rate", 0.5),
        ("training", "seed", 7),
        ("training", "packing", True),
        ("teacher", "dtype", "bfloat16"),
        ("teacher", "generation", {"batch_size": 3}),
        ("teacher", "generation", {"force_regenerate": "again"}),
    ],
)
def test_one_key_is_the_only_cause(place: Place, section: str, key: str, value: Any) -> None:
    place.write_config(tiny(**{section: {key: value}}, runs=SOFT), "second.yaml")
    name, seen = f"{section}.{key}", value
    if isinstance(value, dict):
        ((below, seen),) = value.items()
        name += f".{below}"
    causes = list_causes(explain("first.yaml", "second.yaml"))
    assert causes.keys() == {name}, causes
    shown = json.dumps(seen) if not isinstance(seen, str) else f"'{seen}'"
    assert causes[name][1] == shown
    assert explain("first.yaml", "first.yaml").endswith(": run.")


def test_keys_that_change_no_id_are_no_cause(place: Place) -> None:
    more = tiny(dataset={"num_proc": 2}, teacher={"generation": {"num_workers": 1}}, runs=SOFT)
    place.write_config(more, "second.yaml")
    assert "have one id" in explain("first.yaml", "second.yaml")


def test_a_file_of_other_content_is_the_cause(place: Place) -> None:
    shutil.copy("documents.jsonl", "others.jsonl")
    place.write_config(tiny(dataset={"data_files": "others.jsonl"}, runs=SOFT), "second.yaml")
    assert "have one id" in explain("first.yaml", "second.yaml"), "files count by content"
    with Path("others.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')
    student = json.loads(Path("student.json").read_text())
    Path("wide.json").write_text(json.dumps(student | {"hidden_size": 48}))
    second = tiny(
        dataset={"data_files": "others.jsonl"}, student={"config": "wide.json"}, runs=SOFT
    )
    place.write_config(second, "second.yaml")
    causes = list_causes(explain("first.yaml", "second.yaml"))
    files = {"file documents.jsonl", "file others.jsonl", "what the student starts from"}
    assert causes.keys() == files | {"dataset.data_files", "student.config"}


def test_runs_of_one_config_are_named_and_wrong_names_refused(place: Place) -> None:
    place.write_config(tiny())
    causes = list_causes(explain("tiny.yaml:hard", "tiny.yaml:both"))
    assert causes.keys() == {"training.distillation_type", "training.alpha"}
    for words, said in {
        ("tiny.yaml:none", "tiny.yaml"): "has no run 'none'. Its runs: hard, both",
        ("none.yaml", "tiny.yaml"): "'none.yaml' does not exist",
        ("none", "tiny.yaml"): "none does not exist",
        ("documents.jsonl", "tiny.yaml"): "no result of Retort and no config",
    }.items():
        with pytest.raises(ValueError, match=said):
            explain(*words)
