"""Several teachers: losses and gradients from their joined caches, against dense mixtures in float64.

Legend: P positions, D hidden size, V vocabulary.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retort.cache.codec import LOGPROB_FLOOR, SparseTargets
from retort.cache.mixed import join_targets
from retort.cache.top_k_codec import TopKCodec
from retort.losses.fused_loss import compute_fused_loss
from retort.losses.teacher_rows import Mix, TeacherRows
from retort.losses.terms import LossSettings
from retort.teacher.selection import select_top_k
from support.losses import DIVERGENCES, mark, random_logits, reference_kl

ROWS, WIDTH, HIDDEN = 7, 40, 5
WEIGHTS = (0.5, 0.3, 0.2)


def make_members(*top_k: int, temperature: float) -> tuple[list[Tensor], list[SparseTargets]]:
    """Return the logits [P, V] of a teacher for each number, float64, and what its cache keeps, without rounding."""
    logits = [random_logits(ROWS, WIDTH, scale=2.0, seed=10 + n) for n in range(len(top_k))]
    found = []
    for logits_PV, number in zip(logits, top_k, strict=True):
        codec = TopKCodec((temperature,), WIDTH, number)
        kept = select_top_k(logits_PV.float(), codec, num_tokens=WIDTH)
        tails = np.maximum(kept.tail_logprobs, LOGPROB_FLOOR)
        found.append(SparseTargets(kept.offsets, kept.ids, kept.logprobs, tails))
    return logits, found


def to_rows(
    members: list[SparseTargets], weights: tuple[float, ...], *, is_whole: bool
) -> TeacherRows:
    joined = join_targets(members)
    columns = (
        joined.offsets,
        joined.ids.astype(np.int64),
        joined.logprobs,
        joined.tail_logprobs[..., 0],
    )
    tensors = [torch.from_numpy(np.ascontiguousarray(column)) for column in columns]
    return TeacherRows(*tensors, mix=Mix(weights, is_whole))


def to_row(member: SparseTargets) -> TeacherRows:
    columns = (
        member.offsets,
        member.ids.astype(np.int64),
        member.logprobs,
        member.tail_logprobs[:, 0],
    )
    return TeacherRows(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))


def compute(teacher: TeacherRows, how: LossSettings) -> list[Tensor]:
    """Return total, hard and soft loss of a random student, and the gradients of its features and its head."""
    features = random_logits(ROWS, HIDDEN, scale=1.0, seed=1).float().requires_grad_()
    weight = random_logits(WIDTH, HIDDEN, scale=1.0, seed=2).float().requires_grad_()
    labels = torch.arange(ROWS)
    found = compute_fused_loss(features, weight, labels, teacher, how)
    found.total.backward()
    assert found.soft is not None and features.grad is not None and weight.grad is not None
    return [found.total.detach(), found.hard, found.soft, features.grad, weight.grad]


def compute_expected(divergence: Any, how: LossSettings) -> list[Tensor]:
    """Return the same in float64; `divergence`: of the student's logits [P, V], without its factor T^2."""
    features = random_logits(ROWS, HIDDEN, scale=1.0, seed=1).float().double().requires_grad_()
    weight = random_logits(WIDTH, HIDDEN, scale=1.0, seed=2).float().double().requires_grad_()
    logits_PV = features @ weight.T
    hard = torch.nn.functional.cross_entropy(logits_PV, torch.arange(ROWS), reduction="sum")
    soft = how.temperature**2 * divergence(logits_PV)
    total = how.alpha * hard + (1 - how.alpha) * soft
    total.backward()
    assert features.grad is not None and weight.grad is not None
    return [total.detach(), hard.detach(), soft.detach(), features.grad, weight.grad]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def mix_logprobs(logits: list[Tensor], temperature: float) -> Tensor:
    """Return the logs of the mixture of the tempered distributions, float64 [P, V]."""
    pairs = zip(WEIGHTS, logits, strict=True)
    return sum((w * (x / temperature).softmax(dim=-1) for w, x in pairs), torch.zeros(())).log()


