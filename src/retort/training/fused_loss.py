"""Hidden states and head weight -> losses and gradients, without the logits of all positions at once.

Positions go through the head in chunks. A chunk's logits become both losses and their gradient with respect to the
logits, that becomes the gradients of hidden states and weight, and the logits are dropped: one pass over the vocabulary
serves cross-entropy and distillation, and memory holds C x V numbers instead of P x V several times (the idea of Liger
Kernel's fused linear cross-entropy, Hsu et al., arXiv 2410.10989, 2024, section 3.2, with targets that are sparse).

Legend: P counted positions, C positions of a chunk, D hidden size, V vocabulary, N kept tokens of all positions.

With u = z / T the student's logits at temperature T, q = softmax(u), kept tokens k of probability p_k and the *tail* of
all others as one bucket of mass p_t and q_t = sum of q_j, any divergence f(q_k, q_t) has the gradient

    df/du_i = q_i (g_i - G),   g_k = df/dq_k,  g_j = df/dq_t outside,  G = sum of q_k g_k + q_t g_t

which is dense but for a number a row, and sparse corrections.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.training.losses import MIN_LOG_MASS, LossTerms, combine


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's distributions at P positions, kept tokens position after position.

    offsets int64 [P + 1]: where each position's tokens begin in ids int64 [N] and logprobs float32 [N], at temperature
    1; tail_logprobs float32 [P]: log of the mass outside them at the temperature of training.
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    tail_logprobs: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "TeacherRows":
        """Return them on a device: what moves batches asks whatever is in them."""
        return TeacherRows(*(t.to(device, non_blocking=non_blocking) for t in self._columns()))

    def pin_memory(self) -> "TeacherRows":
        """Return them in memory that a GPU reads while the CPU goes on."""
        return TeacherRows(*(t.pin_memory() for t in self._columns()))

    def _columns(self) -> tuple[Tensor, ...]:
        return self.offsets, self.ids, self.logprobs, self.tail_logprobs


@dataclass(frozen=True)
class LossSettings:
    """total = alpha hard + (1 - alpha) T^2 divergence; logits are softcap(scale * features @ weight + bias)."""

    alpha: float
    temperature: float = 1.0
    divergence: str = "forward_kl"
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None  # positions; None: see choose_chunk_size


def choose_chunk_size(vocabulary: int, device: str = "cpu") -> int:
    """Return how many positions go through the head at once: 2 million logits' worth on a CPU, 64 at least.

    A GPU reads the whole weight for every chunk, so it gets 134 million (half a GiB of float32); that is reckoned, not
    measured.
    """
    return max(64, (1 << (21 if device == "cpu" else 27)) // vocabulary)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0 (Maechler, Accurately Computing log(1 - exp(-|a|)), 2012)."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def temper_rows(teacher: TeacherRows, temperature: float) -> TeacherRows:
    """Return the rows with the kept tokens' logprobs at temperature T, where those of the tail are already.

    softmax(z / T) of the kept tokens is in proportion to p^(1/T); their sum is what the tail at T leaves.
    """
    scaled_N = teacher.logprobs.float() / temperature
    sizes_P = teacher.offsets.diff()
    best_P = _reduce(scaled_N, teacher.offsets, "max")
    shifted_N = scaled_N - best_P.repeat_interleave(sizes_P)
    mass_P = _reduce(shifted_N.exp(), teacher.offsets, "sum")
    tail_P = teacher.tail_logprobs.float()
    head_P = log1mexp(tail_P.clamp(max=-1e-7)) - mass_P.log()
    logprobs_N = shifted_N + head_P.repeat_interleave(sizes_P)
    return TeacherRows(teacher.offsets, teacher.ids, logprobs_N, tail_P.clamp(min=MIN_LOG_MASS))


def _reduce(values_N: Tensor, offsets_P: Tensor, how: str) -> Tensor:
    """Return the sum or the maximum of each position's values, [P]; always added in the same order."""
    return torch.segment_reduce(
        values_N, how, offsets=offsets_P, initial=0.0 if how == "sum" else None
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def compute_fused_loss(
    features_PD: Tensor,
    weight_VD: Tensor,
    labels_P: Tensor,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    bias_V: Tensor | None = None,
    normalizer: Tensor | float = 1.0,
    weight_slot: list[Tensor] | None = None,
) -> LossTerms:
    """Return the summed losses over `normalizer`; the total's gradients are ready when it returns.

    `weight_slot`: an empty list that the backward pass puts the weight's gradient into, instead of returning it.

    A compiled student calls it as it is: there is nothing in it that a compiler would fuse better.

    Under autocast the head runs in its type, everything behind the logits in float32. `teacher` None: alpha is 1.
    """
    tempered = _temper(teacher, settings)
    return LossTerms(
        *_FusedLoss.apply(  # type: ignore[no-untyped-call]
            features_PD,
            weight_VD if weight_slot is None else weight_VD.detach(),
            bias_V,
            labels_P,
            tempered,
            settings,
            normalizer,
            weight_slot,
        )
    )


def _temper(teacher: TeacherRows | None, settings: LossSettings) -> TeacherRows | None:
    assert teacher is not None or settings.alpha == 1.0, settings.alpha
    if teacher is None or settings.alpha == 1.0:
        return None
    return temper_rows(teacher, settings.temperature)


class _FusedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's logits are there, and handed out in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        features_PD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_P: Tensor,
        tempered: TeacherRows | None,
        settings: LossSettings,
        normalizer: Tensor | float,
        weight_slot: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        device = features_PD.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else weight_VD.dtype
        )
        wants = ctx.needs_input_grad
        wants = wants[0], wants[1] or weight_slot is not None, wants[2]
        grads = _Gradients((features_PD, weight_VD, bias_V), wants, dtype=dtype)
        chunk = settings.chunk_size or choose_chunk_size(len(weight_VD), device)
        hard = torch.zeros((), device=features_PD.device)
        divergence = torch.zeros((), device=features_PD.device)
        with torch.autocast(device, enabled=False):
            weight = weight_VD.to(dtype)
            bounds = list(range(0, len(features_PD), chunk))
            # One buffer for all chunks: the next one's logits would be made beside the last one's.
            wide = torch.promote_types(dtype, torch.float32)
            buffer_CV = weight.new_empty((min(chunk, len(features_PD)), len(weight)), dtype=wide)
            pieces = _cut(tempered, [*bounds, len(features_PD)], len(weight))
            for first, sparse in zip(bounds, pieces, strict=True):
                rows = slice(first, first + chunk)
                hidden_CD = features_PD[rows].to(dtype)
                logits_CV = _compute_logits(
                    hidden_CD, weight, bias_V, settings, out=buffer_CV[: len(hidden_CD)]
                )
                chunk_hard, chunk_divergence, grad_CV = _compute_chunk(
                    logits_CV, labels_P[rows], sparse, settings
                )
                hard += chunk_hard
                divergence += chunk_divergence
                grads.add(rows, grad_CV.div_(normalizer), hidden_CD, weight)
        ctx.grads, ctx.weight_slot = grads, weight_slot
        return _finish(ctx, hard, None if tempered is None else divergence, settings, normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        features, weight, bias = grads.release(grad_total)
        if ctx.weight_slot is not None:
            ctx.weight_slot.append(weight)
            weight = None
        return (features, weight, bias, *[None] * 5)


def _finish(
    ctx: Any,
    hard: Tensor,
    divergence: Tensor | None,
    settings: LossSettings,
    normalizer: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return total, hard and soft loss over `normalizer`; only the total has a gradient."""
    divergence = None if divergence is None else divergence / normalizer
    terms = combine(
        hard / normalizer, divergence, alpha=settings.alpha, temperature=settings.temperature
    )
    # Without a teacher the total is the hard loss, but no output may be two of them.
    total = terms.total.clone() if terms.soft is None else terms.total
    ctx.mark_non_differentiable(*(t for t in (terms.hard, terms.soft) if t is not None))
    return total, terms.hard, terms.soft


def compute_loss_of_logits(
    logits_PV: Tensor,
    labels_P: Tensor,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    normalizer: Tensor | float = 1.0,
) -> LossTerms:
    """Return the same from logits that a model made itself, scaled and capped: for heads of an unknown form."""
    tempered = _temper(teacher, settings)
    (sparse,) = _cut(tempered, [0, len(labels_P)], logits_PV.shape[1])
    plain = replace(settings, scale=1.0, softcap=None)
    return LossTerms(
        *_LossOfLogits.apply(  # type: ignore[no-untyped-call]
            logits_PV, labels_P, sparse, plain, normalizer
        )
    )


class _LossOfLogits(torch.autograd.Function):
    """All positions as one chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        labels_P: Tensor,
        sparse: "_Sparse | None",
        settings: LossSettings,
        normalizer: Tensor | float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        with torch.autocast(logits_PV.device.type, enabled=False):
            hard, divergence, ctx.grad = _compute_chunk(
                logits_PV.to(dtype, copy=True), labels_P, sparse, settings
            )
            ctx.grad.div_(normalizer)
        ctx.dtype = logits_PV.dtype
        return _finish(ctx, hard, None if sparse is None else divergence, settings, normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        return (grad.mul_(grad_total).to(ctx.dtype), None, None, None, None)


class _Gradients:
    """Sums of what the chunks give: features in their own type, weight and bias in float32 at least.

    Of (features [P, D], weight [V, D], bias [V] or None) those that are wanted; the others are None.
    """

    def __init__(
        self, inputs: tuple[Tensor | None, ...], wants: tuple[bool, ...], *, dtype: torch.dtype
    ) -> None:
        features, weight, bias = (
            t if wanted else None for t, wanted in zip(inputs, wants, strict=False)
        )
        sum_dtype = torch.promote_types(dtype, torch.float32)
        self.features = None if features is None else torch.empty_like(features)
        self.weight = None if weight is None else torch.zeros_like(weight, dtype=sum_dtype)
        self.weight_dtype = None if weight is None else weight.dtype
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=sum_dtype)

    def add(self, rows: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
        """Add a chunk's, from the gradient with respect to its logits."""
        if self.bias is not None:
            self.bias += grad_CV.sum(dim=0)
        grad_CV = grad_CV.to(hidden_CD.dtype)
        if self.features is not None:
            self.features[rows] = grad_CV @ weight_VD
        if self.weight is not None and grad_CV.dtype == self.weight.dtype:
            self.weight.addmm_(grad_CV.t(), hidden_CD)
        elif self.weight is not None:
            self.weight += grad_CV.t() @ hidden_CD

    def release(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Return them times `factor`, in their parameters' types, and forget them: what nobody else holds, autograd
        takes without a copy."""
        features, weight, bias = self.features, self.weight, self.bias
        self.features = self.weight = self.bias = None
        for tensor in (features, weight, bias):
            if tensor is not None:
                tensor.mul_(factor)
        return features, None if weight is None else weight.to(self.weight_dtype), bias


def _compute_logits(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    settings: LossSettings,
    *,
    out: Tensor,
) -> Tensor:
    """Return a chunk's logits, in `out` (float32 at least), after the model's own scale and softcap."""
    if out.dtype == hidden_CD.dtype:
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=out)
    else:
        logits_CV = out.copy_(hidden_CD @ weight_VD.t())
    if bias_V is not None:
        logits_CV += bias_V
    if settings.scale != 1.0:
        logits_CV *= settings.scale
    if settings.softcap is not None:
        logits_CV.div_(settings.softcap).tanh_().mul_(settings.softcap)
    return logits_CV


class _Sparse:
    """A chunk's part of the teacher: where its kept tokens are among C * V logits, their logprobs and the tails."""

    def __init__(self, rows: TeacherRows, vocabulary: int) -> None:
        self.offsets = rows.offsets
        places_C = torch.arange(len(rows.tail_logprobs), device=rows.ids.device)
        self.rows_N = places_C.repeat_interleave(rows.offsets.diff())
        self.places_N = self.rows_N * vocabulary + rows.ids
        self.logprobs_N, self.tail_C = rows.logprobs, rows.tail_logprobs

    def sum_rows(self, values_N: Tensor) -> Tensor:
        return _reduce(values_N, self.offsets, "sum")


def _cut(
    teacher: TeacherRows | None, bounds: list[int], vocabulary: int
) -> Iterator[_Sparse | None]:
    """Yield the teacher's part in each chunk; `bounds`: where chunks begin, and the end of the last."""
    if teacher is None:
        yield from [None] * (len(bounds) - 1)
        return
    firsts = teacher.offsets[torch.tensor(bounds, device=teacher.offsets.device)].tolist()
    for i, (first, stop) in enumerate(pairwise(bounds)):
        tokens = slice(firsts[i], firsts[i + 1])
        piece = TeacherRows(
            teacher.offsets[first : stop + 1] - firsts[i],
            teacher.ids[tokens],
            teacher.logprobs[tokens],
            teacher.tail_logprobs[first:stop],
        )
        yield _Sparse(piece, vocabulary)


def _exponentiate(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(logits - row's greatest) in place of the logits, and the greatest [C]."""
    best_C = logits_CV.amax(dim=-1)
    return logits_CV.sub_(best_C[:, None]).exp_(), best_C


def _compute_chunk(
    logits_CV: Tensor, labels_C: Tensor, sparse: _Sparse | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's summed hard loss and divergence, and the total's gradient before scale and softcap [C, V].

    The gradient overwrites the logits: no more than one [C, V] is held at T = 1, two at another temperature.
    """
    alpha, temperature = settings.alpha, settings.temperature
    slope_CV = 1 - (logits_CV / settings.softcap).square_() if settings.softcap else None
    label_logits_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    tempered_CV = logits_CV / temperature if sparse and temperature != 1.0 else None
    if sparse and tempered_CV is None:
        divergence, grad_CV, lse_C = _compute_soft(logits_CV, sparse, settings, alpha)
    else:
        grad_CV, best_C = _exponentiate(logits_CV)
        sum_C = grad_CV.sum(dim=-1)
        lse_C = best_C + sum_C.log()
        divergence = lse_C.new_zeros(())
        grad_CV *= (alpha / sum_C)[:, None]
    hard = (lse_C - label_logits_C).sum()
    if sparse and tempered_CV is not None:
        divergence, soft_grad_CV, _ = _compute_soft(tempered_CV, sparse, settings, 0.0)
        grad_CV += soft_grad_CV
    if alpha > 0:
        grad_CV.scatter_add_(1, labels_C[:, None], grad_CV.new_full((len(grad_CV), 1), -alpha))
    if slope_CV is not None:
        grad_CV *= slope_CV
    if settings.scale != 1.0:
        grad_CV *= settings.scale
    return hard, divergence, grad_CV


def _compute_soft(
    logits_CV: Tensor, sparse: _Sparse, settings: LossSettings, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed divergence, the soft loss's part of the gradient, and log of the sum of exponentials [C].

    logits_CV are at temperature T; the gradient, with respect to those at 1, overwrites them. `alpha` above 0: the
    gradient of cross-entropy, which is of the same softmax, is in it but for the labels' own.
    """
    flat = logits_CV.view(-1)
    logits_N = flat[sparse.places_N]
    sums_CV, best_C = _exponentiate(logits_CV)
    # The tail is added up: one minus the others would lose what is small.
    flat[sparse.places_N] = 0.0
    tail_C = sums_CV.sum(dim=-1)
    sum_C = tail_C + sparse.sum_rows((logits_N - best_C[sparse.rows_N]).exp())
    lse_C = best_C + sum_C.log()
    logq_N, tail_q_C = logits_N - lse_C[sparse.rows_N], tail_C / sum_C
    has_tail_C = tail_q_C.log() > MIN_LOG_MASS
    divergence, kept_N, tail_slope_C = _DIVERGENCES[settings.divergence](
        sparse.logprobs_N, logq_N, sparse.tail_C, tail_q_C.log().clamp(min=MIN_LOG_MASS)
    )
    tail_slope_C = torch.where(has_tail_C, tail_slope_C, 0.0)
    mean_C = sparse.sum_rows(kept_N) + tail_q_C * tail_slope_C
    weight = (1 - settings.alpha) * settings.temperature  # T^2 of the loss, 1 / T of its logits
    sums_CV *= ((alpha + weight * (tail_slope_C - mean_C)) / sum_C)[:, None]
    q_N = logq_N.exp()
    flat[sparse.places_N] = alpha * q_N + weight * (kept_N - q_N * mean_C[sparse.rows_N])
    return divergence, sums_CV, lse_C


def _forward_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student): its sum, q df/dq of the kept tokens, df/dq of the tail."""
    p_N, p_tail_C = logp_N.exp(), logp_tail_C.exp()
    terms_N = (p_N * (logp_N - logq_N)).masked_fill_(p_N == 0, 0.0)
    terms_C = p_tail_C * (logp_tail_C - logq_tail_C)
    return terms_N.sum() + terms_C.sum(), -p_N, -(logp_tail_C - logq_tail_C).exp()


def _reverse_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(student || teacher), as above."""
    q_N, ratio_N = logq_N.exp(), logq_N - logp_N.clamp(min=MIN_LOG_MASS)
    ratio_C = logq_tail_C - logp_tail_C
    value = (q_N * ratio_N).sum() + (logq_tail_C.exp() * ratio_C).sum()
    return value, q_N * (ratio_N + 1), ratio_C + 1


def _jensen_shannon(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Half KL(teacher || mean) and half KL(student || mean) of both, as above."""
    value, slopes = torch.zeros((), device=logp_N.device), []
    for logp, logq in ((logp_N, logq_N), (logp_tail_C, logq_tail_C)):
        logm = torch.logaddexp(logp, logq) - math.log(2)
        p_terms = (logp.exp() * (logp - logm)).masked_fill_(logp.exp() == 0, 0.0)
        value = value + 0.5 * (p_terms.sum() + (logq.exp() * (logq - logm)).sum())
        slopes.append(0.5 * (logq - logm))
    return value, logq_N.exp() * slopes[0], slopes[1]


_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}
