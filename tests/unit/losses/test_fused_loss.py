"""The fused loss against autograd in float64 that holds all logits at once: values, gradients, extremes, memory."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retort.losses.chunk_loss import compute_chunk
from retort.losses.fused_loss import (
    choose_chunk_size,
    compute_fused_loss,
    compute_loss_of_logits,
)
from retort.losses.live_loss import compute_live_loss
from retort.losses.teacher_rows import ChunkRows, TeacherRows, split_rows, temper_rows
from retort.losses.terms import LossSettings
from support.losses import (
    DIVERGENCES,
    POSITION_WEIGHTS,
    assert_same_losses,
    check_fused_loss,
    in_float32,
    leaves,
    make_teacher,
    make_weights,
    random_logits,
    to_teacher,
)

torch.set_num_threads(1)  # on tensors of this size a second thread only costs


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("alpha", "temperature", "scale", "softcap", "chunk_size"),
    [(0.0, 1.0, 1.0, None, 9), (0.3, 2.0, 0.25, 2.0, 4), (0.3, 1.0, 0.25, None, 1)],
)
def test_losses_and_gradients_are_those_of_a_dense_float64_reference(
    alpha: float,
    temperature: float,
    scale: float,
    softcap: float | None,
    chunk_size: int,
    divergence: str,
) -> None:
    how = LossSettings(alpha, temperature, divergence, scale, softcap, chunk_size)
    check_fused_loss(9, 40, how, bias=softcap is not None, normalizer=7.0)


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl", "total_variation"])
@pytest.mark.parametrize("kind", ["teacher_entropy", "teacher_confidence"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_weights_of_positions_are_those_of_a_dense_float64_reference(
    divergence: str, kind: str, temperature: float
) -> None:
    how = LossSettings(0.3, temperature, divergence, chunk_size=4, skew=0.4, position_weights=kind)
    check_fused_loss(30, 12, how, normalizer=7.0)  # of so few ids, many texts' tokens are kept


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", POSITION_WEIGHTS)
def test_a_live_teacher_has_the_losses_and_gradients_of_one_that_is_kept_whole(
    divergence: str, kind: str | None
) -> None:
    rows, vocabulary = 6, 20
    # Of ids that it does not have, each counts as exp(-30) in reverse_kl, and so does the tail of them all.
    narrower = 20 if divergence == "reverse_kl" else 17
    how = LossSettings(0.3, 2.0, divergence, skew=0.2, position_weights=kind)
    logits_PV = random_logits(rows, vocabulary, scale=2.0, seed=1).float()
    teacher_PV = random_logits(rows, narrower, scale=2.0, seed=2).float()
    labels_P = torch.tensor([3, 16, 0, 1, 2, 3])
    ids_PK = torch.arange(narrower).repeat(rows, 1)
    tail_P = torch.full((rows,), -1e4)
    kept = to_teacher(ids_PK, teacher_PV.log_softmax(dim=-1), tail_P)
    ours, theirs = logits_PV.clone().requires_grad_(), logits_PV.clone().requires_grad_()
    cached = compute_loss_of_logits(ours, labels_P, kept, how, normalizer=5.0)
    live = compute_live_loss(theirs, labels_P, teacher_PV, how, normalizer=5.0)
    for mine, other in zip(cached, live, strict=True):
        assert mine is not None and other is not None
        assert mine.item() == pytest.approx(other.item(), rel=1e-5)
    gradients = [torch.autograd.grad(t.total, x)[0] for t, x in ((cached, ours), (live, theirs))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_alpha_goes_to_its_end_on_a_straight_line() -> None:
    how = LossSettings(1.0, alpha_end=0.2)
    found = [how.find_alpha(step, max_steps=5) for step in range(5)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert how.find_alpha(0, max_steps=1) == 1.0
    assert {LossSettings(0.3).find_alpha(step, max_steps=5) for step in range(5)} == {0.3}


def test_the_temperature_goes_to_its_end_through_what_is_stored() -> None:
    how = LossSettings(0.5, 4.0, temperature_end=2.0)
    found = [how.find_temperature(step, max_steps=5) for step in range(5)]
    assert found == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0])
    stepwise = replace(how, stored=(1.0, 2.0, 2.9, 4.0))
    found = [stepwise.find_temperature(step, max_steps=5) for step in range(5)]
    assert found == [4.0, 4.0, 2.9, 2.9, 2.0]
    assert LossSettings(0.5, 3.0).find_temperature(4, max_steps=5) == 3.0


def test_without_a_teacher_the_loss_is_cross_entropy() -> None:
    check_fused_loss(9, 40, LossSettings(1.0, softcap=2.0, chunk_size=4), bias=True)


@pytest.mark.parametrize("vocabulary", [512, 32_768, 262_144])
def test_wide_vocabularies_are_summed_without_loss_of_precision(vocabulary: int) -> None:
    weights = make_weights(3, 16, vocabulary, seed=0)
    labels = torch.tensor([0, vocabulary - 1, 7])
    teacher = make_teacher(3, vocabulary, seed=1, most=60)
    for temperature in (1.0, 2.0):
        assert_same_losses(weights, labels, teacher, LossSettings(0.5, temperature))


def test_without_a_tail_the_loss_is_the_kl_over_the_kept_tokens_alone() -> None:
    weights, labels = make_weights(4, 5, 30, seed=3), torch.tensor([1, 2, 3, 4])
    teacher = make_teacher(4, 30, seed=4)
    sums = torch.segment_reduce(teacher.logprobs.exp(), "sum", offsets=teacher.offsets)
    whole = replace(
        teacher,
        logprobs=teacher.logprobs - sums.log().repeat_interleave(teacher.offsets.diff()),
        tail_logprobs=torch.full((4,), -1e4, dtype=torch.float64),
    )
    assert_same_losses(weights, labels, whole, LossSettings(0.2))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_gets_the_gradients_of_its_own_cross_entropy(tied: bool) -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(40, 6)
    head = embedding.weight if tied else torch.nn.Parameter(torch.randn(40, 6))
    ids, labels = torch.randint(0, 40, (11,)), torch.randint(0, 40, (11,))
    found: list[tuple[Tensor, Tensor]] = []
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
    full, half = (leaves((features, weight), torch.float32) for _ in range(2))
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
    for factor in (1.0, 1024.0):  # what GradScaler multiplies by
        mine = leaves((features, weight), torch.float32)
        terms = compute_fused_loss(mine[0], mine[1], labels, None, LossSettings(1.0))
        (factor * terms.total).backward()
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


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.untyped_storage().data_ptr()


class Largest(TorchDispatchMode):
    """Records the greatest number of elements that any operation returned, in other memory than that of `beside`."""

    def __init__(self, beside: Tensor | None = None) -> None:
        super().__init__()
        self.elements, self.beside = 0, _address(beside)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and _address(tensor) != self.beside:
                self.elements = max(self.elements, tensor.numel())
        return found


def test_no_more_than_one_chunk_of_logits_is_ever_in_memory() -> None:
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


def _make_chunk(rows: int, vocabulary: int) -> tuple[Tensor, ChunkRows]:
    """Return a chunk's logits [rows, vocabulary], and its rows of a teacher."""
    teacher = in_float32(make_teacher(rows, vocabulary, seed=12))
    assert teacher is not None
    (chunk,) = split_rows(temper_rows(teacher, 2.0), [0, rows], vocabulary)
    assert chunk is not None
    return random_logits(rows, vocabulary, scale=3.0, seed=11).float(), chunk


