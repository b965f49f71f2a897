"""The losses of one chunk of positions and their gradient with respect to its logits, computed in place of the logits.

Legend: C positions of the chunk, R of a piece of it, V vocabulary, N kept tokens of all positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from retort.losses.position_weights import weigh_rows
from retort.losses.sparse_divergences import Divergences, compute_divergences
from retort.losses.teacher_rows import ChunkRows, RowsPiece
from retort.losses.terms import MIN_LOG_MASS, LossSettings

_PIECES = 8  # of a chunk at T other than 1


def compute_chunk(
    logits_CV: Tensor, labels_C: Tensor, teacher: ChunkRows | None, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's summed hard loss [], its divergence [] without the factor T^2, and the gradient [C, V].

    logits_CV (contiguous, float32 at least) are after the model's scale and softcap; the gradient is that of the total
    with respect to the logits before them. It overwrites logits_CV: memory holds one [C, V], at a temperature other
    than 1 an eighth more, and with a softcap its derivative too. `teacher`: at T; None for alpha 1.
    """
    alpha = settings.alpha
    softcap_grad_CV = None
    if settings.softcap:  # the derivative of c tanh(x / c) is 1 - tanh(x / c)^2
        softcap_grad_CV = (logits_CV / settings.softcap).square_().neg_().add_(1)
    label_logits_C = logits_CV.gather(1, labels_C[:, None])[:, 0]
    if teacher is None:
        lse_C = _replace_by_softmax(logits_CV, logits_CV.amax(dim=-1), alpha)
        divergence = lse_C.new_zeros(())
    elif settings.temperature == 1.0:
        divergence, lse_C = _compute_at_one(logits_CV, labels_C, teacher, settings)
    elif settings.temperature == 2.0:
        divergence, lse_C = _compute_at_two(logits_CV, labels_C, teacher, settings)
    else:
        divergence, lse_C = _compute_tempered(logits_CV, labels_C, teacher, settings)
    hard, grad_CV = (lse_C - label_logits_C).sum(), logits_CV
    if alpha > 0:
        grad_CV.scatter_add_(1, labels_C[:, None], grad_CV.new_full((len(grad_CV), 1), -alpha))
    if softcap_grad_CV is not None:
        grad_CV *= softcap_grad_CV
    if settings.scale != 1.0:
        grad_CV *= settings.scale
    return hard, divergence, grad_CV


def _replace_by_softmax(logits_CV: Tensor, max_C: Tensor, alpha: float) -> Tensor:
    """Return logsumexp of the logits [C], which alpha * softmax overwrites: cross-entropy's gradient but for the
    labels' own entries."""
    exp_CV = logits_CV.sub_(max_C[:, None]).exp_()
    sum_C = exp_CV.sum(dim=-1)
    exp_CV *= (alpha / sum_C)[:, None]
    return max_C + sum_C.log()


