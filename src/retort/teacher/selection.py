"""Select the tokens of the teacher's distributions to keep: from logits on its device to arrays.

Legend: P counted positions, R rows at once, V vocabulary, W the vocabulary rounded up to whole blocks, K kept tokens of
a row, N kept tokens of all rows, B blocks.

Memory decides the speed, not arithmetic. Microseconds a row on one core at V = 32,768: a softmax into new memory 115,
into used memory 40; nonzero of a whole row 34, a comparison 22, but the maxima of its blocks 7. So a few rows are
processed at a time, which stay in the processor's cache and reuse memory; and tokens are searched only in blocks whose
maximum is large enough. A block is every (W / 16)th token.

Sums reach the cache, so their order must be the same in every run: nothing here is on PyTorch's list of operations that
are not deterministic on CUDA (`torch.use_deterministic_algorithms`), as `index_add_` and `cumsum` of floats are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from retort.cache.codec import Codec, Selected, SparseTargets
from retort.cache.entropy_codec import EntropyCodec, Selection
from retort.cache.sparse_streams import TAIL_UNIT, count_sampled
from retort.cache.top_k_codec import TopKCodec

BLOCK = 16
# 2 MB of rows at once on a CPU. Microseconds a row of select_probable at V = 32,768: 93 with 16 rows, 138 with 64. A
# GPU takes all rows: there the number of kernel launches counts.
_CPU_ELEMENTS = 1 << 19
_UNITS = float(
    1 << 62
)  # of a probability of one; the sum of a row's masses, each rounded up, stays below 2^63


def pad_width(vocabulary: int) -> int:
    """Return W, the vocabulary rounded up to whole blocks."""
    return -(-vocabulary // BLOCK) * BLOCK


def _mask(logits_PV: Tensor, *, num_tokens: int) -> Tensor:
    """Return logits [P, W] with ids from `num_tokens` (the tokenizer's size) on at -inf; changes `logits_PV`."""
    width = logits_PV.shape[1]
    if num_tokens < width:
        logits_PV[:, num_tokens:] = -torch.inf
    missing = pad_width(width) - width
    return F.pad(logits_PV, (0, missing), value=-torch.inf) if missing else logits_PV


class NotFiniteError(ValueError):
    """A logit that is NaN or infinite, at index `row` of the given rows."""

    def __init__(self, row: int, token: int, value: float) -> None:
        super().__init__(f"the teacher's logit of token {token} is {value} at row {row}.")
        self.row, self.token, self.value = row, token, value


def _compute_probs(logits_PW: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index of the first row, logits [R, W], probabilities [R, W]) of R rows at a time.

    The memory of the probabilities is reused. A logit of -inf is a probability of zero. Raises NotFiniteError when a
    logit is NaN or +inf, or a whole row is -inf.
    """
    num_rows, width = logits_PW.shape
    at_once = max(1, _CPU_ELEMENTS // width) if logits_PW.device.type == "cpu" else num_rows
    scratch_RW = torch.empty_like(logits_PW[:at_once])
    for start in range(0, num_rows, at_once):
        logits_RW = logits_PW[start : start + at_once]
        probs_RW = torch.softmax(logits_RW, dim=-1, out=scratch_RW[: len(logits_RW)])
        is_finite_R = torch.isfinite(probs_RW[:, 0])  # one NaN makes its whole row NaN
        if not bool(is_finite_R.all()):
            row = start + int((~is_finite_R).nonzero()[0])
            token = int(logits_PW[row].argmax())  # NaN counts as the greatest
            raise NotFiniteError(row, token, float(logits_PW[row, token]))
        yield start, logits_RW, probs_RW


def _blocks(rows_RW: Tensor) -> Tensor:
    """Return a view [R, 16, W / 16]: the tokens of block b are [:, :, b]."""
    return rows_RW.view(len(rows_RW), BLOCK, -1)


def _find_tails(
    rest: "_Rest", logits_RW: Tensor, kept: "_KeptTokens", temperatures: tuple[float, ...]
) -> Tensor:
    """Return the mass outside the kept tokens at each temperature, [R, temperatures]; overwrites `rest.probs`."""
    rest_RW = rest.probs
    tails = {1.0: rest.masses}
    if 2.0 in temperatures:  # a square root takes a third of the time of another softmax
        outside_R = rest_RW.sqrt_().sum(dim=-1)
        inside_R = _sum_rows(kept.probs.sqrt(), kept.sizes)
        tails[2.0] = outside_R / (outside_R + inside_R)
    for temperature in set(temperatures) - {1.0, 2.0}:
        torch.softmax(logits_RW / temperature, dim=-1, out=rest_RW)
        rest_RW.view(-1)[kept.indices] = 0.0
        tails[temperature] = rest_RW.sum(dim=-1)
    return torch.stack([tails[t] for t in temperatures], dim=-1)


def _sum_rows(values_N: Tensor, sizes_R: Tensor) -> Tensor:
    """Return the sum of each row's values [R]; values are ordered by row.

    A CPU adds them in order; on CUDA one block of threads adds a row (CUB's DeviceSegmentedReduce).
    """
    if len(values_N) == 0:
        return values_N.new_zeros(len(sizes_R))
    # unsafe: the lengths are right, and checking them would make the CPU wait for the GPU
    return torch.segment_reduce(values_N, "sum", lengths=sizes_R, unsafe=True)


class _KeptTokens(NamedTuple):
    """N kept tokens by row: their number in each row [R]; index in view(-1), probability at temperature 1 [N]."""

    sizes: Tensor
    indices: Tensor
    probs: Tensor

    @classmethod
    def take(
        cls, probs_RW: Tensor, rows_N: Tensor, ids_N: Tensor, sizes_R: Tensor
    ) -> "_KeptTokens":
        """Return the tokens at (row, id), and set their probabilities to zero in `probs_RW`; `rows_N` is sorted."""
        indices_N = rows_N * probs_RW.shape[1] + ids_N
        probs_N = probs_RW.view(-1)[indices_N]
        probs_RW.view(-1)[indices_N] = 0.0
        return cls(sizes_R, indices_N, probs_N)


class _Rest(NamedTuple):
    """What is not kept: probabilities at temperature 1 [R, W], those of the kept tokens zero, and their sums [R]."""

    probs: Tensor
    masses: Tensor

    @classmethod
    def of(cls, probs_RW: Tensor) -> "_Rest":
        """Return what `_KeptTokens.take` left. Each sum reads every probability, so it is taken once."""
        return cls(probs_RW, probs_RW.sum(dim=-1))


def select(
    logits_PV: Tensor, codec: Codec, *, num_tokens: int, uniform_P: NDArray[np.float64]
) -> Selected:
    """Return what the codec keeps of each row: see `select_top_k` and `select_probable`.

    Here and not in the codec, which needs no PyTorch. Raises NotFiniteError.
    """
    if isinstance(codec, TopKCodec):
        return select_top_k(logits_PV, codec, num_tokens=num_tokens)
    assert isinstance(codec, EntropyCodec), codec
    return select_probable(logits_PV, codec, num_tokens=num_tokens, uniform_P=uniform_P)


@torch.inference_mode()
def select_top_k(logits_PV: Tensor, codec: TopKCodec, *, num_tokens: int) -> SparseTargets:
    """Keep the K most probable tokens of each row, and the mass of the rest at each temperature.

    logits_PV: float32 [P, V] or, in whole blocks, [P, W]; overwritten. num_tokens: the tokenizer's size. Raises
    NotFiniteError (a ValueError) when a logit is NaN or +inf, or a whole row is -inf.
    """
    logits_PW = _mask(logits_PV, num_tokens=num_tokens)
    ids, logprobs, tails = [], [], []
    for _, logits_RW, probs_RW in _compute_probs(logits_PW):
        best_RK, ids_RK = _find_top_k(logits_RW, codec.top_k, codec.vocabulary)
        # logsumexp, from the probability of the best
        total_R1 = best_RK[:, :1] - probs_RW.gather(1, ids_RK[:, :1]).log()
        rows_R = torch.arange(len(ids_RK), device=ids_RK.device)
        sizes_R = torch.full_like(rows_R, codec.top_k)
        rows_N = rows_R.repeat_interleave(codec.top_k)
        kept = _KeptTokens.take(probs_RW, rows_N, ids_RK.flatten(), sizes_R)
        ids.append(ids_RK.int().cpu())
        logprobs.append((best_RK - total_R1).cpu())
        tails_RT = _find_tails(_Rest.of(probs_RW), logits_RW, kept, codec.temperatures)
        tails.append(tails_RT.log().cpu())
    return SparseTargets.from_rows(
        torch.cat(ids).numpy(),
        torch.cat(logprobs).numpy(),
        tail_logprobs=torch.cat(tails).numpy(),
    )


def _find_top_k(logits_RW: Tensor, top_k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return (logits, ids) [R, K] of the K greatest of each row, in descending order; ids are below `vocabulary`.

    They are in the K blocks with the greatest maxima, so only these are sorted: 1.7-2.5 times as fast as torch.topk of
    a whole row.
    """
    num_blocks = logits_RW.shape[1] // BLOCK
    if top_k * 4 > num_blocks:
        return _sort_top_k(logits_RW, top_k, vocabulary)
    blocks_RK = _blocks(logits_RW).amax(dim=1).topk(top_k, dim=-1).indices
    among_RN = _blocks(logits_RW).gather(2, blocks_RK[:, None].expand(-1, BLOCK, -1)).flatten(1)
    best_RK, indices_RK = among_RN.topk(top_k, dim=-1)
    step_RK = indices_RK // top_k
    ids_RK = step_RK * num_blocks + blocks_RK.gather(1, indices_RK - step_RK * top_k)
    # In a row of fewer than K probabilities above zero, the others must not be the padding ids of a block.
    if bool((ids_RK >= vocabulary).any()):
        return _sort_top_k(logits_RW, top_k, vocabulary)
    return best_RK, ids_RK


def _sort_top_k(logits_RW: Tensor, top_k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    found = logits_RW[:, :vocabulary].topk(top_k, dim=-1)
    return found.values, found.indices


@torch.inference_mode()
def select_probable(
    logits_PV: Tensor, codec: EntropyCodec, *, num_tokens: int, uniform_P: NDArray[np.float64]
) -> Selection:
    """Keep every token of at least `codec.min_probability`; top_p: at least one; sampled: and a sample of the others.

    logits_PV, num_tokens, errors: as of `select_top_k`. uniform_P float64 [P]: a number in [0, 1) for each row.

    Systematic sampling (Madow 1949): n equally spaced points, shifted by that number, are laid over the cumulative mass
    m of the other tokens, and a token is sampled where a point falls into its mass p. That has probability n p / m, and
    never happens twice, since every p is below m / n. A sampled token stands for m / n, so its expectation is p.
    """
    step = codec.sample_step
    least = step / TAIL_UNIT if step else codec.min_probability
    logits_PW = _mask(logits_PV, num_tokens=num_tokens)
    pieces = []
    for start, logits_RW, probs_RW in _compute_probs(logits_PW):
        # top_p keeps the best token where none is probable enough.
        rows_N, ids_N = _find_probable(probs_RW, least, needs_one=not step)
        sizes_R = torch.bincount(rows_N, minlength=len(logits_RW))
        kept = _KeptTokens.take(probs_RW, rows_N, ids_N, sizes_R)
        sizes = sizes_R.cpu().numpy().astype(np.int64)
        rest = _Rest.of(probs_RW)
        counts = np.zeros(len(sizes), np.int64)
        sampled_ids = np.empty(0, np.int64)
        if step:
            masses = rest.masses.double().cpu().numpy() * TAIL_UNIT
            units = np.clip(np.floor(masses), 0, TAIL_UNIT).astype(np.int64)
            counts = np.array([count_sampled(unit, step) for unit in units.tolist()], np.int64)
            sampled_ids = _sample(probs_RW, counts, uniform_P[start : start + len(counts)])
        tails_RT = _find_tails(rest, logits_RW, kept, codec.temperatures)
        tails = tails_RT.double().cpu().numpy() * TAIL_UNIT
        tails = np.clip(np.floor(tails) if step else np.rint(tails), 0, TAIL_UNIT).astype(np.int64)
        ids = ids_N.cpu().numpy().astype(np.int64)
        probs = kept.probs.double().cpu().numpy()
        pieces.append(Selection(sizes, ids, probs, counts, sampled_ids, tails))
    return Selection.concatenate(pieces)


def _find_probable(probs_RW: Tensor, least: float, *, needs_one: bool) -> tuple[Tensor, Tensor]:
    """Return rows and ids [N] of every probability >= `least`, by row; `needs_one`: the best of a row without one."""
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
            rows_N, order_N = rows_N.sort(stable=True)
            ids_N = ids_N[order_N]
    return rows_N, ids_N


def _sample(
    rest_RW: Tensor, sampled_sizes: NDArray[np.int64], uniform_R: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return sampled ids [N], row after row, ordered by block and within a block; their number in each row is given."""
    if sampled_sizes.sum() == 0:
        return np.empty(0, np.int64)
    device = rest_RW.device
    # Apple's GPUs have no float64; they are not supported.
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
    # A block's own sum is rounded to float32: the point is clamped to the sum of its tokens.
    points_D = (points_RN[rows_D, combs_D] - before_D).minimum(inside_DB[:, -1] - 1)
    steps_D = torch.searchsorted(inside_DB, points_D[:, None], right=True)[:, 0]
    ids = (steps_D * sums_RB.shape[1] + blocks_D).cpu().numpy().astype(np.int64)
    return _separate(ids, rows_D.cpu().numpy(), rest_RW)


def _accumulate(masses: Tensor) -> Tensor:
    """Return the cumulative sums along the last axis, int64, in units of 2^-62.

    Sums of integers are the same in any order. Masses are rounded up, so that only zero becomes zero.
    """
    return (masses * _UNITS).ceil_().long().cumsum(dim=-1)


def _separate(
    ids: NDArray[np.int64], rows: NDArray[np.int64], rest_RW: Tensor
) -> NDArray[np.int64]:
    """Replace an id that was sampled twice, because of rounding, by its row's most probable one that was not sampled.

    Only seen for probabilities within 1e-6 of the step. ids, rows [N]: see `_sample`.
    """
    for i in np.flatnonzero((ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1])) + 1:
        free_W = rest_RW[rows[i]].clone()
        free_W[torch.from_numpy(ids[rows == rows[i]]).to(free_W.device)] = 0.0
        ids[i] = int(free_W.argmax())
    return ids
