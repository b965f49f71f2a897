"""Damaged results are listed and shown like others, as far as they can be read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retort.inventory.facts import describe_artifact
from retort.inventory.layout import find_artifacts
from retort.inventory.listing import render_inventory, take_inventory

IDS = [f"{n:012x}" for n in range(4)]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, alpha in zip(IDS, (0.1, 0.1, 0.1, 0.7), strict=True):
        folder = tmp_path / "results" / "runs" / "soft" / name
        folder.mkdir(parents=True)
        config = {"source": "mine.yaml", "run": "soft", "config": {"training": {"alpha": alpha}}}
        (folder / "config.json").write_text(json.dumps(config))
    return tmp_path / "results"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"config": 3}'])
def test_damaged_records_are_listed_without_what_they_said(results: Path, content: bytes) -> None:
    broken = results / "runs" / "soft" / IDS[0]
    for name in ("config.json", "run.json", "training.json"):
        (broken / name).write_bytes(content)
    found = take_inventory([], results)
    differs = {row.artifact.id: row.differs for row in found.rows}
    assert differs == {name: {} for name in IDS[:3]} | {IDS[3]: {"training.alpha": 0.7}}
    assert IDS[0] in render_inventory(found)
    artifact = next(one for one in find_artifacts(results) if one.id == IDS[0])
    (broken / "training.json").unlink()
    assert describe_artifact(artifact)


def test_a_reader_that_has_enough_is_no_error(results: Path) -> None:
    command = f"{sys.executable} -m retort ls --json --results {results} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{" and done.stderr == ""


def test_help_loads_nothing_heavy() -> None:
    for name in ("ls", "gc", "show", "diff"):
        code = (
            f"import sys; from retort.pipeline.console import main\n"
            f"try: main([{name!r}, '--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'numpy', 'snakemake', 'pydantic') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
