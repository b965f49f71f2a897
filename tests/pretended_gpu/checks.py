"""The teacher's pass and the student's loss on pretended GPUs; run by unit/test_pretended_gpu.py in its own process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retort.cache.codec import Codec
from retort.cache.methods import build_codec
from retort.cache.top_k_codec import TopKCodec
from retort.losses.fused_loss import _FusedLoss, _Targets
from retort.losses.teacher_rows import TeacherRows, temper_rows
from retort.losses.terms import LossSettings
from retort.models import spread
from retort.models.causal_lm import CausalLM, needs_mask, split_model
from retort.models.heads import Head
from retort.models.load import load_teacher
from retort.models.spread import copy_beside_work
from retort.teacher import scoring
from retort.teacher.batches import batch_by_length
from retort.teacher.scoring import Scorer, score_part, select_batches
from retort.teacher.streams import SideStreams
from support.losses import DIVERGENCES, in_float32, make_teacher
from support.pretended_cuda import OnGPU, PretendedCUDA, on_gpu, put_on_gpus
from support.scoring import random_table
from support.sections import section
from support.tiny import NUM_TOKENS, WIDTH

torch.ops.load_library(os.environ["RETORT_CUDA_GUARD"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS: dict[str, dict[str, Any]] = {
    "top_k": {"method": "top_k", "top_k": 6, "temperatures": (0.5, 1.0, 2.0)},
    "top_p": {"method": "top_p", "min_probability": 0.01, "temperatures": (0.5, 1.0, 2.0)},
    "sampled": {"method": "sampled", "head_probability": 0.05},
}
TABLE = random_table([30, 2, 17, 29, 28])


COUNTS = np.bincount(TABLE.ids, minlength=WIDTH)


def make_codec(method: str) -> Codec:
    keys = {"top_k": 6, "min_probability": None, "head_probability": None, "temperatures": (1.0,)}
    cache = section("cache", **(keys | METHODS[method]))
    return build_codec(cache, vocabulary=WIDTH, token_counts=COUNTS)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def load(tiny_teacher: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    name = str(dtype).removeprefix("torch.")
    return load_teacher(str(tiny_teacher), section("teacher", device="cpu", dtype=name))


def move(teacher: CausalLM, devices: dict[str, str]) -> CausalLM:
    """Return the teacher on pretended GPUs, split and probed there as `load_teacher` does."""
    put_on_gpus(teacher.model, devices)
    teacher.model.hf_device_map = devices
    spread._stream.cache_clear()
    copy_beside_work(teacher.model)
    split = split_model(teacher.model)
    assert split.is_split and not needs_mask(split)
    return CausalLM(split.model, split.head, split.vocabulary, is_split=True, needs_mask=False)


def score(teacher: CausalLM, method: str) -> list[bytes]:
    """Return the record of every sequence, as it would be in the cache."""
    codec = make_codec(method)
    order, scorer = codec.order_tokens(COUNTS), Scorer(teacher, 2)
    part = score_part(scorer, TABLE, codec, num_tokens=NUM_TOKENS, order=order)
    return codec.encode(part.sequences)[0]


ONE = {"": "cuda:0"}
TWO = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cuda:0")
TWO |= dict.fromkeys(("model.layers.1", "model.norm"), "cuda:1")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", [None, "cuda:0", "cuda:1"])
def test_the_teachers_pass_keeps_what_it_keeps_on_a_cpu(
    method: str, head: str | None, tiny_teacher: Path
) -> None:
    teacher = load(tiny_teacher)
    with sdpa_kernel(SDPBackend.MATH):  # as attention is computed here
        expected = score(teacher, method)
    with PretendedCUDA(gpus=2) as cuda:
        teacher = move(teacher, {**TWO, "lm_head": head} if head else ONE)
        assert teacher.num_gpus == (2 if head else 1)
        cuda.waits.clear()
        found = score(teacher, method)
    assert found == expected
    assert cuda.dtypes and all(result == torch.float32 for _, result in cuda.dtypes)


# For a batch of one block of rows. Forwards: one for position ids, in transformers. Selection: whether logits are
# finite, how many tokens are kept, and what is kept.
WAITS = {"top_k": 5, "top_p": 11, "sampled": 16}


@pytest.mark.parametrize("method", METHODS)
def test_how_often_the_host_waits_for_a_batch(method: str, tiny_teacher: Path) -> None:
    teacher = load(tiny_teacher)
    with PretendedCUDA() as cuda:
        teacher = move(teacher, ONE)
        cuda.waits.clear()
        score(teacher, method)
    batches = len(list(batch_by_length(TABLE, 2)))
    assert cuda.waits.total() <= WAITS[method] * batches, cuda.waits


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_logits_of_short_floats_are_float32_and_attention_takes_the_flash_kernel(
    dtype: torch.dtype, tiny_teacher: Path
) -> None:
    teacher = load(tiny_teacher, dtype)
    with PretendedCUDA() as cuda:
        teacher = move(teacher, ONE)
        cuda.dtypes.clear()
        cuda.attention.clear()
        score(teacher, "top_p")
    batches = len(list(batch_by_length(TABLE, 2)))
    assert cuda.dtypes[dtype, torch.float32] == batches  # the head
    assert cuda.attention == [True] * 2 * batches  # of two layers


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_fused_loss_and_its_gradients(
    divergence: str, temperature: float, dtype: torch.dtype
) -> None:
    """The backward function is called by hand: autograd's engine has no CUDA in a CPU build."""
    rows, width, vocabulary = 24, 8, 50
    generator = torch.Generator().manual_seed(0)
    features, weight = (
        torch.randn(n, width, generator=generator).to(dtype) for n in (rows, vocabulary)
    )
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    teacher = in_float32(make_teacher(rows, vocabulary, seed=1))
    assert teacher is not None
    how = LossSettings(0.3, temperature, divergence, chunk_size=10)

    def run(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        kept = replace(TeacherRows(*map(place, teacher._columns())), host_offsets=teacher.offsets)
        context = SimpleNamespace(
            needs_input_grad=(True, True, False), mark_non_differentiable=lambda *_: None
        )
        targets = _Targets(place(labels), temper_rows(kept, temperature), place(torch.tensor(24.0)))
        with torch.no_grad():
            terms: Any = _FusedLoss.forward(
                context, place(features), place(weight), None, targets, how, None
            )
            grads: Any = _FusedLoss.backward(context, place(torch.tensor(1.0)))[:2]
        return [*terms, *grads]

    expected = run(lambda values: values)
    with PretendedCUDA() as cuda:
        found = run(on_gpu)
        assert not cuda.waits
        chunks = 3
        assert all(isinstance(x, OnGPU) and str(x.device) == "cuda:0" for x in found)
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        assert [x.dtype for x in found[:3]] == [torch.float32] * 3
        assert [x.dtype for x in found[3:]] == [dtype] * 2
        if dtype != torch.float32:
            assert cuda.dtypes[dtype, torch.float32] == 2 * chunks  # logits, the weight's gradient
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs)


