"""A teacher that is spread over all GPUs, and how busy they are."""

import subprocess
import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.teacher.__main__ import TeacherPass, build_teacher, make_table
from retort.models.causal_lm import CausalLM
from retort.teacher.batches import Batch
from retort.teacher.scoring import Scorer, select_batches
from support.gpu_busy import mean_busy, read_busy, sample_busy
from support.gpu_part import METHODS, make_part, spread_over
from support.gpu_table import Table

pytestmark = pytest.mark.gpu

VOCABULARY, SECONDS = 32_768, 20.0
LEAST_BUSY = 85.0  # percent of the time


def test_a_device_map_gives_one_gpus_bytes(device: torch.device, table: Table) -> None:
    gpus = torch.cuda.device_count()
    if device.type == "cpu" or gpus < 2:
        pytest.skip("needs two GPUs")
    part = make_part(device)
    expected = {method: part.digest(method) for method in METHODS}
    gpus = min(gpus, part.shape.layers)
    part.teacher = spread_over(part.teacher.model, gpus)
    found = {method: part.digest(method) for method in METHODS}
    equal = sum(found[method] == expected[method] for method in METHODS)
    table.add(
        f"spread over {gpus} GPUs: methods with one GPU's bytes", f"{equal} of {len(METHODS)}"
    )
    assert found == expected


def repeat_batches(teacher_pass: TeacherPass, *, seconds: float) -> Iterator[Batch]:
    """Yield the batches of a table again and again."""
    scorer = Scorer(teacher_pass.teacher, teacher_pass.batch_size)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield from scorer.batches(teacher_pass.table)


def read_for(teacher: CausalLM, *, seconds: float) -> int:
    """Let the teacher read, and select what top_p keeps; return the number of batches."""
    lengths = [1025] * 64
    table = make_table(lengths, vocabulary=VOCABULARY)
    teacher_pass = TeacherPass.prepare(teacher, table, "top_p", 16)
    batches = repeat_batches(teacher_pass, seconds=seconds)
    scorer, codec = Scorer(teacher, 16), teacher_pass.codec
    return sum(1 for _ in select_batches(scorer, batches, codec, num_tokens=VOCABULARY))


def test_the_gpus_are_busy_while_a_teacher_reads(device: torch.device, table: Table) -> None:
    """On one GPU, and spread over all."""
    if device.type == "cpu":
        pytest.skip("NVML counts GPUs")
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ids = [f"GPU-{gpu.uuid}" for gpu in gpus]
    try:
        read_busy(ids)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        table.add("busy while a teacher reads (NVML)", f"not run: {error}")
        pytest.skip(f"nvidia-smi does not say how busy the GPUs are: {error}")
    for used in [ids[:1], ids] if len(ids) > 1 else [ids]:
        teacher = build_teacher("1b", VOCABULARY, device=device.type, dtype=torch.bfloat16)
        if len(used) > 1:
            teacher = spread_over(teacher.model, len(used))
        read_for(teacher, seconds=1.0)
        with sample_busy(used) as samples:
            read_for(teacher, seconds=SECONDS)
        busy = mean_busy(samples)
        said = ", ".join(f"{percent:.0f} %" for percent in busy)
        table.add(f"a 1B teacher reads on {len(used)} GPU(s): busy (NVML)", said)
        assert min(busy) >= LEAST_BUSY
