"""Divergences between a teacher's kept tokens with one bucket for all others (the tail) and a student, with gradients.

Legend: C positions, N kept tokens of all positions.

With u = z / T the student's logits at temperature T, q = softmax(u), kept tokens k of teacher probability p_k and a
tail of teacher mass p_t and student mass q_t = sum of q_j over all other tokens j, any divergence f(q_k, q_t) has the
gradient

    df/du_i = q_i (g_i - G),   g_k = df/dq_k,  g_j = df/dq_t for all others,  G = sum of q_k g_k + q_t g_t

that is, q_i times one number a row, and corrections at the kept tokens. Each function takes natural logs, kept tokens
[N] and tails [C].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from retort.losses.terms import MIN_LOG_MASS, LossSettings


class Divergences(NamedTuple):
    """What each kept token [N] and each tail [C] adds to the divergence, q_k g_k [N], and g_t [C]."""

    kept: Tensor
    tails: Tensor
    q_grads: Tensor
    tail_grads: Tensor


def forward_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> Divergences:
    """KL(teacher || student)."""
    p_N, p_tail_C = logp_N.exp(), logp_tail_C.exp()
    terms_N = (p_N * (logp_N - logq_N)).masked_fill_(p_N == 0, 0.0)
    terms_C = p_tail_C * (logp_tail_C - logq_tail_C)
    return Divergences(terms_N, terms_C, -p_N, -(logp_tail_C - logq_tail_C).exp())


def reverse_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> Divergences:
    """KL(student || teacher); a teacher's probability counts as exp(-30) at least."""
    q_N, ratio_N = logq_N.exp(), logq_N - logp_N.clamp(min=MIN_LOG_MASS)
    ratio_C = logq_tail_C - logp_tail_C
    terms_C = logq_tail_C.exp() * ratio_C
    return Divergences(q_N * ratio_N, terms_C, q_N * (ratio_N + 1), ratio_C + 1)


def jensen_shannon(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> Divergences:
    """Half KL(teacher || mean) plus half KL(student || mean), with the mean of both distributions."""
    terms, grads = [], []
    for logp, logq in ((logp_N, logq_N), (logp_tail_C, logq_tail_C)):
        logm = torch.logaddexp(logp, logq) - math.log(2)
        p_terms = (logp.exp() * (logp - logm)).masked_fill_(logp.exp() == 0, 0.0)
        terms.append(0.5 * (p_terms + logq.exp() * (logq - logm)))
        grads.append(0.5 * (logq - logm))
    return Divergences(terms[0], terms[1], logq_N.exp() * grads[0], grads[1])


def total_variation(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> Divergences:
    """Half the sum of |p - q|; where they are equal, the gradient is 0."""
    q_N, gap_N = logq_N.exp(), logq_N.exp() - logp_N.exp()
    gap_C = logq_tail_C.exp() - logp_tail_C.exp()
    return Divergences(
        0.5 * gap_N.abs(), 0.5 * gap_C.abs(), 0.5 * q_N * gap_N.sign(), 0.5 * gap_C.sign()
    )


def skew_forward_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor, *, skew: float
) -> Divergences:
    """KL(teacher || a teacher + (1 - a) student), a = skew."""
    terms, grads = [], []
    for logp, logq in ((logp_N, logq_N), (logp_tail_C, logq_tail_C)):
        logm = torch.logaddexp(logp + math.log(skew), logq + math.log1p(-skew))
        terms.append((logp.exp() * (logp - logm)).masked_fill_(logp.exp() == 0, 0.0))
        grads.append(-(1 - skew) * (logp - logm).exp())
    return Divergences(terms[0], terms[1], logq_N.exp() * grads[0], grads[1])


def skew_reverse_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor, *, skew: float
) -> Divergences:
    """KL(student || (1 - a) teacher + a student), a = skew."""
    terms, grads = [], []
    for logp, logq in ((logp_N, logq_N), (logp_tail_C, logq_tail_C)):
        ratio = logq - torch.logaddexp(logp + math.log1p(-skew), logq + math.log(skew))
        terms.append(logq.exp() * ratio)
        grads.append(ratio + 1 - skew * ratio.exp())
    return Divergences(terms[0], terms[1], logq_N.exp() * grads[0], grads[1])


_PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Divergences]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}


def compute_divergences(
    logp_N: Tensor,
    logq_N: Tensor,
    logp_tail_C: Tensor,
    logq_tail_C: Tensor,
    settings: LossSettings,
) -> Divergences:
    """Return the divergence that the settings name."""
    logs = logp_N, logq_N, logp_tail_C, logq_tail_C
    if settings.divergence == "skew_forward_kl":
        return skew_forward_kl(*logs, skew=settings.skew)
    if settings.divergence == "skew_reverse_kl":
        return skew_reverse_kl(*logs, skew=settings.skew)
    return _PLAIN[settings.divergence](*logs)