def test_another_temperature_needs_an_eighth_of_a_chunk_beside_its_logits() -> None:
    logits, chunk = _make_chunk(64, 300)
    with Largest(beside=logits) as largest:
        compute_chunk(logits, torch.zeros(64, dtype=torch.long), chunk, LossSettings(0.5, 2.0))
    assert largest.elements == 64 * 300 // 8


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 61])
def test_the_number_of_pieces_changes_no_bit(
    divergence: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, chunk = _make_chunk(rows, 301)
    labels, settings = torch.zeros(rows, dtype=torch.long), LossSettings(0.3, 2.0, divergence)
    found = []
    for pieces in (1, 3, 8):
        monkeypatch.setattr("retort.losses.chunk_loss._PIECES", pieces)
        found.append(compute_chunk(logits.clone(), labels, chunk, settings))
    for tensors in zip(*found, strict=True):
        assert torch.equal(tensors[0], tensors[1])
        assert torch.equal(tensors[0], tensors[2])


def test_chunks_are_chosen_by_the_vocabulary() -> None:
    assert [choose_chunk_size(v) for v in (512, 32_768, 131_072, 262_144)] == [4096, 64, 64, 64]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_gradients_of_large_steps_do_not_vanish(
    dtype: torch.dtype, error: float
) -> None:
    """As GradScaler does with float16: the loss of a step of 262,144 positions is multiplied by 65,536."""
    weights, labels = make_weights(64, 32, 2000, seed=5), torch.arange(64)
    teacher, how = make_teacher(64, 2000, seed=6, most=20), LossSettings(0.1)
    found = list[Tensor]()
    for is_half in (False, True):
        features, weight = (w.float().clone().requires_grad_() for w in weights[:2])
        with torch.autocast("cpu", dtype=dtype, enabled=is_half):
            terms = compute_fused_loss(
                features, weight, labels, in_float32(teacher), how, normalizer=262_144.0
            )
        (terms.total * 65_536.0).backward()
        assert weight.grad is not None
        found.append(weight.grad)
    exact, half = found
    assert float((half - exact).norm() / exact.norm()) < error
    assert int((half == 0).sum()) <= 0.01 * exact.numel() + int((exact == 0).sum())
