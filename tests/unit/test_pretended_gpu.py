"""The teacher's pass and the student's loss on pretended GPUs (support/pretended_cuda.py), in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[1] / "pretended_gpu" / "checks.py"


@pytest.mark.slow
def test_teacher_and_loss_on_pretended_gpus(tmp_path: Path) -> None:
    """Apart, because autograd would start a thread for each guarded device, and no process could be forked then."""
    from support.pretended_cuda import build_guard

    try:
        guard = build_guard(tmp_path)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(CHECKS),
            "--tb=short",
            f"--basetemp={tmp_path / 'checks'}",
        ],
        env=inherited | {"RETORT_CUDA_GUARD": str(guard)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
