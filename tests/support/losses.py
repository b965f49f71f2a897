"""Losses written out in float64, and random students and teachers to compare them on.

Legend: P positions, D hidden size, V vocabulary, K kept tokens of every position.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retort.cache.codec import LOGPROB_FLOOR, SparseTargets
from retort.cache.top_k_codec import TopKCodec
from retort.losses.fused_loss import compute_fused_loss, compute_loss_of_logits
from retort.losses.teacher_rows import TeacherRows, temper_rows
from retort.losses.terms import LossSettings
from retort.teacher.selection import select_top_k
from retort.tokens.sequences import build_table
from retort.training.batches import Collator, Item

TEMPERATURES = (0.5, 1.0, 2.0)
DIVERGENCES = (
    *("forward_kl", "reverse_kl", "jensen_shannon"),
    *("skew_forward_kl", "skew_reverse_kl", "total_variation"),
)
POSITION_WEIGHTS = (None, "teacher_entropy", "teacher_confidence")


def random_logits(rows: int, vocabulary: int, *, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def mark(ids_PK: Tensor, vocabulary: int) -> Tensor:
    """Return which ids are kept, bool [P, V]."""
    return torch.zeros((len(ids_PK), vocabulary), dtype=torch.bool).scatter(1, ids_PK, True)


def reference_kl(
    student_PV: Tensor, teacher_PV: Tensor, kept_PV: Tensor, temperature: float
) -> Tensor:
    """KL over the kept tokens and one bucket for all others, from probabilities in float64, without the factor T^2.

    The teacher's vocabulary may be narrower than the student's, whose further ids are in the bucket then.
    """
    p_PV = torch.zeros_like(student_PV)
    p_PV[:, : teacher_PV.shape[1]] = (teacher_PV / temperature).softmax(-1)
    q_PV = (student_PV / temperature).softmax(-1)
    pairs = [(p_PV[kept_PV], q_PV[kept_PV])]
    pairs += [((p_PV * ~kept_PV).sum(-1), (q_PV * ~kept_PV).sum(-1))]
    terms = [
        torch.where(p > 1e-12, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0)
        for p, q in pairs
    ]
    return terms[0].sum() + terms[1].sum()


def value_and_gradient(loss: Tensor, student_PV: Tensor) -> tuple[float, Tensor]:
    (gradient_PV,) = torch.autograd.grad(loss, student_PV)
    return float(loss.detach()), gradient_PV.double()


# ---------------------------------------------------------------------------------------------------------
# The same number of tokens kept at every position


def keep_top_k(
    teacher_PV: Tensor, *, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What an exact cache holds: ids, logprobs at T = 1, the tail's logprob at T; in float32."""
    head_PK, ids_PK = teacher_PV.log_softmax(dim=-1).topk(top_k, dim=-1)
    at_t_PV = (teacher_PV / temperature).log_softmax(dim=-1)
    tail_P = at_t_PV.scatter(1, ids_PK, -torch.inf).logsumexp(dim=-1)
    return ids_PK, head_PK.float(), tail_P.clamp(min=-10_000.0).float()


def to_teacher(ids_PK: Tensor, logprobs_PK: Tensor, tail_P: Tensor) -> TeacherRows:
    offsets = torch.arange(len(ids_PK) + 1) * ids_PK.shape[1]
    return TeacherRows(offsets, ids_PK.reshape(-1).long(), logprobs_PK.reshape(-1), tail_P)


def compute_sparse_kl(
    logits_PV: Tensor, ids_PK: Tensor, logprobs_PK: Tensor, tail_P: Tensor, *, temperature: float
) -> Tensor:
    """The summed KL over the kept tokens and the tail, without its factor T^2."""
    labels_P = torch.zeros(len(logits_PV), dtype=torch.long)
    teacher = to_teacher(ids_PK, logprobs_PK, tail_P)
    how = LossSettings(0.0, temperature)
    return compute_loss_of_logits(logits_PV, labels_P, teacher, how).total / temperature**2


def sparse_kl(
    student_PV: Tensor, teacher_PV: Tensor, *, top_k: int, temperature: float
) -> tuple[float, Tensor]:
    """Its value and gradient [P, V] from an exact cache of the teacher."""
    student_PV = student_PV.float().requires_grad_()
    kept = keep_top_k(teacher_PV, top_k=top_k, temperature=temperature)
    loss = compute_sparse_kl(student_PV, *kept, temperature=temperature)
    return value_and_gradient(loss, student_PV)


def check_sparse_kl(
    vocabulary: int, top_k: int, temperature: float, *, scale: float, seed: int
) -> None:
    """Compare sparse KL and its gradient with the float64 reference, for random logits."""
    student_PV = random_logits(3, vocabulary, scale=2.0, seed=seed).float().double()
    teacher_PV = random_logits(3, vocabulary, scale=scale, seed=seed + 1)
    kept_PV = mark(teacher_PV.topk(top_k, dim=-1).indices, vocabulary)
    leaf_PV = student_PV.clone().requires_grad_()
    expected, expected_gradient = value_and_gradient(
        reference_kl(leaf_PV, teacher_PV, kept_PV, temperature), leaf_PV
    )
    found, gradient = sparse_kl(student_PV, teacher_PV, top_k=top_k, temperature=temperature)
    assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=2e-5)


