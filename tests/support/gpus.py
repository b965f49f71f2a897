"""Simulated GPUs: ids, a config for them, and a script in place of nvidia-smi."""

from pathlib import Path
from typing import Any

from retort.config.load import load_runs
from retort.config.sections import Generation
from support.sections import replace

EIGHT = tuple("01234567")

# The output of nvidia-smi -L for two GPUs, of which the second is split into two MIG slices.
LISTED = """cat <<END
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-77777777-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 1g.5gb      Device  0: (UUID: MIG-a1111111-1111-5111-8111-111111111111)
  MIG 1g.5gb      Device  1: (UUID: MIG-b2222222-2222-5222-8222-222222222222)
END"""


def make_generation(**keys: Any) -> Generation:
    """Return the default teacher.generation with some keys changed."""
    raw = {
        "student": {"config": "student.json"},
        "teacher": {"model_path": "models/teacher"},
        "dataset": {"name": "json", "data_files": "corpus.jsonl"},
    }
    generation = next(iter(load_runs(raw).values())).teacher.generation
    return replace(generation, **keys)


def write_nvidia_smi(folder: Path, body: str) -> None:
    """Write a shell script named nvidia-smi."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
