"""The tests of `make test-gpu`, on a CPU, so that they are not out of date when a GPU is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.place import REPOSITORY

# Some words of the table, by files.
FOUND: dict[tuple[str, ...], list[str]] = {
    ("test_teacher",): ["one part, `sampled`", "float32 beside a CPU", "out of memory in the head"],
    ("test_training", "test_speed", "test_groups"): ["in bf16", "resumed", "ddp", "plain loop"],
}


@pytest.mark.slow
@pytest.mark.parametrize("files", FOUND)
def test_what_a_gpu_shows_runs_on_a_cpu_and_fills_the_table(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    places = {"RETORT_GPU_TESTS_DEVICE": "cpu", "RETORT_GPU_TESTS_TABLE": str(tmp_path / "gpu.md")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short"),
            *(f"tests/gpu/{name}.py" for name in files),
            f"--basetemp={tmp_path / 'tests'}",
        ],
        cwd=REPOSITORY,
        env=inherited | places,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    table = (tmp_path / "gpu.md").read_text()
    assert [words for words in FOUND[files] if words not in table] == []