def check_tempered_rows(top_k: int, temperature: float, *, scale: float, seed: int) -> None:
    """Compare kept tokens at T with the softmax at T, for random logits."""
    teacher_PV = random_logits(3, 30, scale=scale, seed=seed)
    ids_PK, head_PK, tail_P = keep_top_k(teacher_PV, top_k=top_k, temperature=temperature)
    expected_PK = (teacher_PV / temperature).softmax(-1).gather(1, ids_PK)
    teacher = temper_rows(to_teacher(ids_PK, head_PK, tail_P), temperature)
    found_PK = teacher.logprobs.double().exp().view_as(expected_PK)
    torch.testing.assert_close(found_PK, expected_PK, rtol=3e-5, atol=1e-7)
    total_P = found_PK.sum(-1) + tail_P.double().exp()
    torch.testing.assert_close(total_P, torch.ones_like(total_P), rtol=0, atol=3e-6)


# ---------------------------------------------------------------------------------------------------------
# From hidden states, with any number of tokens kept at a position


def make_weights(
    rows: int, hidden: int, vocabulary: int, *, seed: int, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return random features [P, D], weight [V, D] and bias [V], float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, hidden), (vocabulary, hidden)] + [(vocabulary,)] * bias
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return made[0], made[1] / hidden**0.5, made[2] if bias else None


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


def reference_losses(
    weights: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    teacher: TeacherRows | None,
    how: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, hard and soft loss from all logits, position after position, as their definitions say."""
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
            mean, skew = (a + b) / 2, how.skew
            values = {
                "forward_kl": (a * (a / b).log()).sum(),
                "reverse_kl": (b * (b / a).log()).sum(),
                "jensen_shannon": (a * (a / mean).log() + b * (b / mean).log()).sum() / 2,
                "skew_forward_kl": (a * (a / (skew * a + (1 - skew) * b)).log()).sum(),
                "skew_reverse_kl": (b * (b / (skew * b + (1 - skew) * a)).log()).sum(),
                "total_variation": (a - b).abs().sum() / 2,
            }
            soft = (
                soft
                + reference_weight(how, pairs, ids, int(labels[p]), len(outside))
                * (values[how.divergence])
            )
    soft = how.temperature**2 * soft
    return how.alpha * hard + (1 - how.alpha) * soft, hard, soft


def reference_weight(
    how: LossSettings, pairs: list[tuple[Tensor, Tensor]], ids: Tensor, label: int, width: int
) -> float:
    """The weight of a position, from the teacher's probabilities of kept tokens and tail."""
    if how.position_weights is None:
        return 1.0
    if how.position_weights == "teacher_entropy":
        return -sum(float((a * a.log()).sum()) for a, _ in pairs) / float(np.log(width))
    found = ids.tolist()
    return float(pairs[0][0][found.index(label)]) if label in found else 0.0


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


def assert_same_losses(
    weights: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    teacher: TeacherRows | None,
    how: LossSettings,
    *,
    normalizer: float = 1.0,
) -> None:
    """Compare the fused losses and their gradients in float32 with the float64 reference."""
    exact = leaves(weights, torch.float64)
    padded = (exact[0], exact[1], exact[2] if len(exact) > 2 else None)
    total, hard, soft = reference_losses(padded, labels, teacher, how)
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
        expected = float(b.detach()) / normalizer
        assert float(a.detach()) == pytest.approx(expected, rel=2e-5, abs=2e-5)
    for x, y in zip(mine, exact, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=2e-4, atol=2e-5)


def check_fused_loss(
    rows: int,
    vocabulary: int,
    how: LossSettings,
    *,
    bias: bool = False,
    normalizer: float = 1.0,
    seed: int = 0,
) -> None:
    """Compare as above, for random weights, labels and teacher."""
    weights = make_weights(rows, 5, vocabulary, seed=seed, bias=bias)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    teacher = make_teacher(rows, vocabulary, seed=seed + 2) if how.alpha < 1 else None
    assert_same_losses(weights, labels, teacher, how, normalizer=normalizer)


def check_widths(
    tokens: int, teacher: int, student: int, top_k: int, temperature: float, *, seed: int
) -> None:
    """Compare the fused loss from an exact cache with the float64 reference, for output layers of these widths."""
    rows = 4
    teacher_PV = random_logits(rows, teacher, scale=3.0, seed=seed)
    codec = TopKCodec((temperature,), teacher, top_k)
    targets = select_top_k(teacher_PV.float(), codec, num_tokens=tokens)
    stored = np.maximum(targets.logprobs, LOGPROB_FLOOR)
    tails = np.maximum(targets.tail_logprobs, LOGPROB_FLOOR)
    targets = SparseTargets(targets.offsets, targets.ids, stored, tails)
    table = build_table([([0] * (rows + 1), [True] * rows + [False], 0, ("", ""))])
    collator = Collator(0, student if student < teacher else None)
    batch = collator([[Item(0, table[0], targets)]])

    hidden = random_logits(rows, 5, scale=1.0, seed=seed + 1)
    weight = random_logits(student, 5, scale=1.0, seed=seed + 2)
    exact = leaves((hidden, weight), torch.float64)
    best_PK = teacher_PV[:, :tokens].topk(min(top_k, tokens), dim=-1).indices
    kl = reference_kl(
        exact[0] @ exact[1].T, teacher_PV[:, :tokens], mark(best_PK, student), temperature
    )
    expected = temperature**2 * kl
    expected.backward()
    mine = leaves((hidden, weight), torch.float32)
    labels = torch.zeros(rows, dtype=torch.long)
    how = LossSettings(0.0, temperature, chunk_size=3)
    found = compute_fused_loss(mine[0], mine[1], labels, batch["teacher"], how)
    found.total.backward()
    value = float(expected.detach())
    assert float(found.total.detach()) == pytest.approx(value, rel=1e-4, abs=1e-4)
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-4)
