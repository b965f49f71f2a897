"""The losses: pure functions of tensors, in nats, summed over positions (the caller divides by their number).

Legend: P counted positions, V vocabulary, K kept teacher tokens.

    total_loss = alpha * hard_loss + (1 - alpha) * soft_loss         alpha weighs the *hard* loss
    hard_loss  = - log q(y)                                          y: the token of the text
    soft_loss  = T^2 * KL(p_T || q_T)                                p: teacher, q: student, at temperature T

The factor T^2 keeps the soft gradient's size independent of T (Hinton, Vinyals, Dean: Distilling the Knowledge in a
Neural Network, 2015, section 2). From a cache, KL is taken over the K kept tokens and one bucket for all others:
never renormalised over the K, which would teach the student to be over-confident (a top-k bias).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# A bucket's mass below exp(-30) = 1e-13 is no information in float32; the floor keeps its log and gradient finite.
_MIN_LOG_MASS = -30.0


@dataclass(frozen=True)
class LossTerms:
    """Sums over positions, in nats; `soft` carries its factor T^2 and is None where there is no teacher."""

    total: Tensor
    hard: Tensor
    soft: Tensor | None


def compute_hard_loss(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    """Return the summed cross-entropy of float32 logits with the text's own tokens."""
    return F.cross_entropy(logits_PV.float(), targets_P, reduction="sum")


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0 (Maechler, Accurately Computing log(1 - exp(-|a|)), 2012)."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def temper_head(top_k_logprobs_PK: Tensor, tail_logprob_P: Tensor, temperature: float) -> Tensor:
    """Return the kept tokens' logprobs at T [P, K], from those at T = 1 and the tail's logprob at T [P].

    softmax(z / T) of the kept tokens is proportional to p^(1/T); their sum is what the tail at T leaves.
    """
    scaled_PK = top_k_logprobs_PK / temperature
    head_mass = log1mexp(tail_logprob_P.clamp(max=-1e-7))
    return scaled_PK - torch.logsumexp(scaled_PK, dim=-1, keepdim=True) + head_mass[:, None]


def compute_sparse_kl(
    logits_PV: Tensor,
    top_k_ids_PK: Tensor,
    top_k_logprobs_PK: Tensor,
    tail_logprob_P: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Return the summed KL(teacher_T || student_T) over K tokens and the tail bucket, without the factor T^2.

    logits_PV: the student's; top_k_logprobs_PK: the teacher's at T = 1; tail_logprob_P: the teacher's tail at T.
    With K = V there is no tail and this is the KL over the whole vocabulary.
    """
    student_PV = (logits_PV.float() / temperature).log_softmax(dim=-1)
    student_PK = student_PV.gather(1, top_k_ids_PK.long())
    teacher_PK = temper_head(top_k_logprobs_PK.float(), tail_logprob_P.float(), temperature)
    terms_PK = teacher_PK.exp() * (teacher_PK - student_PK)
    # A token of probability zero (a row that keeps fewer than K repeats its first one so) adds nothing.
    kl_P = terms_PK.masked_fill(teacher_PK == -torch.inf, 0.0).sum(dim=-1)
    if top_k_ids_PK.shape[1] < logits_PV.shape[1]:
        outside_PV = student_PV.scatter(1, top_k_ids_PK.long(), -torch.inf)
        student_tail_P = torch.logsumexp(outside_PV, dim=-1).clamp(min=_MIN_LOG_MASS)
        teacher_tail_P = tail_logprob_P.float().clamp(min=_MIN_LOG_MASS)
        kl_P = kl_P + teacher_tail_P.exp() * (teacher_tail_P - student_tail_P)
    return kl_P.sum()


def compute_dense_kl(logits_PV: Tensor, teacher_logits_PV: Tensor, *, temperature: float) -> Tensor:
    """Return the summed KL(teacher_T || student_T) over the whole vocabulary, without the factor T^2."""
    missing = logits_PV.shape[1] - teacher_logits_PV.shape[1]
    if missing > 0:  # a student's layer may be wider than the teacher's
        teacher_logits_PV = F.pad(teacher_logits_PV, (0, missing), value=-torch.inf)
    student_PV = (logits_PV.float() / temperature).log_softmax(dim=-1)
    teacher_PV = (teacher_logits_PV.float() / temperature).log_softmax(dim=-1)
    terms_PV = teacher_PV.exp() * (teacher_PV - student_PV)
    return terms_PV.masked_fill(teacher_PV == -torch.inf, 0.0).sum()  # 0 log 0 = 0


def combine(hard: Tensor, kl: Tensor | None, *, alpha: float, temperature: float) -> LossTerms:
    """Return total = alpha * hard + (1 - alpha) * T^2 * kl, and its terms."""
    if kl is None:
        assert alpha == 1.0, alpha
        return LossTerms(total=hard, hard=hard, soft=None)
    soft = temperature**2 * kl
    return LossTerms(total=alpha * hard + (1 - alpha) * soft, hard=hard, soft=soft)


def perplexity(loss: float) -> float:
    """exp(loss in nats per token), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
