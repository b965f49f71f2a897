"""Write the kept tokens of a sequence's positions as a stream of small integers (the order: `sparse_streams`).

Shapes: P positions, N exact tokens, M sampled tokens of one sequence.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.cache.entropy import floor_log2
from retort.cache.jit import inlined, jit
from retort.cache.sparse_streams import (
    GAP_CONTEXTS,
    NEXT_LEVEL,
    NUM_LANES,
    Grid,
    Streams,
    bucket_mean,
    compute_first_mass,
    compute_last_level,
    place_context,
    size_context,
)


class RankedSelection(NamedTuple):
    """The kept tokens of one sequence by rank, position after position, with ascending ranks in each position.

    sizes, sampled_sizes int64 [P]: numbers of exact and of sampled tokens; ranks, levels int64 [N]; sampled_ranks int64
    [M]; tails int64 [P, temperatures], in units of 1/65,535.
    """

    sizes: NDArray[np.int64]
    ranks: NDArray[np.int64]
    levels: NDArray[np.int64]
    sampled_sizes: NDArray[np.int64]
    sampled_ranks: NDArray[np.int64]
    tails: NDArray[np.int64]


def sort_by_rank(
    sizes: NDArray[np.int64],
    ids: NDArray[np.int64],
    levels: NDArray[np.int64],
    rank_of_id: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranks and levels of each position's tokens, int64 [N], by ascending rank.

    sizes int64 [P]; ids, all different in a position, and levels int64 [N]; rank_of_id int64 [V].
    """
    assert sizes.sum() == len(ids) == len(levels)
    assert ids.max(initial=0) < len(rank_of_id) and ids.min(initial=0) >= 0
    num_words = -(-len(rank_of_id) // 64)
    scratch = (
        np.zeros(num_words, np.uint64),
        np.zeros(-(-num_words // 64), np.uint64),
        np.empty(len(rank_of_id), np.int32),
    )
    ranks, sorted_levels = np.empty_like(ids), np.empty_like(levels)
    found = _sort_by_rank(sizes, ids, levels, rank_of_id, scratch, ranks, sorted_levels)
    assert found == len(ids), (found, len(ids))
    return ranks, sorted_levels


@jit
def _sort_by_rank(sizes, ids, levels, rank_of_id, scratch, ranks, sorted_levels):  # type: ignore[no-untyped-def]
    """Fill `ranks` and `sorted_levels`; return how many are different, over all positions.

    A position's ranks are marked in a bitmap `words`, all zero before and after; a second one, `used`, says which words
    have a bit. Reading it in order takes a third of the time of sorting 80 ranks.
    """
    words, used, level_of = scratch
    one, six, low = np.uint64(1), np.uint64(6), np.uint64(63)
    first = n = 0
    for size in sizes:
        for i in range(first, first + size):
            rank = np.uint64(rank_of_id[np.uint64(ids[np.uint64(i)])])
            word = rank >> six
            words[word] |= one << (rank & low)
            used[word >> six] |= one << (word & low)
            level_of[rank] = levels[np.uint64(i)]
        first += size
        for block in range(len(used)):
            marks, used[block] = used[block], np.uint64(0)
            while marks:
                word = np.uint64(block << 6) | _lowest_bit(marks)
                marks &= marks - one
                bits, words[word] = words[word], np.uint64(0)
                while bits:
                    rank = (word << six) | _lowest_bit(bits)
                    bits &= bits - one
                    ranks[np.uint64(n)], sorted_levels[np.uint64(n)] = rank, level_of[rank]
                    n += 1
    return n


@inlined
def _lowest_bit(bits):  # type: ignore[no-untyped-def]
    return np.uint64(floor_log2(np.int64(bits & (~bits + np.uint64(1)))))


def write_streams(
    selection: RankedSelection, next_ranks: NDArray[np.int64], grid: Grid, *, width: int
) -> Streams:
    """Return one sequence's integers; next_ranks int64 [P]: ranks of the text's next tokens; `width`: see Streams."""
    num_positions = len(selection.sizes)
    # Compiled code does not check bounds.
    assert num_positions == len(selection.sampled_sizes) == len(selection.tails) == len(next_ranks)
    assert selection.sizes.sum() == len(selection.ranks) == len(selection.levels)
    assert selection.sampled_sizes.sum() == len(selection.sampled_ranks)
    most = (
        num_positions * (grid.num_temperatures + 2)
        + 2 * len(selection.ranks)
        + len(selection.sampled_ranks)
    )
    contexts, values = np.empty(most, np.uint16), np.empty(most, np.uint32)
    cut, end = _write_streams(selection, next_ranks, grid, contexts, values)
    counts = selection.sizes + selection.sampled_sizes
    first_tokens = int(counts[: num_positions // NUM_LANES].sum())
    return Streams(contexts[:end], values[:end], cut, first_tokens, int(counts.sum()), width)


@inlined
def _map_level(level: int, mass: float, left: int) -> int:
    """Return the integer that is written for a level: the last one's is its difference from what the mass demands."""
    if left > 1:
        return level - 1
    difference = level - compute_last_level(mass)
    return 2 * difference if difference >= 0 else -2 * difference - 1


@inlined
def _find(ranks: NDArray[np.int64], first: int, stop: int, rank: int) -> int:
    """Return the index of a rank among ranks[first:stop], -1 where it is not there."""
    found = -1
    for i in range(first, stop):
        if ranks[i] == rank:
            found = i
    return found


@jit
def _write_streams(
    selection: RankedSelection,
    next_ranks: NDArray[np.int64],
    grid: Grid,
    contexts: NDArray[np.uint16],
    values: NDArray[np.uint32],
) -> tuple[int, int]:
    """Fill contexts and values; return where lane 1 begins and ends."""
    n = cut = stop = sampled_stop = 0
    for p in range(len(next_ranks)):
        if p == len(next_ranks) // NUM_LANES:
            cut = n
        for t in range(grid.num_temperatures):
            contexts[n], values[n] = t, selection.tails[p, t]
            n += 1
        tail, size, next_rank = selection.tails[p, 0], selection.sizes[p], next_ranks[p]
        first, stop = stop, stop + size
        sampled_first, sampled_stop = sampled_stop, sampled_stop + selection.sampled_sizes[p]
        index_of_next = _find(selection.ranks, first, stop, next_rank)
        is_sampled = _find(selection.sampled_ranks, sampled_first, sampled_stop, next_rank) >= 0
        place = 2 if is_sampled else 1 if index_of_next >= 0 else 0
        contexts[n], values[n] = size_context(grid, tail), size
        contexts[n + 1], values[n + 1] = place_context(grid, size, next_rank), place
        n += 2
        mass, left, before = compute_first_mass(grid, tail), size, -1
        if place == 1:
            if size > 1:
                level = selection.levels[index_of_next]
                kind = grid.num_temperatures + NEXT_LEVEL
                contexts[n] = kind + bucket_mean(grid, mass, left)
                values[n] = level - 1
                mass -= grid.weights[level]
                n += 1
            left -= 1
        for i in range(first, stop):
            if i != index_of_next:
                contexts[n] = grid.lefts[left].gap + floor_log2(before + 2)
                values[n] = selection.ranks[i] - before - 1
                before = selection.ranks[i]
                n += 1
                if size > 1:
                    level = selection.levels[i]
                    contexts[n] = grid.lefts[left].level + bucket_mean(grid, mass, left)
                    values[n] = _map_level(level, mass, left)
                    mass -= grid.weights[level]
                    n += 1
                left -= 1
        before = -1
        left = sampled_stop - sampled_first - is_sampled
        for i in range(sampled_first, sampled_stop):
            if selection.sampled_ranks[i] != next_rank:
                contexts[n] = grid.lefts[left].gap + GAP_CONTEXTS + floor_log2(before + 2)
                values[n] = selection.sampled_ranks[i] - before - 1
                before = selection.sampled_ranks[i]
                n += 1
                left -= 1
    return cut, n
