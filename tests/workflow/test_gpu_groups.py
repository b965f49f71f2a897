"""GPU groups through the real Snakefile: eight pretend GPUs, real workers and leases, torch on the CPU.

A stand-in for nvidia-smi lists the ids. Each worker writes down which it held from when to when, so that what was
shared would be seen.
"""

import os
import shutil
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from retort.cluster.failures import read_last_attempt
from support.place import Place, sha256, tiny

# Python runs this before a script: a lease writes down what it held.
SITECUSTOMIZE = """
import os, sys, time
from contextlib import contextmanager

if any(word.endswith("/generate_logits.py") for word in sys.orig_argv):
    from retort.cluster import leases

    lease = leases.lease

    @contextmanager
    def noted(*arguments, **options):
        with lease(*arguments, **options) as held:
            start = time.monotonic()
            try:
                yield held
            finally:
                with open(os.environ["HELD"], "a") as file:
                    file.write(f"{','.join(held)} {start} {time.monotonic()}\\n")

    leases.lease = noted
"""
NVIDIA_SMI = """#!/bin/sh
for i in 0 1 2 3 4 5 6 7; do
    if [ "$1" = -L ]; then echo "GPU $i: Pretend (UUID: GPU-$i$i$i$i)"; else echo $i; fi
done
"""


@dataclass(frozen=True)
class Case:
    """A config's GPUs, and what is to be read of them before the work and in the workers' logs."""

    gpus: str | list[str] | None
    per_model: int
    table: str
    groups: tuple[str, ...]


CASES = {
    "8x1": Case("0,1,2,3,4,5,6,7", 1, "1", tuple("01234567")),
    "4x2-found": Case(None, 2, "2", ("0,1", "2,3", "4,5", "6,7")),
    "2x4": Case("0,1,2,3,4,5,6,7", 4, "4", ("0,1,2,3", "4,5,6,7")),
    "1x8": Case(None, 8, "8", ("0,1,2,3,4,5,6,7",)),
    "listed": Case("1,3,5,7", 1, "1", ("1", "3", "5", "7")),
    "uneven": Case(["0", "1", "2", "3", "4,5,6,7"], 1, "1 or 4", ("0", "1", "2", "3", "4,5,6,7")),
    "remainder": Case(None, 3, "3", ("0,1,2", "3,4,5")),
}


@pytest.fixture
def machine(done: Place, tmp_path: Path) -> Place:
    """A finished run without its cache, on a machine of eight GPUs, which torch cannot use."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tools / "nvidia-smi").write_text(NVIDIA_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    shutil.rmtree(done.cache)
    shutil.rmtree(done.path / "logs")
    env = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": f"{done.repository / 'src'}:{tools}",
        "RETORT_LOCK_DIR": str(tmp_path / "locks"),
        "RETORT_SIMULATED_GPUS": "1",
        "HELD": str(tmp_path / "held"),
    }
    return replace(done, env=env, without=("CUDA_VISIBLE_DEVICES",))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("4x2-found", "uneven") else pytest.mark.slow)
        for name in CASES
    ],
)
def test_groups_are_shown_held_alone_and_change_nothing(
    name: str, machine: Place, finished: Place, tmp_path: Path
) -> None:
    case = CASES[name]
    generation: dict[str, Any] = {"num_workers": None, "gpus_per_model": case.per_model}
    machine.write_config(tiny(teacher={"generation": generation | {"gpus": case.gpus}}))
    target = str((finished.cache / "manifest.json").relative_to(finished.path))
    said = machine.snakemake(target, "--resources", "gpu=8", cores=8)

    number = len(case.groups)
    shown = "  ".join(f"[{group}]" for group in case.groups)
    assert "GPUs available      8 (0,1,2,3,4,5,6,7)\n" in said
    assert f"GPUs per model      {case.table}\n" in said
    assert f"GPU groups          {shown}\n" in said
    assert f"Number of workers   {number}\n" in said
    assert ("In no group         6,7\n" in said) == (name == "remainder")

    assert said.index("GPUs available") < said.index("The teacher scores the text: worker")
    assert read_first_lines(machine) == {
        f"Worker {w}/{number}  CUDA_VISIBLE_DEVICES: {group}" for w, group in enumerate(case.groups)
    }
    require_disjoint((tmp_path / "held").read_text(), number)
    assert sha256(machine.cache / "teacher_logits.h5") == sha256(
        finished.cache / "teacher_logits.h5"
    )


def read_first_lines(place: Place) -> set[str]:
    """The line under the attempt's mark, of every worker's log."""
    logs = (place.path / "logs" / "generate_logits").iterdir()
    return {read_last_attempt(log)[0] for log in logs}


def require_disjoint(held: str, number: int) -> None:
    """Assert that no GPU was held by two workers at the same time."""
    leases = [line.split() for line in held.splitlines()]
    assert len(leases) == number
    for (one, start, end), (other, other_start, other_end) in combinations(leases, 2):
        if set(one.split(",")) & set(other.split(",")):
            assert float(end) <= float(other_start) or float(other_end) <= float(start)
