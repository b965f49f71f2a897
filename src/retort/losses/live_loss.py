"""The losses against a live teacher, over the whole vocabulary, from the logits of both.

Legend: P positions, V vocabulary.
"""

from torch import Tensor

from retort.losses.position_weights import weigh_dense
from retort.losses.terms import (
    LossSettings,
    LossTerms,
    combine,
    compute_dense_divergence,
    compute_hard_loss,
)


def compute_live_loss(
    logits_PV: Tensor,
    labels_P: Tensor,
    teacher_logits_PV: Tensor,
    settings: LossSettings,
    *,
    normalizer: Tensor | float = 1.0,
) -> LossTerms:
    """Return the losses, summed over positions and divided by `normalizer`; labels_P: int64 token ids.

    teacher_logits_PV: without a gradient, on any device; they may be of fewer ids.
    """
    teacher_logits_PV = teacher_logits_PV.to(logits_PV.device)
    weights_P = None
    if settings.position_weights is not None:
        logp_PV = (teacher_logits_PV.float() / settings.temperature).log_softmax(dim=-1)
        width = logits_PV.shape[1]
        weights_P = weigh_dense(settings.position_weights, logp_PV, labels_P, vocabulary=width)
    hard = compute_hard_loss(logits_PV, labels_P)
    divergence = compute_dense_divergence(
        logits_PV,
        teacher_logits_PV,
        temperature=settings.temperature,
        divergence=settings.divergence,
        skew=settings.skew,
        weights_P=weights_P,
    )
    return combine(
        hard / normalizer,
        divergence / normalizer,
        alpha=settings.alpha,
        temperature=settings.temperature,
    )