class OneStream:
    """In place of `SideStreams`: head and selection follow the forwards in the same stream."""

    def __init__(self, _: set[torch.device]) -> None:
        pass

    @contextmanager
    def after(self, queued: Any) -> Iterator[Tensor]:
        yield queued.values


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return (hidden + positions * self.weight).sigmoid()


class Chain(nn.Module):
    """A backbone with a layer on each GPU.

    As in transformers, the first GPU is waited for once, and each layer is given a tensor that lies there.
    """

    def __init__(self, gpus: int) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(gpus))
        self.requires_grad_(False)
        self.base_model = self.forward
        self.hf_device_map = {f"layers.{g}": f"cuda:{g}" for g in range(gpus)}
        self.hf_device_map |= {"embedding": "cuda:0", "last": f"cuda:{gpus - 1}"}

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        assert bool((input_ids >= 0).all())
        positions = torch.ones(8, device=input_ids.device)
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, positions=positions)
        return SimpleNamespace(last_hidden_state=hidden)


# Seconds of a layer on its GPU, and of all other operations of a batch, most of them of head and selection.
LAYER, OTHER = 1.0, 0.001
BATCHES = 32


def simulate(gpus: int, monkeypatch: pytest.MonkeyPatch, *, ahead: int, streams: type) -> float:
    """Return the seconds that the batches take."""
    table, codec = random_table([6] * BATCHES, vocabulary=64), TopKCodec((1.0,), 64, 4)
    monkeypatch.setattr(CausalLM, "num_gpus", ahead)
    monkeypatch.setattr(scoring, "SideStreams", streams)
    cost = {"sigmoid": LAYER}
    with PretendedCUDA(gpus=gpus, cost=lambda name: cost.get(name, OTHER)) as cuda:
        model: Any = Chain(gpus)
        put_on_gpus(model, model.hf_device_map)
        spread._stream.cache_clear()
        copy_beside_work(model)
        teacher = CausalLM(model, Head(model.last.weight), 64, is_split=True, needs_mask=False)
        batches = batch_by_length(table, 1)
        found = list(select_batches(Scorer(teacher, 1), batches, codec, num_tokens=64))
        torch.cuda.synchronize()
    assert len(found) == BATCHES and min(cuda.clock.busy) > LAYER * BATCHES
    seconds: float = cuda.clock.now
    return seconds


