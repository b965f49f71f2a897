"""The losses: pure functions of tensors, in nats, summed over positions (the caller divides by their number).

Legend: P counted positions, V vocabulary.

    total_loss = alpha * hard_loss + (1 - alpha) * soft_loss         alpha weighs the *hard* loss
    hard_loss  = - log q(y)                                          y: the token of the text
    soft_loss  = T^2 * KL(p_T || q_T)                                p: teacher, q: student, at temperature T
                 (or another divergence instead of KL, and with a weight at each position, see `position_weights`)

The factor T^2 keeps the soft gradient's size independent of T (Hinton, Vinyals, Dean: Distilling the Knowledge in a
Neural Network, 2015, section 2). From a cache, KL is taken over the kept tokens and one bucket for all others (module
`sparse_divergences`): never renormalised over the kept ones, which would teach the student to be over-confident (a
top-k bias).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A mass below exp(-30) = 1e-13 is no information in float32; the floor keeps its log and gradient finite.
MIN_LOG_MASS = -30.0


@dataclass(frozen=True)
class LossSettings:
    """total = alpha hard + (1 - alpha) T^2 divergence; logits are softcap(scale * (features @ weight + bias)).

    divergence: see `compute_dense_divergence`; softcap(x) = c tanh(x / c); chunk_size: positions that go through the
    head at once, None: `fused_loss.choose_chunk_size`; skew: of the skewed divergences; position_weights: a kind of
    `position_weights`, None: all are 1; alpha_end, temperature_end: at the last step, None: those of all steps; stored:
    the temperatures that there are, empty: any.
    """

    alpha: float
    temperature: float = 1.0
    divergence: str = "forward_kl"
    scale: float = 1.0
    softcap: float | None = None
    chunk_size: int | None = None
    skew: float = 0.1
    position_weights: str | None = None
    alpha_end: float | None = None
    temperature_end: float | None = None
    stored: tuple[float, ...] = ()

    def find_alpha(self, step: int, *, max_steps: int) -> float:
        """Return alpha at a step, of 0 to max_steps - 1: on a straight line to alpha_end."""
        return _interpolate(self.alpha, self.alpha_end, step / max(1, max_steps - 1))

    def find_temperature(self, step: int, *, max_steps: int) -> float:
        """Return the temperature at a step: on a straight line to temperature_end, or the stored one nearest to it."""
        line = _interpolate(self.temperature, self.temperature_end, step / max(1, max_steps - 1))
        return min(self.stored, key=lambda stored: abs(stored - line), default=line)


def _interpolate(first: float, last: float | None, share: float) -> float:
    return first if last is None else (1 - share) * first + share * last


class LossTerms(NamedTuple):
    """Scalars in nats, summed over positions; `soft` includes its factor T^2 and is None without a teacher.

    A tuple, because wrappers for several devices (DDP, FSDP) look for tensors in a model's output.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor | None


def compute_hard_loss(logits_PV: Tensor, labels_P: Tensor) -> Tensor:
    """Return the summed cross-entropy [], in float32, with the tokens of the text (labels_P, int64)."""
    return F.cross_entropy(logits_PV.float(), labels_P, reduction="sum")


def compute_dense_divergence(
    logits_PV: Tensor,
    teacher_logits_PV: Tensor,
    *,
    temperature: float,
    divergence: str = "forward_kl",
    skew: float = 0.1,
    weights_P: Tensor | None = None,
) -> Tensor:
    """Return the summed divergence [] at T over the whole vocabulary, in float32, without the factor T^2.

    forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher), where a teacher's probability counts as
    exp(-30) at least; jensen_shannon: half the KL of each from the mean of both; skew_forward_kl: KL(teacher || a
    teacher + (1 - a) student) and skew_reverse_kl: KL(student || (1 - a) teacher + a student), a = `skew` (Ko et al.:
    DistiLLM, arXiv 2402.03898, 2024, section 3.1); total_variation: half the sum of |p - q|. The teacher's vocabulary
    may be narrower: its probability of further ids is 0. weights_P: of each position, None: all are 1.
    """
    missing = logits_PV.shape[1] - teacher_logits_PV.shape[1]
    if missing > 0:
        teacher_logits_PV = F.pad(teacher_logits_PV, (0, missing), value=-torch.inf)
    student_PV = (logits_PV.float() / temperature).log_softmax(dim=-1)
    teacher_PV = (teacher_logits_PV.float() / temperature).log_softmax(dim=-1)
    if divergence == "forward_kl":
        return _sum_kl(teacher_PV, student_PV, weights_P)
    if divergence == "reverse_kl":
        return _sum_kl(student_PV, teacher_PV.clamp(min=MIN_LOG_MASS), weights_P)
    if divergence == "total_variation":
        return 0.5 * _add_up((student_PV.exp() - teacher_PV.exp()).abs(), weights_P)
    if divergence == "skew_forward_kl":
        return _sum_kl(teacher_PV, _mix(teacher_PV, student_PV, skew), weights_P)
    if divergence == "skew_reverse_kl":
        return _sum_kl(student_PV, _mix(student_PV, teacher_PV, skew), weights_P)
    assert divergence == "jensen_shannon", divergence
    mean_PV = torch.logaddexp(teacher_PV, student_PV) - math.log(2)
    sums = (_sum_kl(logp_PV, mean_PV, weights_P) for logp_PV in (teacher_PV, student_PV))
    return 0.5 * sum(sums, torch.zeros((), device=logits_PV.device))


def _mix(one_PV: Tensor, other_PV: Tensor, share: float) -> Tensor:
    """Return the logs of share * one + (1 - share) * other, from the logs of both."""
    return torch.logaddexp(one_PV + math.log(share), other_PV + math.log1p(-share))


def _sum_kl(logp_PV: Tensor, logq_PV: Tensor, weights_P: Tensor | None) -> Tensor:
    terms_PV = logp_PV.exp() * (logp_PV - logq_PV)
    return _add_up(terms_PV.masked_fill(logp_PV == -torch.inf, 0.0), weights_P)  # 0 log 0 = 0


def _add_up(terms_PV: Tensor, weights_P: Tensor | None) -> Tensor:
    return terms_PV.sum() if weights_P is None else (terms_PV.sum(dim=-1) * weights_P).sum()


def combine(hard: Tensor, kl: Tensor | None, *, alpha: float, temperature: float) -> LossTerms:
    """Return total = alpha * hard + (1 - alpha) * T^2 * kl, and its terms; without a `kl`, alpha must be 1."""
    if kl is None:
        assert alpha == 1.0, alpha
        return LossTerms(total=hard, hard=hard, soft=None)
    soft = temperature**2 * kl
    return LossTerms(total=alpha * hard + (1 - alpha) * soft, hard=hard, soft=soft)


def perplexity(loss: float) -> float:
    """Return exp(loss in nats per token), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
