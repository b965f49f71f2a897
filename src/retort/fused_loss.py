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

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.losses import MIN_LOG_MASS, LossTerms


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


@dataclass(frozen=True)
class LossSettings:
    """total = alpha hard + (1 - alpha) T^2 divergence; logits are softcap(scale * features @ weight + bias)."""

    alpha: float
    temperature: float = 1.0
    divergence: str = "forward_kl"
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None  # positions; None: see choose_chunk_size


def choose_chunk_size(vocabulary: int) -> int:
    """Return how many positions go through the head at once: 2 million logits' worth, 64 at least."""
    return max(64, (1 << 21) // vocabulary)


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


def compute_fused_loss(
    features_PD: Tensor,
    weight_VD: Tensor,
    labels_P: Tensor,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    bias_V: Tensor | None = None,
    normalizer: Tensor | float = 1.0,
) -> LossTerms:
    """Return the summed losses over `normalizer`; the total's gradients are ready when it returns.

    Under autocast the head runs in its type, everything behind the logits in float32. `teacher` None: alpha is 1.
    """
    tempered = _temper(teacher, settings)
    total, hard, soft = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        features_PD, weight_VD, bias_V, labels_P, tempered, settings, normalizer
    )
    return LossTerms(total=total, hard=hard, soft=None if tempered is None else soft)


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = features_PD.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else weight_VD.dtype
        )
        wants = ctx.needs_input_grad[:3]
        grads = _Gradients(features_PD, weight_VD, bias_V, dtype=dtype) if any(wants) else None
        chunk = settings.chunk_size or choose_chunk_size(len(weight_VD))
        hard = torch.zeros((), device=features_PD.device)
        soft = torch.zeros((), device=features_PD.device)
        with torch.autocast(device, enabled=False):
            weight = weight_VD.to(dtype)
            bounds = list(range(0, len(features_PD), chunk))
            pieces = _cut(tempered, [*bounds, len(features_PD)], len(weight))
            for first, sparse in zip(bounds, pieces, strict=True):
                rows = slice(first, first + chunk)
                hidden_CD = features_PD[rows].to(dtype)
                logits_CV = _compute_logits(hidden_CD, weight, bias_V, settings)
                chunk_hard, chunk_soft, grad_CV = _compute_chunk(
                    logits_CV, labels_P[rows], sparse, settings
                )
                hard += chunk_hard
                soft += chunk_soft
                if grads is not None:
                    grads.add(rows, grad_CV.div_(normalizer), hidden_CD, weight, wants)
        ctx.grads = grads
        hard, soft = hard / normalizer, soft / normalizer
        total = settings.alpha * hard + (1 - settings.alpha) * soft
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*grads.scaled(grad_total, ctx.needs_input_grad[:3]), *[None] * 4)


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
    total, hard, soft = _LossOfLogits.apply(  # type: ignore[no-untyped-call]
        logits_PV, labels_P, sparse, plain, normalizer
    )
    return LossTerms(total=total, hard=hard, soft=None if sparse is None else soft)


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        with torch.autocast(logits_PV.device.type, enabled=False):
            hard, soft, ctx.grad = _compute_chunk(
                logits_PV.to(dtype, copy=True), labels_P, sparse, settings
            )
            ctx.grad.div_(normalizer)
            hard, soft = hard / normalizer, soft / normalizer
            total = settings.alpha * hard + (1 - settings.alpha) * soft
        ctx.dtype = logits_PV.dtype
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        return (grad.mul_(grad_total).to(ctx.dtype), None, None, None, None)


class _Gradients:
    """Sums of what the chunks give: features in their own type, weight and bias in float32 at least."""

    def __init__(
        self, features_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, dtype: torch.dtype
    ) -> None:
        self.features = torch.empty_like(features_PD)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        self.weight = torch.zeros_like(weight_VD, dtype=sum_dtype)
        self.weight_dtype = weight_VD.dtype
        self.bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=sum_dtype)

    def add(
        self,
        rows: slice,
        grad_CV: Tensor,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        wants: tuple[bool, ...],
    ) -> None:
        """Add a chunk's, from the gradient with respect to its logits."""
        if self.bias is not None and wants[2]:
            self.bias += grad_CV.sum(dim=0)
        grad_CV = grad_CV.to(hidden_CD.dtype)
        if wants[0]:
            self.features[rows] = grad_CV @ weight_VD
        if wants[1] and grad_CV.dtype == self.weight.dtype:
            self.weight.addmm_(grad_CV.t(), hidden_CD)
        elif wants[1]:
            self.weight += grad_CV.t() @ hidden_CD

    def scaled(self, factor: Tensor, wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Return the wanted ones times `factor`, in their parameters' types."""
        found = (self.features, self.weight, self.bias)
        for tensor, wanted in zip(found, wants, strict=True):
            if wanted and tensor is not None:
                tensor.mul_(factor)
        weight = self.weight.to(self.weight_dtype)
        ready = (self.features, weight, self.bias)
        return tuple(t if wanted else None for t, wanted in zip(ready, wants, strict=True))


def _compute_logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, settings: LossSettings
) -> Tensor:
    """Return a chunk's logits, float32 at least, after the model's own scale and softcap."""
    logits_CV = hidden_CD @ weight_VD.t()
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
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


