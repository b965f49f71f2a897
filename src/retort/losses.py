"""The losses: pure functions of tensors, in nats, summed over positions (the caller divides by their number).

Legend: P counted positions, V vocabulary.

    total_loss = alpha * hard_loss + (1 - alpha) * soft_loss         alpha weighs the *hard* loss
    hard_loss  = - log q(y)                                          y: the token of the text
    soft_loss  = T^2 * KL(p_T || q_T)                                p: teacher, q: student, at temperature T

The factor T^2 keeps the soft gradient's size independent of T (Hinton, Vinyals, Dean: Distilling the Knowledge in a
Neural Network, 2015, section 2). From a cache, KL is taken over the kept tokens and one bucket for all others (room
`fused_loss`): never renormalised over the kept ones, which would teach the student to be over-confident (a top-k bias).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LossTerms:
    """Sums over positions, in nats; `soft` carries its factor T^2 and is None where there is no teacher."""

    total: Tensor
    hard: Tensor
    soft: Tensor | None


def compute_hard_loss(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    """Return the summed cross-entropy of float32 logits with the text's own tokens."""
    return F.cross_entropy(logits_PV.float(), targets_P, reduction="sum")


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
