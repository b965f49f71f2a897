"""Which tokens of the teacher's distributions are kept: tensors on the teacher's device, arrays from there on.

Legend: P counted positions, R of them at once, V vocabulary, W the same rounded up to whole blocks, K kept tokens.

Memory decides the speed, not arithmetic. Microseconds a row on one core at V = 32,768: a softmax into fresh memory
115, into memory that was used before 40; nonzero of a whole row 34, a comparison 22, but the maxima of its blocks 7. So
a few rows are worked on at once, which stay in the processor's cache and take memory that was just freed; and tokens
are looked for only in blocks whose maximum says that there is one. A block is every (W / 16)th token.

Sums reach the cache, so a device adds in one order, run after run: nothing here is on PyTorch's list of operations that
are not deterministic on CUDA (`torch.use_deterministic_algorithms`), as `index_add_` and `cumsum` of floats are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from retort.cache.codec import Codec, SparseTargets
from retort.cache.sparse_codec import Selection
from retort.cache.sparse_streams import TAIL_UNIT, count_sampled

BLOCK = 16
# Rows at once hold 2 MB on a CPU. Microseconds a row of all that select_probable does: 93 with 16 rows at V = 32,768,
# 138 with 64. A GPU takes all: what counts there is how often something is started.
_CPU_ELEMENTS = 1 << 19
_UNITS = float(1 << 62)  # of a probability of one; a row's masses, rounded up, stay below 2^63


def pad_width(vocabulary: int) -> int:
    """Return W, the vocabulary rounded up to whole blocks."""
    return -(-vocabulary // BLOCK) * BLOCK


def _mask(logits_PV: Tensor, *, num_tokens: int) -> Tensor:
    """Return logits [P, W]: ids from `num_tokens` (the tokenizer's size) on get probability zero."""
    width = logits_PV.shape[1]
    if num_tokens < width:
        logits_PV[:, num_tokens:] = -torch.inf
    missing = pad_width(width) - width
    return F.pad(logits_PV, (0, missing), value=-torch.inf) if missing else logits_PV


class NotFiniteError(ValueError):
    """A logit that is NaN or infinite; `row` is its place among the rows that were given."""

    def __init__(self, row: int, token: int, value: float) -> None:
        super().__init__(f"the teacher's logit of token {token} is {value} at row {row}.")
        self.row, self.token, self.value = row, token, value


def _compute_probs(logits_PW: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (place of the first row, logits [R, W], probabilities [R, W]) of so many rows as are worked on at once.

    The probabilities' memory is that of the rows before. A logit of -inf is a probability of zero. Raises
    NotFiniteError when one is NaN or +inf, or a whole row -inf.
    """
    num_rows, width = logits_PW.shape
    at_once = max(1, _CPU_ELEMENTS // width) if logits_PW.device.type == "cpu" else num_rows
    scratch_RW = torch.empty_like(logits_PW[:at_once])
    for start in range(0, num_rows, at_once):
        logits_RW = logits_PW[start : start + at_once]
        probs_RW = torch.softmax(logits_RW, dim=-1, out=scratch_RW[: len(logits_RW)])
        is_number_R = torch.isfinite(probs_RW[:, 0])  # if one is not, none of its row is
        if not bool(is_number_R.all()):
            row = start + int((~is_number_R).nonzero()[0])
            token = int(logits_PW[row].argmax())  # NaN is the greatest
            raise NotFiniteError(row, token, float(logits_PW[row, token]))
        yield start, logits_RW, probs_RW


def _blocks(rows_RW: Tensor) -> Tensor:
    """Return a view [R, 16, W / 16]: the tokens of block b are [:, :, b]."""
    return rows_RW.view(len(rows_RW), BLOCK, -1)


def _find_tails(
    rest_RW: Tensor, logits_RW: Tensor, kept: "_Kept", temperatures: tuple[float, ...]
) -> Tensor:
    """Return the mass outside the kept tokens at each temperature, [R, temperatures]; uses `rest_RW` up.

    rest_RW: probabilities at temperature 1, those of the kept tokens zero.
    """
    tails = {1.0: rest_RW.sum(dim=-1)}
    if 2.0 in temperatures:  # a root is a third of another softmax
        outside_R = rest_RW.sqrt_().sum(dim=-1)
        inside_R = _sum_rows(kept.probs.sqrt(), kept.sizes)
        tails[2.0] = outside_R / (outside_R + inside_R)
    for temperature in set(temperatures) - {1.0, 2.0}:
        torch.softmax(logits_RW / temperature, dim=-1, out=rest_RW)
        rest_RW.view(-1)[kept.places] = 0.0
        tails[temperature] = rest_RW.sum(dim=-1)
    return torch.stack([tails[t] for t in temperatures], dim=-1)


def _sum_rows(values_N: Tensor, sizes_R: Tensor) -> Tensor:
    """Return the sum of each row's values [R], which stand row after row.

    A CPU adds them one after the other; on CUDA one block of threads adds a row (CUB's DeviceSegmentedReduce).
    """
    if len(values_N) == 0:
        return values_N.new_zeros(len(sizes_R))
    # unsafe: the lengths are right, and to check them the CPU would wait for the GPU
    return torch.segment_reduce(values_N, "sum", lengths=sizes_R, unsafe=True)


class _Kept(NamedTuple):
    """N kept tokens, row after row: tokens of each row [R]; place in a view(-1), probability at temperature 1 [N]."""

    sizes: Tensor
    places: Tensor
    probs: Tensor

    @classmethod
    def take(cls, probs_RW: Tensor, rows_N: Tensor, ids_N: Tensor, sizes_R: Tensor) -> "_Kept":
        """Take tokens out of the probabilities, which are zero there afterwards; `rows_N` ascends."""
        places_N = rows_N * probs_RW.shape[1] + ids_N
        probs_N = probs_RW.view(-1)[places_N]
        probs_RW.view(-1)[places_N] = 0.0
        return cls(sizes_R, places_N, probs_N)


@torch.inference_mode()
def select_top_k(logits_PV: Tensor, codec: Codec, *, num_tokens: int) -> SparseTargets:
    """Keep the K most probable tokens of each row, and the mass of the rest at each temperature.

    Raises NotFiniteError as `_compute_probs` does.
    """
    assert codec.top_k is not None
    logits_PW = _mask(logits_PV, num_tokens=num_tokens)
    ids, logprobs, tails = [], [], []
    for _, logits_RW, probs_RW in _compute_probs(logits_PW):
        best_RK, ids_RK = _find_top_k(logits_RW, codec.top_k, codec.vocabulary)
        # log sum exp, from the probability of the best
        total_R1 = best_RK[:, :1] - probs_RW.gather(1, ids_RK[:, :1]).log()
        rows_R = torch.arange(len(ids_RK), device=ids_RK.device)
        sizes_R = torch.full_like(rows_R, codec.top_k)
        rows_N = rows_R.repeat_interleave(codec.top_k)
        kept = _Kept.take(probs_RW, rows_N, ids_RK.flatten(), sizes_R)
        ids.append(ids_RK.int().cpu())
        logprobs.append((best_RK - total_R1).cpu())
        tails_RT = _find_tails(probs_RW, logits_RW, kept, codec.temperatures)
        tails.append(tails_RT.log().cpu())
    return SparseTargets.from_rows(
        torch.cat(ids).numpy(),
        torch.cat(logprobs).numpy(),
        tail_logprobs=torch.cat(tails).numpy(),
    )


def _find_top_k(logits_RW: Tensor, top_k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return (logits, ids) [R, K] of the K greatest of each row, in falling order; ids are below `vocabulary`.

    They lie in the K blocks with the greatest maxima, so only these are sorted: 1.7-2.5 times as fast as torch.topk of
    a whole row.
    """
    num_blocks = logits_RW.shape[1] // BLOCK
    if top_k * 4 > num_blocks:
        return _sort_top_k(logits_RW, top_k, vocabulary)
    blocks_RK = _blocks(logits_RW).amax(dim=1).topk(top_k, dim=-1).indices
    among_RN = _blocks(logits_RW).gather(2, blocks_RK[:, None].expand(-1, BLOCK, -1)).flatten(1)
    best_RK, places_RK = among_RN.topk(top_k, dim=-1)
    step_RK = places_RK // top_k
    ids_RK = step_RK * num_blocks + blocks_RK.gather(1, places_RK - step_RK * top_k)
    # A row of fewer than K probabilities above zero: what fills it up must not be ids that only fill up a block.
    if bool((ids_RK >= vocabulary).any()):
        return _sort_top_k(logits_RW, top_k, vocabulary)
    return best_RK, ids_RK


def _sort_top_k(logits_RW: Tensor, top_k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    found = logits_RW[:, :vocabulary].topk(top_k, dim=-1)
    return found.values, found.indices


@torch.inference_mode()
def select_probable(
    logits_PV: Tensor, codec: Codec, *, num_tokens: int, uniform_P: NDArray[np.float64]
) -> Selection:
    """Keep every token whose probability is at least `codec.min_probability`, the best one in any case; draw others.

    uniform_P: a number in [0, 1) for each row's draws. Drawing (method `sampled`): a comb of n equally spaced points,
    moved by that number, is laid over the cumulative mass of the other tokens, and a token is drawn where a point
    falls on it: with probability n p / m, m the mass, and never twice, since no p reaches m / n. Each drawn token
    stands for m / n, so the expectation is p (Madow 1949).
    Raises NotFiniteError as `_compute_probs` does.
    """
    assert codec.min_probability is not None
    step = codec.sample_step
    least = step / TAIL_UNIT if step else codec.min_probability
    logits_PW = _mask(logits_PV, num_tokens=num_tokens)
    pieces = []
    for start, logits_RW, probs_RW in _compute_probs(logits_PW):
        # Of `top_p`, the best one stands for all where none is probable enough.
        rows_N, ids_N = _find_probable(probs_RW, least, needs_one=not step)
        sizes_R = torch.bincount(rows_N, minlength=len(logits_RW))
        kept = _Kept.take(probs_RW, rows_N, ids_N, sizes_R)
        sizes = sizes_R.cpu().numpy().astype(np.int64)
        masses_R = probs_RW.sum(dim=-1).double().cpu().numpy() * TAIL_UNIT
        drawn = np.zeros(len(sizes), np.int64)
        sampled_ids = np.empty(0, np.int64)
        if step:
            units = np.clip(np.floor(masses_R), 0, TAIL_UNIT).astype(np.int64)
            drawn = np.array([count_sampled(unit, step) for unit in units.tolist()], np.int64)
            sampled_ids = _draw(probs_RW, drawn, uniform_P[start : start + len(drawn)])
        tails_RT = _find_tails(probs_RW, logits_RW, kept, codec.temperatures)
        tails = tails_RT.double().cpu().numpy() * TAIL_UNIT
        tails = np.clip(np.floor(tails) if step else np.rint(tails), 0, TAIL_UNIT).astype(np.int64)
        ids = ids_N.cpu().numpy().astype(np.int64)
        probs = kept.probs.double().cpu().numpy()
        pieces.append(Selection(sizes, ids, probs, drawn, sampled_ids, tails))
    return Selection.concatenate(pieces)


def _find_probable(probs_RW: Tensor, least: float, *, needs_one: bool) -> tuple[Tensor, Tensor]:
    """Return (row, id) of every probability of at least `least`, by row; of a row without one, its best where asked."""
    blocks_RB = _blocks(probs_RW).amax(dim=1)
    block_rows_C, blocks_C = (blocks_RB >= least).nonzero(as_tuple=True)
    among_CN = _blocks(probs_RW)[block_rows_C, :, blocks_C]
    candidates_N, steps_N = (among_CN >= least).nonzero(as_tuple=True)
    rows_N = block_rows_C[candidates_N]
    ids_N = steps_N * blocks_RB.shape[1] + blocks_C[candidates_N]
    if needs_one:
        empty_E = (blocks_RB.amax(dim=-1) < least).nonzero(as_tuple=True)[0]
        if len(empty_E):
            rows_N = torch.cat([rows_N, empty_E])
            ids_N = torch.cat([ids_N, probs_RW[empty_E].argmax(dim=-1)])
            rows_N, places_N = rows_N.sort(stable=True)
            ids_N = ids_N[places_N]
    return rows_N, ids_N


def _draw(
    rest_RW: Tensor, sampled_sizes: NDArray[np.int64], uniform_R: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the ids drawn of the masses [R, W], row after row, in the order of blocks and of tokens in a block."""
    if sampled_sizes.sum() == 0:
        return np.empty(0, np.int64)
    device = rest_RW.device
    # float64 has no place on Apple's GPUs; nobody scores there.
    sums_RB = _accumulate(_blocks(rest_RW).sum(dim=1))
    sizes_R = torch.from_numpy(sampled_sizes).to(device)
    comb_N = torch.arange(int(sizes_R.max()), device=device)
    shares_RN = (comb_N[None] + torch.from_numpy(uniform_R).to(device)[:, None]) / sizes_R[
        :, None
    ].clamp(min=1)
    total_R1 = sums_RB[:, -1:]
    points_RN = (shares_RN * total_R1).long().minimum(total_R1 - 1)
    blocks_RN = torch.searchsorted(sums_RB, points_RN, right=True)
    rows_D, combs_D = (comb_N[None] < sizes_R[:, None]).nonzero(as_tuple=True)
    blocks_D = blocks_RN[rows_D, combs_D]
    before_D = F.pad(sums_RB, (1, 0))[rows_D, blocks_D]
    inside_DB = _accumulate(_blocks(rest_RW)[rows_D, :, blocks_D])
    # A block's own sum is rounded to float32: the point is held inside the sum of its tokens.
    points_D = (points_RN[rows_D, combs_D] - before_D).minimum(inside_DB[:, -1] - 1)
    steps_D = torch.searchsorted(inside_DB, points_D[:, None], right=True)[:, 0]
    ids = (steps_D * sums_RB.shape[1] + blocks_D).cpu().numpy().astype(np.int64)
    return _separate(ids, rows_D.cpu().numpy(), rest_RW)


def _accumulate(masses: Tensor) -> Tensor:
    """Return the cumulative sums along the last axis, int64, in units of 2^-62.

    Sums of whole numbers are the same in any order. Masses are rounded up, so that none but zero becomes zero.
    """
    return (masses * _UNITS).ceil_().long().cumsum(dim=-1)


def _separate(
    ids: NDArray[np.int64], rows: NDArray[np.int64], rest_RW: Tensor
) -> NDArray[np.int64]:
    """Replace an id that rounding drew twice by the row's most probable one that was not drawn.

    Seen for probabilities within 1e-6 of the step only.
    """
    for place in np.flatnonzero((ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1])) + 1:
        free_W = rest_RW[rows[place]].clone()
        free_W[torch.from_numpy(ids[rows == rows[place]]).to(free_W.device)] = 0.0
        ids[place] = int(free_W.argmax())
    return ids