def _compute_at_one(
    logits_CV: Tensor, labels_C: Tensor, teacher: ChunkRows, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Return the summed divergence [] and logsumexp of the logits [C] at T = 1, where one softmax serves both losses.

    The gradient overwrites the logits: all but what cross-entropy has at the labels.
    """
    flat, max_C = logits_CV.view(-1), logits_CV.amax(dim=-1)
    logits_N = flat[teacher.flat_N]
    exp_CV = logits_CV.sub_(max_C[:, None]).exp_()
    # The tail is added up: 1 minus the kept mass would lose a small tail to rounding.
    flat[teacher.flat_N] = 0.0
    tail_C = exp_CV.sum(dim=-1)
    soft = _compute_soft(logits_N, max_C, tail_C, labels_C, teacher, settings, settings.alpha)
    exp_CV *= soft.factors[:, None]
    flat[teacher.flat_N] = soft.kept_grads
    return soft.divergence, soft.logsumexp


def _compute_at_two(
    logits_CV: Tensor, labels_C: Tensor, teacher: ChunkRows, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Return and overwrite the same at T = 2; the logsumexp is that of the logits at T = 1.

    exp(x) is the square of exp(x / 2), so that one exponential serves both losses.
    """
    flat, max_C = logits_CV.view(-1), logits_CV.amax(dim=-1)
    logits_N = flat[teacher.flat_N]
    exp_CV = logits_CV.sub_(max_C[:, None]).div_(2.0).exp_()
    flat[teacher.flat_N] = 0.0
    tail_C = exp_CV.sum(dim=-1)
    soft = _compute_soft(
        logits_N / 2.0, max_C / 2.0, tail_C, labels_C, teacher, settings, alpha=0.0
    )
    hard_N = (logits_N - max_C[teacher.rows_N]).exp()
    hard_sum_C = torch.linalg.vector_norm(exp_CV, dim=-1).square() + teacher.sum_rows(hard_N)
    hard_C = settings.alpha / hard_sum_C
    # A whole copy would be the greatest memory of a step.
    pieces = zip(*(rows.chunk(_PIECES) for rows in (exp_CV, hard_C, soft.factors)), strict=True)
    for exp_RV, hard_R, soft_R in pieces:
        exp_RV *= (exp_RV * hard_R[:, None]).add_(soft_R[:, None])
    flat[teacher.flat_N] = soft.kept_grads + hard_C[teacher.rows_N] * hard_N
    return soft.divergence, max_C + hard_sum_C.log()


def _compute_tempered(
    logits_CV: Tensor, labels_C: Tensor, teacher: ChunkRows, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Return and overwrite the same at another T; the logsumexp is that of the logits at T = 1.

    A whole copy of the logits at T would be the greatest memory of a step. So it is made of a piece of the rows at a
    time, and twice: for the tails' sums, which the comparison takes of all rows, and for the gradient.
    """
    temperature = settings.temperature
    flat, max_C = logits_CV.view(-1), logits_CV.amax(dim=-1)
    logits_N, tempered_max_C = flat[teacher.flat_N] / temperature, max_C / temperature
    pieces = teacher.cut(_PIECES)
    buffer_RV = torch.empty_like(logits_CV[: max(len(max_C[piece.rows]) for piece in pieces)])

    def exponentiate(piece: RowsPiece) -> Tensor:
        exp_RV = buffer_RV[: piece.rows.stop - piece.rows.start]
        torch.div(logits_CV[piece.rows], temperature, out=exp_RV)
        return exp_RV.sub_(tempered_max_C[piece.rows, None]).exp_()

    tail_C, lse_C = torch.empty_like(max_C), torch.empty_like(max_C)
    for piece in pieces:
        exp_RV = exponentiate(piece)
        exp_RV.view(-1)[piece.indices] = 0.0
        torch.sum(exp_RV, dim=-1, out=tail_C[piece.rows])
    soft = _compute_soft(logits_N, tempered_max_C, tail_C, labels_C, teacher, settings, alpha=0.0)
    for piece in pieces:
        grad_RV = exponentiate(piece).mul_(soft.factors[piece.rows, None])
        grad_RV.view(-1)[piece.indices] = soft.kept_grads[piece.tokens]
        rows_RV = logits_CV[piece.rows]
        lse_C[piece.rows] = _replace_by_softmax(rows_RV, max_C[piece.rows], settings.alpha)
        rows_RV += grad_RV
    return soft.divergence, lse_C


class _Soft(NamedTuple):
    """The summed divergence [], logsumexp of the logits at T [C], and the soft loss's gradient with respect to the
    logits at T = 1: factors [C] of exp(logits at T - their max), and the kept tokens' own values [N]."""

    divergence: Tensor
    logsumexp: Tensor
    factors: Tensor
    kept_grads: Tensor


def _compute_soft(
    logits_N: Tensor,
    max_C: Tensor,
    tail_C: Tensor,
    labels_C: Tensor,
    teacher: ChunkRows,
    settings: LossSettings,
    alpha: float,
) -> _Soft:
    """Return the soft loss from the kept tokens' logits at T, each row's max, and the tails' sums of exp(logits - max).

    With `alpha` above 0 the gradient includes alpha * softmax.
    """
    sum_C = tail_C + teacher.sum_rows((logits_N - max_C[teacher.rows_N]).exp())
    lse_C = max_C + sum_C.log()
    logq_N, tail_q_C = logits_N - lse_C[teacher.rows_N], tail_C / sum_C
    weights_C = None
    if settings.position_weights is not None:
        weights_C = weigh_rows(
            settings.position_weights, teacher, labels_C, vocabulary=teacher.vocabulary
        )
    compare = _compare if teacher.mix is None else _compare_members
    found = compare(teacher, logq_N, tail_q_C, weights_C, settings)
    weight = (1 - settings.alpha) * settings.temperature  # T^2 of the loss, 1 / T of its logits
    q_N, mean_grad_N = logq_N.exp(), found.mean_grads[teacher.rows_N]
    return _Soft(
        found.divergence,
        lse_C,
        (alpha + weight * (found.tail_grads - found.mean_grads)) / sum_C,
        alpha * q_N + weight * (found.q_grads - q_N * mean_grad_N),
    )


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