def dense_divergence(logits_PV: Tensor, mixed_PV: Tensor, how: LossSettings) -> Tensor:
    """Return a divergence of the student from log probabilities at T, by its definition."""
    p_PV, q_PV = mixed_PV.exp(), (logits_PV / how.temperature).softmax(dim=-1)
    skew, mean_PV = how.skew, (p_PV + q_PV) / 2
    found = {
        "forward_kl": p_PV * (p_PV / q_PV).log(),
        "reverse_kl": q_PV * (q_PV / p_PV).log(),
        "jensen_shannon": (p_PV * (p_PV / mean_PV).log() + q_PV * (q_PV / mean_PV).log()) / 2,
        "skew_forward_kl": p_PV * (p_PV / (skew * p_PV + (1 - skew) * q_PV)).log(),
        "skew_reverse_kl": q_PV * (q_PV / (skew * q_PV + (1 - skew) * p_PV)).log(),
        "total_variation": (p_PV - q_PV).abs() / 2,
    }
    return found[how.divergence].sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whole_caches_give_every_divergence_from_the_mixture(
    divergence: str, temperature: float
) -> None:
    logits, members = make_members(WIDTH, WIDTH, WIDTH, temperature=temperature)
    how = LossSettings(0.2, temperature, divergence, chunk_size=3)
    mixed_PV = mix_logprobs(logits, temperature)
    expected = compute_expected(lambda student: dense_divergence(student, mixed_PV, how), how)
    assert_close(compute(to_rows(members, WEIGHTS, is_whole=True), how), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [(4, 9, 1), (WIDTH, 6, 2), (WIDTH, WIDTH, WIDTH)])
def test_kept_tokens_give_the_weighted_mean_of_the_losses_from_each_teacher(
    top_k: tuple[int, ...], temperature: float
) -> None:
    logits, members = make_members(*top_k, temperature=temperature)
    how = LossSettings(0.2, temperature, chunk_size=3)
    kept = [mark(x.topk(k, dim=-1).indices, WIDTH) for x, k in zip(logits, top_k, strict=True)]

    def divergence(student_PV: Tensor) -> Tensor:
        each = zip(WEIGHTS, logits, kept, strict=True)
        kls = [w * reference_kl(student_PV, x, known, temperature) for w, x, known in each]
        return sum(kls, torch.zeros(()))

    assert_close(
        compute(to_rows(members, WEIGHTS, is_whole=False), how), compute_expected(divergence, how)
    )


def test_the_mean_of_the_losses_has_the_gradient_of_the_loss_from_the_mixture() -> None:
    """They differ by a constant, so students may be compared by either."""
    _, members = make_members(WIDTH, WIDTH, WIDTH, temperature=2.0)
    how = LossSettings(0.2, 2.0)
    mean, mixed = (compute(to_rows(members, WEIGHTS, is_whole=w), how) for w in (False, True))
    assert mean[2] > mixed[2]
    assert_close(mean[3:], mixed[3:])


@pytest.mark.parametrize(("top_k", "is_whole"), [((4, 9), False), ((WIDTH, WIDTH), True)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_of_all_the_weight_is_alone(
    top_k: tuple[int, int], is_whole: bool, temperature: float
) -> None:
    _, members = make_members(*top_k, temperature=temperature)
    how = LossSettings(0.2, temperature)
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        found = compute(to_rows(members, weights, is_whole=is_whole), how)
        assert_close(found, compute(to_row(members[number]), how), tolerance=1e-6)


def test_a_tail_that_the_student_has_lost_gives_no_gradient_that_is_not_finite() -> None:
    how = LossSettings(0.0)
    weight = torch.tensor([[80.0], [0.0], [0.0]], requires_grad=True)
    features = torch.ones(1, 1, requires_grad=True)
    rows = TeacherRows(
        torch.tensor([0, 2]),
        torch.tensor([0, 1]),
        torch.tensor([[-0.1, -torch.inf], [-0.5, -1.0]]),
        torch.tensor(
            [[np.log(-np.expm1(-0.1))], [np.log(1 - np.exp(-0.5) - np.exp(-1.0))]]
        ).float(),
        mix=Mix((0.5, 0.5), False),
    )
    found = compute_fused_loss(features, weight, torch.tensor([0]), rows, how)
    found.total.backward()
    assert found.total.isfinite() and weight.grad is not None and weight.grad.isfinite().all()


def test_joining_keeps_every_teachers_tokens_where_they_were() -> None:
    _, members = make_members(5, 11, 1, temperature=1.0)
    joined = join_targets(members)
    for number, member in enumerate(members):
        for p in range(ROWS):
            here, own = (slice(*x.offsets[p : p + 2]) for x in (joined, member))
            logprobs = joined.logprobs[number, here]
            kept = dict(zip(joined.ids[here].tolist(), logprobs.tolist(), strict=True))
            assert len(kept) == len(logprobs)
            expected = dict(
                zip(member.ids[own].tolist(), member.logprobs[own].tolist(), strict=True)
            )
            assert {k: v for k, v in kept.items() if v > -np.inf} == expected
