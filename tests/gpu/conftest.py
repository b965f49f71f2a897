"""`make test-gpu`: what only a GPU can show. RETORT_GPU_TESTS_DEVICE=cpu runs the same tests on a CPU, smaller.

At the end the table that docs/benchmarks.md waits for is printed, and written to the file RETORT_GPU_TESTS_TABLE.
"""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from retort.models.load import describe_device
from support.gpu_table import Table

DEVICE = os.environ.get("RETORT_GPU_TESTS_DEVICE", "cuda")
TABLE = Table()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to test; what needs it is skipped where there is none."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip(
            f"PyTorch {torch.__version__} sees no GPU (make test-gpu PYTHON_GPU=... takes another Python)"
        )
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def table(device: torch.device) -> Table:
    if not TABLE.machine:
        packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "retort"))
        python = f"Python {platform.python_version()}"
        TABLE.machine = f"{describe_device(device)}; {python}, {packages}"
    return TABLE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write it."""
    if not TABLE.machine:
        return
    text = TABLE.format()
    path = os.environ.get("RETORT_GPU_TESTS_TABLE")
    if path:
        Path(path).write_text(text, encoding="utf-8")
    terminalreporter.write_line(f"\n{text}" + (f"\nwritten to {path}" if path else ""))
