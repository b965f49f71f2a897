"""Speeds, as the benchmarks print them; nothing is asserted of a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.gpu_table import Table

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).parents[2]
TEACHER = {
    "cuda": "--dtype bfloat16 --vocabulary 131072 --sequences 32 --batch-size 16 --length 1024 --turns 3",
    "cpu": "--vocabulary 512 --sequences 2 --batch-size 2 --length 32 --turns 1",
}
TRAINING = {
    "cuda": "--shape large --vocabulary 128256 --dtype bfloat16",
    "cpu": "--shape tiny --vocabulary 512 --ways liger",
}


def run_benchmark(module: str, flags: str, device: torch.device, table: Table) -> str:
    """Run a benchmark, keep what it prints for the table, and return it."""
    command = ["-m", f"benchmarks.{module}", "--device", device.type, *flags.split()]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table.printed[f"python {' '.join(command)}"] = done.stdout
    return done.stdout


@pytest.mark.parametrize("shape", ["1b", "7b"])
def test_the_teachers_pass_beside_its_bare_forward(
    shape: str, device: torch.device, table: Table
) -> None:
    """Ratio to the bare forward, tokens a second, share of the fastest matrix product, peak memory."""
    if device.type == "cpu":
        if shape == "7b":
            pytest.skip("too large for a CPU")
        shape = "tiny"
    flags = f"{TEACHER[device.type]} --shape {shape} --documents 0 --threads"
    printed = run_benchmark("teacher", flags, device, table)
    assert "of bare forward" in printed and "plain loop" in printed
    assert ("GiB" in printed) == (device.type == "cuda")


def test_a_training_step_beside_cross_entropy(device: torch.device, table: Table) -> None:
    """transformers, Retort, a live teacher, and Liger and VeOmni where they can be imported."""
    printed = run_benchmark("training", f"{TRAINING[device.type]} --turns 1", device, table)
    names = ("cross-entropy", "liger") if device.type == "cpu" else ("fused, T = 1", "veomni")
    assert all(f"\n{name}" in printed for name in names), printed