def _cut(teacher: TeacherRows | None, bounds: list[int], vocabulary: int) -> list[_Sparse | None]:
    """Return the teacher's part in each chunk; `bounds`: where chunks begin, and the end of the last."""
    if teacher is None:
        return [None] * (len(bounds) - 1)
    firsts = teacher.offsets[torch.tensor(bounds, device=teacher.offsets.device)].tolist()
    pieces: list[_Sparse | None] = []
    for i, (first, stop) in enumerate(pairwise(bounds)):
        tokens = slice(firsts[i], firsts[i + 1])
        piece = TeacherRows(
            teacher.offsets[first : stop + 1] - firsts[i],
            teacher.ids[tokens],
            teacher.logprobs[tokens],
            teacher.tail_logprobs[first:stop],
        )
        pieces.append(_Sparse(piece, vocabulary))
    return pieces


def _exponentiate(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(logits - row's greatest) in place of the logits, and the greatest [C]."""
    best_C = logits_CV.amax(dim=-1)
    return logits_CV.sub_(best_C[:, None]).exp_(), best_C


def _compute_chunk(
    logits_CV: Tensor, labels_C: Tensor, sparse: _Sparse | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's summed hard and soft loss, and the total's gradient before scale and softcap [C, V].

    The gradient overwrites the logits: no more than one [C, V] is held at T = 1, two at another temperature.
    """
    alpha, temperature = settings.alpha, settings.temperature
    slope_CV = 1 - (logits_CV / settings.softcap).square_() if settings.softcap else None
    label_logits_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    tempered_CV = logits_CV / temperature if sparse and temperature != 1.0 else None
    if sparse and tempered_CV is None:
        soft, grad_CV, lse_C = _compute_soft(logits_CV, sparse, settings, alpha)
    else:
        grad_CV, best_C = _exponentiate(logits_CV)
        sum_C = grad_CV.sum(dim=-1)
        lse_C = best_C + sum_C.log()
        soft = torch.zeros_like(lse_C.sum())
        grad_CV *= (alpha / sum_C)[:, None]
    hard = (lse_C - label_logits_C).sum()
    if sparse and tempered_CV is not None:
        soft, soft_grad_CV, _ = _compute_soft(tempered_CV, sparse, settings, 0.0)
        grad_CV += soft_grad_CV
    if alpha > 0:
        grad_CV.scatter_add_(1, labels_C[:, None], grad_CV.new_full((len(grad_CV), 1), -alpha))
    if slope_CV is not None:
        grad_CV *= slope_CV
    if settings.scale != 1.0:
        grad_CV *= settings.scale
    return hard, soft, grad_CV


def _compute_soft(
    logits_CV: Tensor, sparse: _Sparse, settings: LossSettings, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return T^2 times the summed divergence, its gradient, and log of the sum of exponentials [C].

    logits_CV are at temperature T; the gradient, with respect to those at 1, overwrites them. `alpha` above 0: the
    gradient of cross-entropy, which is of the same softmax, is in it but for the labels' own.
    """
    flat = logits_CV.view(-1)
    logits_N = flat[sparse.places_N]
    sums_CV, best_C = _exponentiate(logits_CV)
    flat[sparse.places_N] = (
        0.0  # the tail is added up: one minus the others would lose what is small
    )
    tail_C = sums_CV.sum(dim=-1)
    sum_C = tail_C + sparse.sum_rows((logits_N - best_C[sparse.rows_N]).exp())
    lse_C = best_C + sum_C.log()
    logq_N, tail_q_C = logits_N - lse_C[sparse.rows_N], tail_C / sum_C
    has_tail_C = tail_q_C.log() > MIN_LOG_MASS
    values, kept_N, tail_slope_C = _DIVERGENCES[settings.divergence](
        sparse.logprobs_N, logq_N, sparse.tail_C, tail_q_C.log().clamp(min=MIN_LOG_MASS)
    )
    tail_slope_C = torch.where(has_tail_C, tail_slope_C, 0.0)
    mean_C = sparse.sum_rows(kept_N) + tail_q_C * tail_slope_C
    weight = (1 - settings.alpha) * settings.temperature  # T^2 of the loss, 1 / T of its logits
    sums_CV *= ((alpha + weight * (tail_slope_C - mean_C)) / sum_C)[:, None]
    q_N = logq_N.exp()
    flat[sparse.places_N] = alpha * q_N + weight * (kept_N - q_N * mean_C[sparse.rows_N])
    return settings.temperature**2 * values, sums_CV, lse_C


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
        logm = torch.logaddexp(logp, logq) - _LOG_2
        p_terms = (logp.exp() * (logp - logm)).masked_fill_(logp.exp() == 0, 0.0)
        value = value + 0.5 * (p_terms.sum() + (logq.exp() * (logq - logm)).sum())
        slopes.append(0.5 * (logq - logm))
    return value, logq_N.exp() * slopes[0], slopes[1]


_LOG_2 = 0.6931471805599453
_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}
