"""The teacher's pass on one GPU: its bytes, its waits, its attention, and what it does where memory runs out."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retort.models.heads import Head
from retort.teacher import scoring
from support.gpu_part import METHODS, SMALL, TOP_K, WIDE, Part, find_digests, make_part
from support.gpu_table import Table
from support.scoring import random_table
from support.tiny import real_processes

pytestmark = pytest.mark.gpu

ROWS = 2048  # of logits at once, on a GPU
# Of the host, for a block of rows, at most: as on pretended GPUs with so many ids, and once more for bincount, which on
# CUDA looks at its least and its greatest value.
WAITS = {"top_k": 6, "top_p": 11, "sampled": 17}


@pytest.fixture(scope="module")
def part(device: torch.device) -> Part:
    return make_part(device)


def test_one_part_has_one_digest(part: Part, device: torch.device, table: Table) -> None:
    """Alone, between the batches of another part, and in another process."""
    with ProcessPoolExecutor(1, mp_context=real_processes()) as pool:
        elsewhere = pool.submit(find_digests, device.type).result()
    other = random_table([33, 47, 20, 9], seed=3, vocabulary=part.shape.vocabulary)
    for method in METHODS:
        found = [part.digest(method), part.digest(method, beside=other), elsewhere[method]]
        said = ", ".join(sorted({digest[:12] for digest in found}))
        table.add(f"one part, `{method}`: sha256 alone, beside another, in another process", said)
        assert len(set(found)) == 1, found


def test_a_gpu_and_a_cpu_agree_in_float32(device: torch.device, table: Table) -> None:
    found = make_part(device, torch.float32)
    expected = Part(torch.device("cpu"), found.shape, torch.float32)
    mine, theirs = found.top_k(), expected.top_k()
    same_PK = (mine.ids == theirs.ids).reshape(-1, TOP_K)
    error_PK = np.abs(mine.logprobs - theirs.logprobs).reshape(-1, TOP_K)
    error = float(error_PK[same_PK.all(axis=1)].max())
    said = f"{same_PK.mean():.2%}; {error:.1e}"
    table.add("float32 beside a CPU: equal ids; largest difference of a logprob", said)
    assert same_PK.mean() > 0.99 and error < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_how_often_the_host_waits(
    method: str, part: Part, device: torch.device, table: Table
) -> None:
    if device.type == "cpu":
        pytest.skip("only CUDA reports where the host waits")
    part.score(method)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part.score(method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    blocks = sum(-(-int(batch.counts.sum()) // ROWS) for batch in part.batches)
    said = f"{waits / blocks:.1f}, at most {WAITS[method]}"
    table.add(f"waits of the host for a block of {ROWS:,} rows, `{method}`", said)
    assert 0 < waits <= WAITS[method] * blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_padded_batches_take_the_flash_kernel(
    dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    """PyTorch raises an error where the only kernel that is allowed cannot be used."""
    if device.type == "cpu":
        pytest.skip("the flash kernel is CUDA's")
    short = make_part(device, dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        short.score("top_p")
    table.add(f"padded batches in {str(dtype).removeprefix('torch.')}, flash kernel alone", "runs")


@contextmanager
def little_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, *, where: str, blocks: float
) -> Iterator[None]:
    """Leave memory for so many blocks of logits; on a CPU, pretend that it runs out there."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_allocated() + blocks * ROWS * WIDE.vocabulary * 4
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    owner, name = {"head": (Head, "logits"), "selection": (scoring, "select")}[where]
    run = getattr(owner, name)

    def scarce(*args: Any, **kwargs: Any) -> Any:
        if next(len(x) for x in args if isinstance(x, Tensor)) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, scarce)
        yield


@pytest.mark.parametrize(("where", "blocks"), [("head", 0.8), ("selection", 1.6)])
def test_where_memory_runs_out_fewer_rows_are_done_at_once(
    where: str,
    blocks: float,
    device: torch.device,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A block of logits is made by the head; selection takes as much again."""
    part = Part(device, SMALL if device.type == "cpu" else WIDE, torch.float32)
    expected = part.top_k()
    with little_memory(device, monkeypatch, where=where, blocks=blocks):
        scored = part.score("top_k")
    said = [m for m in caplog.messages if "out of memory" in m]
    same = float(np.mean(expected.concatenate(scored.sequences).ids == expected.ids))
    table.add(f"out of memory in the {where}: what is done; equal ids", f"{said[-1]}; {same:.2%}")
    assert said and all("in the teacher's head" in m for m in said), "batches were halved"
    assert scored.is_halved and same > 0.99
