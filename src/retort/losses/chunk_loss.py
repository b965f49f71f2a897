"""The losses of one chunk of positions and their gradient with respect to its logits, computed in place of the logits.

Legend: C positions of the chunk, V vocabulary, N kept tokens of all its positions.
"""

from typing import NamedTuple

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
    weights_C = None
    if settings.position_weights is not None:
        width = logits_CV.shape[1]
        weights_C = weigh_rows(settings.position_weights, teacher, labels_C, vocabulary=width)
    compare = _compare if teacher.mix is None else _compare_members
    found = compare(teacher, logq_N, tail_q_C, weights_C, settings)
    weight = (1 - settings.alpha) * settings.temperature  # T^2 of the loss, 1 / T of its logits
    exp_CV *= ((alpha + weight * (found.tail_grads - found.mean_grads)) / sum_C)[:, None]
    q_N, mean_grad_N = logq_N.exp(), found.mean_grads[teacher.rows_N]
    flat[teacher.flat_N] = alpha * q_N + weight * (found.q_grads - q_N * mean_grad_N)
    return found.divergence, exp_CV, lse_C


class _Compared(NamedTuple):
    """A divergence, summed over the chunk [], and its gradients, as in `sparse_divergences`: q_k g_k, g_t and G."""

    divergence: Tensor
    q_grads: Tensor
    tail_grads: Tensor
    mean_grads: Tensor


def _compare(
    teacher: ChunkRows,
    logq_N: Tensor,
    tail_q_C: Tensor,
    weights_C: Tensor | None,
    settings: LossSettings,
) -> _Compared:
    """Compare the student's kept tokens and tails with the teacher's; weights_C: of the positions."""
    has_tail_C = tail_q_C.log() > MIN_LOG_MASS
    logq_tail_C = tail_q_C.log().clamp(min=MIN_LOG_MASS)
    found = compute_divergences(teacher.logprobs_N, logq_N, teacher.tail_C, logq_tail_C, settings)
    if weights_C is not None:
        found = _weigh(found, weights_C, teacher.rows_N)
    divergence = found.kept.sum() + found.tails.sum()
    q_grad_N, tail_grad_C = found.q_grads, found.tail_grads
    tail_grad_C = torch.where(has_tail_C, tail_grad_C, 0.0)
    mean_grad_C = teacher.sum_rows(q_grad_N) + tail_q_C * tail_grad_C
    return _Compared(divergence, q_grad_N, tail_grad_C, mean_grad_C)


def _compare_members(
    teacher: ChunkRows,
    logq_N: Tensor,
    tail_q_C: Tensor,
    weights_C: Tensor | None,
    settings: LossSettings,
) -> _Compared:
    """Return the weighted mean of the comparisons with each teacher, in whose tail is what only others keep."""
    assert settings.divergence == "forward_kl" and weights_C is None, settings
    q_N, sums = logq_N.exp(), [torch.zeros((), device=logq_N.device)] * len(_Compared._fields)
    for weight, member in teacher.split_members():
        is_absent_N = member.logprobs_N == -torch.inf
        own_tail_C = tail_q_C + teacher.sum_rows(torch.where(is_absent_N, q_N, 0.0))
        found = _compare(member, logq_N, own_tail_C, None, settings)
        tail_grad_N = q_N * found.tail_grads[teacher.rows_N]
        found = found._replace(q_grads=torch.where(is_absent_N, tail_grad_N, found.q_grads))
        sums = [total + weight * value for total, value in zip(sums, found, strict=True)]
    return _Compared(*sums)


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
