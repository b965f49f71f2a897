"""Every example is planned by the command that stands in it."""

import json
from pathlib import Path

import pytest
import yaml

from retort.config.sweeps import expand_runs
from support.place import REPOSITORY, Place

EXAMPLES = sorted((REPOSITORY / "config" / "examples").glob("*.yaml"))
ONE_DOCUMENT = {"text": "Some text.", "content": "x = 1", "prompt": "Say it.", "response": "It."}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_planned(path: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "config").symlink_to(REPOSITORY / "config")
    config = yaml.safe_load(path.read_text())
    for name in _list_files(config):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(ONE_DOCUMENT) + "\n")
    planned = place.plan("--resources", "gpu=8", config=f"config/examples/{path.name}", cores=8)
    num_runs = len(expand_runs(config.get("runs"))[0]) or 1
    assert planned["train"] == planned["evaluate"] == num_runs
    assert planned["check_inputs"] == planned["report"] == 1
    assert "demo_teacher" not in planned


def _list_files(config: dict[str, object]) -> list[str]:
    dataset = config["dataset"]
    assert isinstance(dataset, dict)
    sources = [dataset, *dataset.get("mix", [])]
    named = [source.get("data_files", []) for source in sources]
    files = [name for found in named for name in ([found] if isinstance(found, str) else found)]
    evaluation = config.get("evaluation", {})
    assert isinstance(evaluation, dict)
    problems = [evaluation["humaneval"]["file"]] if "humaneval" in evaluation else []
    return [*files, *problems]