@pytest.mark.parametrize(("gpus", "least"), [(2, 1.9), (4, 3.5), (8, 6.0)])
def test_the_gpus_of_a_group_work_at_the_same_time(
    gpus: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a computed clock; with everything in one stream, running ahead gains little."""
    alone = simulate(gpus, monkeypatch, ahead=0, streams=OneStream)
    one_stream = simulate(gpus, monkeypatch, ahead=gpus, streams=OneStream)
    found = simulate(gpus, monkeypatch, ahead=gpus, streams=SideStreams)
    assert alone / found >= least
    assert alone / one_stream < 0.8 * least, "the clock does not tell streams apart"


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor made on the CPU": lambda x: x + torch.zeros(4),
    "an output on the CPU": lambda x: torch.mm(x, x, out=torch.zeros(4, 4)),
    "a weight on another GPU": lambda x: x @ on_gpu(torch.ones(4, 4), "cuda:1"),
    "float32 from float32": lambda x: torch.mm(x, x, out_dtype=torch.float32),
}
WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "a mask": lambda x: x[x > 0],
    "assignment to a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "indices from the CPU": lambda x: x[torch.tensor([0, 1])],
    "nonzero": lambda x: x.nonzero(),
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy from the CPU": lambda x: torch.ones(3).to(x.device),
    "a tensor of values": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy_": lambda x: x.copy_(torch.ones(4, 4)),
    "lengths": lambda x: torch.arange(4, device=x.device).repeat_interleave(x[0].long()),
    "unique": lambda x: x.unique(),
    "tolist": lambda x: x.tolist(),
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "queued copy": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "products": lambda x: (x @ x).softmax(-1).amax(-1),
    "indices": lambda x: x.view(-1)[torch.arange(3, device=x.device)],
    "assignment": lambda x: x.__setitem__(slice(0, 2), 0.0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cuda_refuses_is_refused(name: str) -> None:
    with PretendedCUDA(gpus=2), pytest.raises((AssertionError, RuntimeError)):
        FAULTS[name](on_gpu(torch.ones(4, 4)))


@pytest.mark.parametrize("name", [*WAITING, *FREE])
def test_what_the_host_waits_for_is_counted(name: str) -> None:
    with PretendedCUDA() as cuda:
        (WAITING | FREE)[name](on_gpu(torch.ones(4, 4)))
    assert (cuda.waits.total() > 0) == (name in WAITING), cuda.waits
