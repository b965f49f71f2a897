"""One file or folder has one spelling and so one id; Hub ids and URLs stay as they are."""

from pathlib import Path
from typing import Any

import pytest

from retort.config.section import Section, marks, subsection
from retort.config.sections import Config
from support.configs import STUDENT, find, load, nested, refusal


def paths_of(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Return the keys that may be local paths."""
    found = []
    for name in section.model_fields:
        if below := subsection(section, name):
            found += paths_of(below, f"{prefix}{name}.")
        elif {"is_path", "is_model"} & marks(section, name).keys():
            found.append(prefix + name)
    return found


PATHS = [key for key in paths_of() if not key.startswith("synthesis.")]
MODELS = ["teacher.model_path", "dataset.tokenizer", "dataset.name"]


def load_with(key: str, value: Any) -> str:
    """Return the value of a key in a config that has it and is valid with it."""
    base: dict[str, Any] = {"dataset": {"name": "json", "data_files": "x"}}
    base |= {"teacher": {"model_path": "t"}, "student": {"config": "s.json"}}
    if key == "dataset.name":
        base["dataset"] = {}
    if key == "student.model_path":
        base["student"] = {"config": None}
    if key == "teacher.imported":
        base |= {"teacher": {}, "training": {"temperature": 1.0}}
    return str(find(load(base, nested(key, value)), key))


def test_the_keys_that_are_paths_are_known() -> None:
    assert paths_of() == [
        "output.results_dir",
        "output.cache_dir",
        "dataset.name",
        "dataset.data_files",
        "dataset.validation_files",
        "dataset.tokenizer",
        "teacher.model_path",
        "teacher.imported",
        "student.config",
        "student.model_path",
        "training.resume_from_checkpoint",
        "evaluation.benchmarks.tasks_dir",
        "evaluation.humaneval.file",
        "synthesis.model",
        "synthesis.prompts",
        "synthesis.templates",
        "synthesis.output",
    ]


@pytest.mark.parametrize("key", PATHS)
def test_every_path_key_expands_home_and_variables_and_has_one_spelling(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    (tmp_path / "x").mkdir()
    assert load_with(key, "~/x") == "/home/me/x"
    assert load_with(key, "$SCRATCH/x/") == load_with(key, "${SCRATCH}//x") == "/scratch/x"
    assert {load_with(key, way) for way in ("x", "./x", "x/", "a/../x", "././x//")} == {"x"}
    monkeypatch.delenv("SCRATCH")
    message = refusal(STUDENT | nested(key, "$SCRATCH/x"))
    assert f"{key} is '$SCRATCH/x', but the environment variable SCRATCH is not set" in message


@pytest.mark.parametrize("key", MODELS)
def test_a_hub_id_is_never_changed_and_a_path_never_becomes_one(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "org/name", "EleutherAI/pythia-70m", "org/name.v1"):
        assert load_with(key, name) == name
    assert load_with(key, "./missing") == load_with(key, "missing/") == "./missing"
    assert load_with(key, "./demo") == "./demo"
    (tmp_path / "demo").mkdir()
    assert load_with(key, "./demo") == "./demo", "a folder is not the demo's teacher"


def test_lists_and_urls(tmp_path: Path) -> None:
    raw = {"dataset": {"name": "json", "data_files": ["./a", "hf://datasets/x//y/*.json", "b/"]}}
    assert load(raw).dataset.data_files == ("a", "hf://datasets/x//y/*.json", "b")


def test_the_parent_of_a_link_is_not_the_folder_of_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert load_with("student.config", "link/../x") == "link/../x"
    assert load_with("student.config", "far/../x") == "x"
