"""The programs of docs/library.md, as they stand there, on a cache that the workflow made."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import retort
from support.place import REPOSITORY, Place

PAGE = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")


def find_program(title: str) -> str:
    """Return the program below a heading of the page."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(program)


def run_program(title: str, place: Place) -> dict[str, Any]:
    """Run a program of the page in a finished workflow's folder, and return its variables."""
    names: dict[str, Any] = {"__name__": "program"}
    torch.set_num_threads(1)  # at this size, more are slower
    program = find_program(title).replace("0123456789ab", place.cache.name)
    exec(compile(program, title, "exec"), names)
    return names


@pytest.fixture
def place(finished: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """A folder as a user's, with the cache and the teacher of a finished workflow."""
    for name in ("results", "teacher"):
        (tmp_path / name).symlink_to(finished.path / name)
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


TITLES = [
    "A training loop",
    "transformers' Trainer",
    "TRL's SFTTrainer",
    "Plain PyTorch, from logits",
]


@pytest.mark.parametrize(
    "title",
    [pytest.param(t, marks=[pytest.mark.slow] if "Trainer" in t else []) for t in TITLES],
)
def test_the_programs_of_the_page_train_a_student(title: str, place: Place) -> None:
    if title.startswith("TRL"):
        pytest.importorskip("trl")
    losses = run_program(title, place)["losses"]
    few = max(1, len(losses) // 4)
    assert len(losses) >= 8
    assert sum(losses[-few:]) / few < sum(losses[:few]) / few * 0.95, losses


def test_the_exported_cache_is_read_as_the_page_says(place: Place) -> None:
    cache = f"results/logits/{place.cache.name}"
    command = [sys.executable, "-m", "retort", "export-parquet", cache, "OUT"]
    for _ in range(2):  # done again, it leaves all as it is
        done = place.execute(command)
        assert done.returncode == 0 and "1 files in OUT" in done.output, done.output
    names = run_program("As parquet", place)
    assert len(names["table"]) == len(retort.open_cache(place.path / cache))
    assert len(names["ids"]) == len(names["logprobs"]) == 8 and names["tail"] < 0


def test_the_page_has_no_other_program() -> None:
    assert re.findall(r"^## (.*)", PAGE, re.MULTILINE) == [*TITLES, "As parquet"]
    assert PAGE.count("```python") == len(TITLES) + 1


def test_importing_retort_loads_nothing() -> None:
    code = (
        "import sys, retort; assert len(dir(retort)) > 7 and retort.__version__;"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'retort.api') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
