"""Divergences between a teacher's kept tokens with one bucket for all others (the tail) and a student, with gradients.

Legend: C positions, N kept tokens of all positions.

With u = z / T the student's logits at temperature T, q = softmax(u), kept tokens k of teacher probability p_k and a
tail of teacher mass p_t and student mass q_t = sum of q_j over all other tokens j, any divergence f(q_k, q_t) has the
gradient

    df/du_i = q_i (g_i - G),   g_k = df/dq_k,  g_j = df/dq_t for all others,  G = sum of q_k g_k + q_t g_t

that is, q_i times one number a row, and corrections at the kept tokens. Each function takes natural logs, kept tokens
[N] and tails [C], and returns the summed value [], q_k g_k [N] and g_t [C].
"""

import math

import torch
from torch import Tensor

from retort.losses.terms import MIN_LOG_MASS


def forward_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student)."""
    p_N, p_tail_C = logp_N.exp(), logp_tail_C.exp()
    terms_N = (p_N * (logp_N - logq_N)).masked_fill_(p_N == 0, 0.0)
    terms_C = p_tail_C * (logp_tail_C - logq_tail_C)
    return terms_N.sum() + terms_C.sum(), -p_N, -(logp_tail_C - logq_tail_C).exp()


def reverse_kl(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(student || teacher); a teacher's probability counts as exp(-30) at least."""
    q_N, ratio_N = logq_N.exp(), logq_N - logp_N.clamp(min=MIN_LOG_MASS)
    ratio_C = logq_tail_C - logp_tail_C
    value = (q_N * ratio_N).sum() + (logq_tail_C.exp() * ratio_C).sum()
    return value, q_N * (ratio_N + 1), ratio_C + 1


def jensen_shannon(
    logp_N: Tensor, logq_N: Tensor, logp_tail_C: Tensor, logq_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Half KL(teacher || mean) plus half KL(student || mean), with the mean of both distributions."""
    value, grads = torch.zeros((), device=logp_N.device), []
    for logp, logq in ((logp_N, logq_N), (logp_tail_C, logq_tail_C)):
        logm = torch.logaddexp(logp, logq) - math.log(2)
        p_terms = (logp.exp() * (logp - logm)).masked_fill_(logp.exp() == 0, 0.0)
        value = value + 0.5 * (p_terms.sum() + (logq.exp() * (logq - logm)).sum())
        grads.append(0.5 * (logq - logm))
    return value, logq_N.exp() * grads[0], grads[1]


SPARSE_DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
