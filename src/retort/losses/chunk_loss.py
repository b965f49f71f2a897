"""The losses of one chunk of positions and their gradient with respect to its logits, computed in place of the logits.

Legend: C positions of the chunk, V vocabulary, N kept tokens of all its positions.
"""

import torch
from torch import Tensor

from retort.losses.position_weights import weigh_rows
from retort.losses.sparse_divergences import Divergences, compute_divergences
from retort.losses.teacher_rows import ChunkRows
from retort.losses.terms import MIN_LOG_MASS, LossSettings


def compute_chunk(
    logits_CV: Tensor, labels_C: Tensor, teacher: ChunkRows | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's summed hard loss [], its divergence [] without the factor T^2, and the gradient [C, V].

    logits_CV (float32 at least) are after the model's scale and softcap; the gradient is that of the total with
    respect to the logits before them. It overwrites logits_CV: memory holds one [C, V] at T = 1, two at another T.
    `teacher`: at T; None for alpha 1.
    """
    alpha, temperature = settings.alpha, settings.temperature
    # The derivative of c tanh(x / c) is 1 - tanh(x / c)^2.
    softcap_grad_CV = 1 - (logits_CV / settings.softcap).square_() if settings.softcap else None
    label_logits_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    tempered_CV = logits_CV / temperature if teacher and temperature != 1.0 else None
    if teacher and tempered_CV is None:
        divergence, grad_CV, lse_C = _compute_soft(logits_CV, labels_C, teacher, settings, alpha)
    else:
        grad_CV, max_C = _exponentiate(logits_CV)
        sum_C = grad_CV.sum(dim=-1)
        lse_C = max_C + sum_C.log()
        divergence = lse_C.new_zeros(())
        grad_CV *= (alpha / sum_C)[:, None]
    hard = (lse_C - label_logits_C).sum()
    if teacher and tempered_CV is not None:
        divergence, soft_grad_CV, _ = _compute_soft(tempered_CV, labels_C, teacher, settings, 0.0)
        grad_CV += soft_grad_CV
    if alpha > 0:
        grad_CV.scatter_add_(1, labels_C[:, None], grad_CV.new_full((len(grad_CV), 1), -alpha))
    if softcap_grad_CV is not None:
        grad_CV *= softcap_grad_CV
    if settings.scale != 1.0:
        grad_CV *= settings.scale
    return hard, divergence, grad_CV


def _compute_soft(
    logits_CV: Tensor,
    labels_C: Tensor,
    teacher: ChunkRows,
    settings: LossSettings,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed divergence [], the soft loss's gradient [C, V], and logsumexp of the logits [C].

    logits_CV are at temperature T; the gradient, with respect to the logits at temperature 1, overwrites them. With
    `alpha` above 0 it includes alpha * softmax: cross-entropy's gradient but for the labels' own entries.
    """
    flat = logits_CV.view(-1)
    logits_N = flat[teacher.flat_N]
    exp_CV, max_C = _exponentiate(logits_CV)
    # The tail is added up: 1 minus the kept mass would lose a small tail to rounding.
    flat[teacher.flat_N] = 0.0
    tail_C = exp_CV.sum(dim=-1)
    sum_C = tail_C + teacher.sum_rows((logits_N - max_C[teacher.rows_N]).exp())
    lse_C = max_C + sum_C.log()
    logq_N, tail_q_C = logits_N - lse_C[teacher.rows_N], tail_C / sum_C
    has_tail_C = tail_q_C.log() > MIN_LOG_MASS
    logq_tail_C = tail_q_C.log().clamp(min=MIN_LOG_MASS)
    found = compute_divergences(teacher.logprobs_N, logq_N, teacher.tail_C, logq_tail_C, settings)
    if settings.position_weights is not None:
        width = logits_CV.shape[1]
        weights_C = weigh_rows(settings.position_weights, teacher, labels_C, vocabulary=width)
        found = _weigh(found, weights_C, teacher.rows_N)
    divergence = found.kept.sum() + found.tails.sum()
    q_grad_N, tail_grad_C = found.q_grads, found.tail_grads
    tail_grad_C = torch.where(has_tail_C, tail_grad_C, 0.0)
    mean_grad_C = teacher.sum_rows(q_grad_N) + tail_q_C * tail_grad_C
    weight = (1 - settings.alpha) * settings.temperature  # T^2 of the loss, 1 / T of its logits
    exp_CV *= ((alpha + weight * (tail_grad_C - mean_grad_C)) / sum_C)[:, None]
    q_N = logq_N.exp()
    flat[teacher.flat_N] = alpha * q_N + weight * (q_grad_N - q_N * mean_grad_C[teacher.rows_N])
    return divergence, exp_CV, lse_C


def _weigh(found: Divergences, weights_C: Tensor, rows_N: Tensor) -> Divergences:
    """Return the divergences and gradients times the weight of their position: both are linear in them."""
    weights_N = weights_C[rows_N]
    return Divergences(
        found.kept * weights_N,
        found.tails * weights_C,
        found.q_grads * weights_N,
        found.tail_grads * weights_C,
    )


def _exponentiate(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(logits - row's max) [C, V] in place of the logits, and the max [C]."""
    max_C = logits_CV.amax(dim=-1)
    return logits_CV.sub_(max_C[:, None]).exp_(), max_C
