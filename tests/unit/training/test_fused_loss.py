"""The fused loss against autograd in float64 that holds all logits at once: values, gradients, extremes, memory."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retort.training.fused_loss import (
    LossSettings,
    TeacherRows,
    choose_chunk_size,
    compute_fused_loss,
)

torch.set_num_threads(1)  # on tensors of this size a second thread only costs

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


def make_teacher(rows: int, vocabulary: int, *, seed: int, most: int = 9) -> TeacherRows:
    """Kept tokens of each position, float64, and a tail of some mass; where all are kept, of none."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, min(most, vocabulary) + 1, (rows,), generator=generator)
    ids = [torch.randperm(vocabulary, generator=generator)[:n] for n in sizes.tolist()]
    tail = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.8 + 0.05
    tail = torch.where(sizes == vocabulary, 0.0, tail)
    logits = [torch.randn(len(i), generator=generator, dtype=torch.float64) * 2 for i in ids]
    logprobs = [x.log_softmax(0) + torch.log1p(-t) for x, t in zip(logits, tail, strict=True)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    return TeacherRows(offsets, torch.cat(ids), torch.cat(logprobs), tail.log().clamp(min=-1e4))


def reference(
    weights: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    teacher: TeacherRows | None,
    how: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three losses from all logits, position after position, in the words of the definitions."""
    features, weight, bias = weights
    logits = features @ weight.T + (bias if bias is not None else 0.0)
    logits = logits * how.scale
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    hard = F.cross_entropy(logits, labels, reduction="sum")
    soft = torch.zeros((), dtype=torch.float64)
    logq = (logits / how.temperature).log_softmax(-1)
    for p in range(len(labels) if teacher is not None else 0):
        assert teacher is not None
        first, stop = teacher.offsets[p : p + 2].tolist()
        ids, tail = teacher.ids[first:stop], teacher.tail_logprobs[p].double().exp()
        kept = (teacher.logprobs[first:stop].double() / how.temperature).softmax(0) * (1 - tail)
        outside = torch.ones(weight.shape[0], dtype=torch.bool)
        outside[ids] = False
        q = logq[p].exp()
        pairs = [(kept, q[ids])]
        if bool(outside.any()) and float(tail) > 1e-12:
            pairs.append((tail[None], q[outside].sum()[None]))
        for a, b in pairs:
            mean = (a + b) / 2
            soft = (
                soft
                + {
                    "forward_kl": (a * (a / b).log()).sum(),
                    "reverse_kl": (b * (b / a).log()).sum(),
                    "jensen_shannon": (a * (a / mean).log() + b * (b / mean).log()).sum() / 2,
                }[how.divergence]
            )
    soft = how.temperature**2 * soft
    return how.alpha * hard + (1 - how.alpha) * soft, hard, soft


def make_weights(
    rows: int, hidden: int, vocabulary: int, *, seed: int, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, hidden), (vocabulary, hidden)] + [(vocabulary,)] * bias
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return drawn[0], drawn[1] / hidden**0.5, drawn[2] if bias else None


def leaves(weights: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor]:
    return [w.detach().to(dtype).requires_grad_() for w in weights if w is not None]


def in_float32(teacher: TeacherRows | None) -> TeacherRows | None:
    if teacher is None:
        return None
    return replace(
        teacher,
        logprobs=teacher.logprobs.float(),
        tail_logprobs=teacher.tail_logprobs.float(),
    )


def assert_same(
    weights: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    teacher: TeacherRows | None,
    how: LossSettings,
    *,
    normalizer: float = 1.0,
) -> None:
    exact = leaves(weights, torch.float64)
    padded = (exact[0], exact[1], exact[2] if len(exact) > 2 else None)
    total, hard, soft = reference(padded, labels, teacher, how)
    (total / normalizer).backward()
    mine = leaves(weights, torch.float32)
    found = compute_fused_loss(
        mine[0],
        mine[1],
        labels,
        in_float32(teacher),
        how,
        bias_V=mine[2] if len(mine) > 2 else None,
        normalizer=normalizer,
    )
    found.total.backward()
    pairs = [(found.total, total), (found.hard, hard)]
    pairs += [(found.soft, soft)] if found.soft is not None else []
    for a, b in pairs:
        assert float(a.detach()) == pytest.approx(
            float(b.detach()) / normalizer, rel=2e-5, abs=2e-5
        )
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2e-4, atol=2e-5)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_losses_and_gradients_are_those_of_a_dense_float64_reference(data: st.DataObject) -> None:
    vocabulary, rows = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 10_000))
    alpha = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    how = LossSettings(
        alpha,
        data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        divergence=data.draw(st.sampled_from(DIVERGENCES)),
        scale=data.draw(st.sampled_from([1.0, 0.25])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        chunk_size=data.draw(st.integers(1, 10)),
    )
    weights = make_weights(rows, 5, vocabulary, seed=seed, bias=data.draw(st.booleans()))
    labels = torch.randint(
        0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed + 1)
    )
    teacher = make_teacher(rows, vocabulary, seed=seed + 2) if alpha < 1 else None
    assert_same(weights, labels, teacher, how, normalizer=data.draw(st.sampled_from([1.0, 7.0])))


@pytest.mark.parametrize("vocabulary", [512, 32_768, 262_144])
def test_wide_vocabularies_are_added_up_without_loss(vocabulary: int) -> None:
    weights = make_weights(3, 16, vocabulary, seed=0)
    labels = torch.tensor([0, vocabulary - 1, 7])
    teacher = make_teacher(3, vocabulary, seed=1, most=60)
    for temperature in (1.0, 2.0):
        assert_same(weights, labels, teacher, LossSettings(0.5, temperature))


def test_a_drawn_tail_is_the_kl_over_the_kept_tokens_alone() -> None:
    weights, labels = make_weights(4, 5, 30, seed=3), torch.tensor([1, 2, 3, 4])
    teacher = make_teacher(4, 30, seed=4)
    sums = [float(x.exp().sum()) for x in teacher.logprobs.split(teacher.offsets.diff().tolist())]
    sizes = teacher.offsets.diff()
    whole = replace(
        teacher,
        logprobs=teacher.logprobs - torch.tensor(sums).log().repeat_interleave(sizes),
        tail_logprobs=torch.full((4,), -1e4, dtype=torch.float64),
    )
    assert_same(weights, labels, whole, LossSettings(0.2))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gets_the_gradients_of_its_own_cross_entropy(tied: bool) -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(40, 6)
    head = embedding.weight if tied else torch.nn.Parameter(torch.randn(40, 6))
    ids, labels = torch.randint(0, 40, (11,)), torch.randint(0, 40, (11,))
    found = []
    for fused in (True, False):
        embedding.zero_grad()
        head.grad = None
        features = torch.tanh(embedding(ids))
        if fused:
            how = LossSettings(1.0, chunk_size=4)
            loss = compute_fused_loss(features, head, labels, None, how, normalizer=11).total
        else:
            loss = F.cross_entropy(features @ head.T, labels)
        loss.backward()
        assert embedding.weight.grad is not None and head.grad is not None
        found.append((embedding.weight.grad.clone(), head.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_the_head_runs_in_its_type_and_the_rest_in_float32() -> None:
    features, weight, _ = make_weights(64, 32, 500, seed=5)
    labels = torch.randint(0, 500, (64,), generator=torch.Generator().manual_seed(6))
    teacher = in_float32(make_teacher(64, 500, seed=7))
    how = LossSettings(0.5, 2.0, chunk_size=16)
    full, half = (
        leaves((features, weight), torch.float32),
        leaves((features, weight), torch.float32),
    )
    expected = compute_fused_loss(full[0], full[1], labels, teacher, how)
    expected.total.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = compute_fused_loss(half[0], half[1], labels, teacher, how)
    found.total.backward()
    mine, theirs = found.total.detach(), expected.total.detach()
    assert mine.dtype == torch.float32
    assert float(mine) == pytest.approx(float(theirs), rel=2e-3)
    for a, b in zip(half, full, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == torch.float32
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < 2e-2


def test_a_factor_on_the_loss_is_one_on_the_gradients() -> None:
    features, weight, _ = make_weights(4, 5, 30, seed=8)
    labels = torch.tensor([1, 2, 3, 4])
    found = []
    for factor in (1.0, 1024.0):  # as GradScaler does
        mine = leaves((features, weight), torch.float32)
        (
            factor * compute_fused_loss(mine[0], mine[1], labels, None, LossSettings(1.0)).total
        ).backward()
        found.append([w.grad / factor for w in mine if w.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_extreme_students_have_finite_losses_and_gradients() -> None:
    features = torch.tensor([[200.0], [-200.0], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5], [0.0], [0.1]], requires_grad=True)
    teacher = TeacherRows(
        torch.tensor([0, 2, 3, 5]),
        torch.tensor([0, 1, 2, 3, 4]),
        torch.tensor([math.log(0.4), math.log(0.4), 0.0, math.log(0.5), -1e4]),
        torch.tensor([math.log(0.2), -1e4, math.log(0.5)]),
    )
    for divergence in DIVERGENCES:
        for temperature in (1.0, 2.0):
            how = LossSettings(0.3, temperature, divergence)
            loss = compute_fused_loss(features, weight, torch.tensor([1, 0, 4]), teacher, how)
            gradients = torch.autograd.grad(loss.total, [features, weight])
            assert bool(torch.isfinite(loss.total))
            assert all(bool(torch.isfinite(g).all()) for g in gradients), divergence


class Largest(TorchDispatchMode):
    """Remembers the greatest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_no_more_than_one_chunk_of_logits_is_ever_held() -> None:
    rows, vocabulary, chunk = 96, 300, 8
    features, weight = leaves(make_weights(rows, 4, vocabulary, seed=9)[:2], torch.float32)
    teacher = in_float32(make_teacher(rows, vocabulary, seed=10))
    with Largest() as largest:
        how = LossSettings(0.5, 2.0, chunk_size=chunk)
        loss = compute_fused_loss(
            features, weight, torch.zeros(rows, dtype=torch.long), teacher, how
        )
        loss.total.backward()
    assert largest.elements == chunk * vocabulary


def test_chunks_are_chosen_by_the_vocabulary() -> None:
    assert [choose_chunk_size(v) for v in (512, 32_768, 131_072, 262_144)] == [4096, 64, 64, 64]
