"""Which tokens of the teacher's distributions are kept: tensors on the teacher's device, arrays from there on.

Legend: P counted positions, V vocabulary, K kept tokens.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.codec import Codec, SparseTargets
from retort.sparse_codec import Selection, draw_uniform
from retort.sparse_streams import TAIL_UNIT, count_drawn


def mask_logprobs(logits_PV: Tensor, *, num_tokens: int) -> Tensor:
    """Return logprobs [P, V]; ids from `num_tokens` (the tokenizer's size) on get probability zero.

    A logit of -inf is a probability of zero. Raises ValueError when one is NaN or +inf, or a whole row -inf.
    """
    if num_tokens < logits_PV.shape[1]:
        logits_PV[:, num_tokens:] = -torch.inf
    best = logits_PV.max(dim=-1)
    if not bool(torch.isfinite(best.values).all()):  # NaN is the greatest of its row
        row = int((~torch.isfinite(best.values)).nonzero()[0])
        column = int(best.indices[row])
        raise ValueError(
            f"the teacher's logit of token {column} is {float(logits_PV[row, column])} at counted position {row} of "
            "its batch. Nothing was stored. Try teacher.dtype: float32, and check the teacher's weights."
        )
    return logits_PV.log_softmax(dim=-1)


def _find_tails(logprobs_PV: Tensor, outside_PV: Tensor, codec: Codec) -> Tensor:
    """Return the log of the mass outside the kept tokens at each temperature, [P, temperatures]."""
    tails = [
        torch.logsumexp(outside_PV / t, dim=-1) - torch.logsumexp(logprobs_PV / t, dim=-1)
        for t in codec.temperatures
    ]
    return torch.stack(tails, dim=-1)


@torch.inference_mode()
def select_top_k(logits_PV: Tensor, codec: Codec, *, num_tokens: int) -> SparseTargets:
    """Keep the K most probable tokens of each row, and the mass of the rest at each temperature.

    Raises ValueError as `mask_logprobs` does.
    """
    assert codec.top_k is not None
    logprobs_PV = mask_logprobs(logits_PV, num_tokens=num_tokens)
    top = logprobs_PV.topk(codec.top_k, dim=-1)
    outside_PV = logprobs_PV.scatter(1, top.indices, -torch.inf)
    return SparseTargets.from_rows(
        top.indices.int().cpu().numpy(),
        top.values.cpu().numpy(),
        tail_logprobs=_find_tails(logprobs_PV, outside_PV, codec).cpu().numpy(),
    )


@torch.inference_mode()
def select_probable(
    logits_PV: Tensor, codec: Codec, *, num_tokens: int, key: bytes, first_position: int
) -> Selection:
    """Keep every token whose probability is at least `codec.min_probability`, the best one in any case; draw others.

    The rows are counted positions `first_position`, ... of the sequence with that content key. Drawing (method
    `sampled`): a comb of n equally spaced points, moved by one random number, is laid over the cumulative mass of the
    other tokens, and a token is drawn where a point falls on it: with probability n p / m, m the mass, and never twice,
    since no p reaches m / n. Each drawn token stands for m / n, so the expectation is p (Madow 1949).
    Raises ValueError as `mask_logprobs` does.
    """
    logprobs_PV = mask_logprobs(logits_PV, num_tokens=num_tokens)
    assert codec.min_probability is not None
    step = codec.draw_step
    least = step / TAIL_UNIT if step else codec.min_probability
    is_exact_PV = logprobs_PV >= math.log(least)
    if not step:  # the best one stands for all where none is probable enough
        is_exact_PV.scatter_(1, logprobs_PV.argmax(dim=-1, keepdim=True), True)
    outside_PV = logprobs_PV.masked_fill(is_exact_PV, -torch.inf)
    tails = _find_tails(logprobs_PV, outside_PV, codec).double().exp().cpu().numpy() * TAIL_UNIT
    tails = np.clip(np.floor(tails) if step else np.rint(tails), 0, TAIL_UNIT).astype(np.int64)
    where = is_exact_PV.nonzero()
    sizes = is_exact_PV.sum(dim=-1).cpu().numpy().astype(np.int64)
    probs = logprobs_PV[is_exact_PV].double().exp().cpu().numpy()
    drawn_sizes = np.array([count_drawn(tail, step) for tail in tails[:, 0].tolist()], np.int64)
    places = np.arange(first_position, first_position + len(sizes))
    drawn_ids = _draw(outside_PV, drawn_sizes, draw_uniform(key, places))
    return Selection(
        sizes, where[:, 1].cpu().numpy().astype(np.int64), probs, drawn_sizes, drawn_ids, tails
    )


def _draw(
    outside_PV: Tensor, drawn_sizes: NDArray[np.int64], uniform_P: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the ids drawn of logprobs [P, V], row after row."""
    if drawn_sizes.sum() == 0:
        return np.empty(0, np.int64)
    rest_PV = outside_PV.exp()
    cumulative_PV = rest_PV.cumsum(dim=-1)
    total_P1 = cumulative_PV[:, -1:]
    sizes_P = torch.from_numpy(drawn_sizes).to(rest_PV.device)
    comb_N = torch.arange(int(sizes_P.max()), device=rest_PV.device)
    offset_P = torch.as_tensor(uniform_P, device=rest_PV.device, dtype=torch.float64)
    share_PN = (comb_N[None] + offset_P[:, None]) / sizes_P[:, None].clamp(min=1)
    points_PN = (share_PN * total_P1.double()).to(rest_PV.dtype).minimum(total_P1 * (1 - 1e-6))
    ids_PN = torch.searchsorted(cumulative_PV, points_PN, right=True)
    is_used_PN = comb_N[None] < sizes_P[:, None]
    ids = ids_PN[is_used_PN].cpu().numpy().astype(np.int64)
    return _separate(ids, np.repeat(np.arange(len(drawn_sizes)), drawn_sizes), rest_PV)


def _separate(
    ids: NDArray[np.int64], rows: NDArray[np.int64], rest_PV: Tensor
) -> NDArray[np.int64]:
    """Replace an id that rounding drew twice by the row's most probable one that was not drawn.

    Seen for probabilities within 1e-6 of the step only.
    """
    for place in np.flatnonzero((ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1])) + 1:
        free_V = rest_PV[rows[place]].clone()
        free_V[torch.from_numpy(ids[rows == rows[place]]).to(free_V.device)] = 0.0
        ids[place] = int(free_V.argmax())
    return ids
