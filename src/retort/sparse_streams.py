"""The kept tokens of a sequence's positions as streams of small integers, and back.

A position keeps a set of *exact* tokens, each with a probability on the grid (level / steps)^2, and a set of *drawn*
tokens of equal weight (none unless the tail is sampled). Tokens are named by their *rank* in the training text, 0 for
the most frequent: sets are written as gaps between rising ranks, which are small where tokens are frequent.

Two streams per sequence, so that a processor decodes two symbols at a time: stream A holds set sizes and gaps, stream
B tails and levels. What helps to guess the next integer chooses its context:

    tail    mass outside the exact tokens in units of 1/65,535, one for each temperature     (stream B)
    size    number of exact tokens, given the tail                                           (A)
    place   of the text's own next token: 0 not kept, 1 exact, 2 drawn, given size and rank  (A)
    gap     to the next rank, given the rank before and how many are left                    (A; own tables for drawn)
    level   given the mass and the number of tokens left: the mean level that they must have (B)

The next token is known to the reader, so its rank is not written; its level comes first. The last exact token's level
is written as the difference from what the mass that is left demands.
"""

import numpy as np
from numpy.typing import NDArray

from retort.entropy import compiled, floor_log2, inlined, pull_bits, pull_symbol

TAIL_UNIT = 65_535  # the whole mass
_SIZE_CONTEXTS, _PLACE_CONTEXTS = 9, 6 * 5
_RANK_BUCKETS, _COUNT_BUCKETS = 15, 6
_GAP_CONTEXTS = _RANK_BUCKETS * _COUNT_BUCKETS
_LEVEL_BUCKETS = 14
_LEVEL_CONTEXTS = _LEVEL_BUCKETS * 6


def count_contexts(num_temperatures: int) -> int:
    """Return the number of contexts."""
    return num_temperatures + _SIZE_CONTEXTS + _PLACE_CONTEXTS + 2 * _GAP_CONTEXTS + _LEVEL_CONTEXTS


@inlined
def _bucket_count(count: int) -> int:
    """0 for 1, then 2, 3-4, 5-8, 9-16, more."""
    return min(_COUNT_BUCKETS - 1, floor_log2(count - 1) + 1) if count > 1 else 0


@inlined
def _size_context(base: int, tail: int) -> int:
    return base + (floor_log2(tail) + 1) // 2


@inlined
def _place_context(base: int, size: int, rank: int) -> int:
    return base + _bucket_count(size) * 5 + min(4, floor_log2(rank + 1) // 3)


@inlined
def _gap_context(base: int, rank_before: int, left: int) -> int:
    bucket = min(_RANK_BUCKETS - 1, floor_log2(rank_before + 2))
    return base + bucket * _COUNT_BUCKETS + _bucket_count(left)


@inlined
def _mean_square(mass: int, left: int) -> int:
    """The mean of the squared levels that are left; float64 division is exact enough and equal everywhere."""
    return np.int64(np.float64(mass) / np.float64(TAIL_UNIT * left)) if mass > 0 else np.int64(0)


@inlined
def _level_context(base: int, mean_square: int, left: int, is_next: bool) -> int:
    bucket = min(_LEVEL_BUCKETS - 1, floor_log2(min(mean_square + 1, (1 << 24) - 1)))
    kind = 0 if left == 1 else 1 if is_next else 2 + min(3, _bucket_count(left) - 1)
    return base + kind * _LEVEL_BUCKETS + bucket


@inlined
def _root(square: int) -> int:
    """The whole part of a square root."""
    root = np.int64(np.sqrt(np.float64(square)))
    return root - 1 if root * root > square else root


@inlined
def _write_level(level: int, mean_square: int, left: int) -> int:
    if left > 1:
        return level - 1
    difference = level - _root(mean_square)
    return 2 * difference if difference >= 0 else -2 * difference - 1


@inlined
def _read_level(written: int, mean_square: int, left: int) -> int:
    if left > 1:
        return written + 1
    difference = -((written + 1) >> 1) if written & 1 else written >> 1
    return _root(mean_square) + difference


@compiled
def count_drawn(tail: int, step: int) -> int:
    """Return how many tokens were drawn: one for each `step` (in units of 1/65,535) of the tail; 0: none ever are."""
    return max(1, tail // step) if step > 0 and tail > 0 else 0


@compiled
def write_streams(
    sizes: NDArray[np.int64],
    ranks: NDArray[np.int64],
    levels: NDArray[np.int64],
    drawn_sizes: NDArray[np.int64],
    drawn_ranks: NDArray[np.int64],
    tails: NDArray[np.int64],
    next_ranks: NDArray[np.int64],
    steps: int,
) -> tuple[NDArray[np.uint16], NDArray[np.uint32], NDArray[np.uint16], NDArray[np.uint32]]:
    """Return (contexts, integers) of stream A and of stream B of one sequence.

    sizes, drawn_sizes, next_ranks [P], tails [P, temperatures]; ranks and levels [N], drawn_ranks [M] position after
    position, ranks rising within each.
    """
    num_positions, num_temperatures = tails.shape
    size_base = num_temperatures
    place_base = size_base + _SIZE_CONTEXTS
    gap_base = place_base + _PLACE_CONTEXTS
    drawn_base = gap_base + _GAP_CONTEXTS
    level_base = drawn_base + _GAP_CONTEXTS
    a_contexts = np.empty(2 * num_positions + len(ranks) + len(drawn_ranks), np.uint16)
    a_values = np.empty(len(a_contexts), np.uint32)
    b_contexts = np.empty(num_positions * num_temperatures + len(ranks), np.uint16)
    b_values = np.empty(len(b_contexts), np.uint32)
    a = b = first = first_drawn = 0
    for p in range(num_positions):
        for t in range(num_temperatures):
            b_contexts[b], b_values[b] = t, tails[p, t]
            b += 1
        a_contexts[a], a_values[a] = _size_context(size_base, tails[p, 0]), sizes[p]
        stop, stop_drawn = first + sizes[p], first_drawn + drawn_sizes[p]
        next_rank = next_ranks[p]
        place, place_of_next = 0, -1
        for i in range(first, stop):
            if ranks[i] == next_rank:
                place, place_of_next = 1, i
        for i in range(first_drawn, stop_drawn):
            if drawn_ranks[i] == next_rank:
                place = 2
        a_contexts[a + 1], a_values[a + 1] = _place_context(place_base, sizes[p], next_rank), place
        a += 2
        mass = (TAIL_UNIT - tails[p, 0]) * steps * steps
        left = sizes[p]
        if place == 1:
            square = _mean_square(mass, left)
            level = levels[place_of_next]
            b_contexts[b] = _level_context(level_base, square, left, True)
            b_values[b] = _write_level(level, square, left)
            b += 1
            mass -= TAIL_UNIT * level * level
            left -= 1
        before = -1
        for i in range(first, stop):
            if i == place_of_next:
                continue
            a_contexts[a] = _gap_context(gap_base, before, left)
            a_values[a] = ranks[i] - before - 1
            a += 1
            before = ranks[i]
            square = _mean_square(mass, left)
            b_contexts[b] = _level_context(level_base, square, left, False)
            b_values[b] = _write_level(levels[i], square, left)
            b += 1
            mass -= TAIL_UNIT * levels[i] * levels[i]
            left -= 1
        before = -1
        left = drawn_sizes[p] - (place == 2)
        for i in range(first_drawn, stop_drawn):
            if drawn_ranks[i] == next_rank:
                continue
            a_contexts[a] = _gap_context(drawn_base, before, left)
            a_values[a] = drawn_ranks[i] - before - 1
            a += 1
            before = drawn_ranks[i]
            left -= 1
        first, first_drawn = stop, stop_drawn
    return a_contexts[:a], a_values[:a], b_contexts[:b], b_values[:b]


@compiled
def read_streams(
    words: NDArray[np.uint16],
    bits: NDArray[np.uint32],
    bounds: tuple[int, int, int, int, int, int],
    next_ranks: NDArray[np.int64],
    num_temperatures: int,
    steps: int,
    step: int,
    lookup: NDArray[np.uint32],
    sizes: NDArray[np.int64],
    drawn_sizes: NDArray[np.int64],
    tails: NDArray[np.int64],
    ranks: NDArray[np.int32],
    levels: NDArray[np.int32],
) -> int:
    """Fill sizes, drawn_sizes [P], tails [P, temperatures], ranks and levels (0: drawn); return how many tokens.

    `words` and `bits` are the record seen as 16- and as 32-bit words; `bounds` holds where in `bits` the bits of A and
    of B begin, and where in `words` the words of A and of B end. Returns -1 where the tokens do not fit in `ranks`, -2
    where the streams do not end as they must.
    """
    size_base = num_temperatures
    place_base = size_base + _SIZE_CONTEXTS
    gap_base = place_base + _PLACE_CONTEXTS
    drawn_base = gap_base + _GAP_CONTEXTS
    level_base = drawn_base + _GAP_CONTEXTS
    a_bit, b_bit, a_word, b_word, a_end, b_end = bounds
    a_state = np.int64(words[a_word]) | (np.int64(words[a_word + 1]) << 16)
    b_state = np.int64(words[b_word]) | (np.int64(words[b_word + 1]) << 16)
    a_word, b_word = a_word + 2, b_word + 2
    n = 0
    for p in range(len(next_ranks)):
        for t in range(num_temperatures):
            b_state, b_word, symbol = pull_symbol(b_state, b_word, words, t, lookup)
            value, b_bit = pull_bits(symbol, bits, b_bit)
            tails[p, t] = value
        tail = tails[p, 0]
        context = _size_context(size_base, tail)
        a_state, a_word, symbol = pull_symbol(a_state, a_word, words, context, lookup)
        size, a_bit = pull_bits(symbol, bits, a_bit)
        drawn = count_drawn(tail, step)
        if n + size + drawn > len(ranks) or a_word > a_end or b_word > b_end:
            return -1
        next_rank = next_ranks[p]
        context = _place_context(place_base, size, next_rank)
        a_state, a_word, place = pull_symbol(a_state, a_word, words, context, lookup)
        mass = (TAIL_UNIT - tail) * steps * steps
        left = size
        if place == 1:
            square = _mean_square(mass, left)
            context = _level_context(level_base, square, left, True)
            b_state, b_word, symbol = pull_symbol(b_state, b_word, words, context, lookup)
            value, b_bit = pull_bits(symbol, bits, b_bit)
            level = _read_level(value, square, left)
            ranks[n], levels[n] = next_rank, level
            mass -= TAIL_UNIT * level * level
            n += 1
            left -= 1
        before = -1
        while left > 0:
            context = _gap_context(gap_base, before, left)
            a_state, a_word, symbol = pull_symbol(a_state, a_word, words, context, lookup)
            value, a_bit = pull_bits(symbol, bits, a_bit)
            before += value + 1
            square = _mean_square(mass, left)
            context = _level_context(level_base, square, left, False)
            b_state, b_word, symbol = pull_symbol(b_state, b_word, words, context, lookup)
            value, b_bit = pull_bits(symbol, bits, b_bit)
            level = _read_level(value, square, left)
            ranks[n], levels[n] = before, level
            mass -= TAIL_UNIT * level * level
            n += 1
            left -= 1
        before = -1
        left = drawn
        if place == 2:
            ranks[n], levels[n] = next_rank, 0
            n += 1
            left -= 1
        while left > 0:
            context = _gap_context(drawn_base, before, left)
            a_state, a_word, symbol = pull_symbol(a_state, a_word, words, context, lookup)
            value, a_bit = pull_bits(symbol, bits, a_bit)
            before += value + 1
            ranks[n], levels[n] = before, 0
            n += 1
            left -= 1
        sizes[p], drawn_sizes[p] = size, drawn
    is_whole = a_state == 65536 and b_state == 65536 and a_word == a_end and b_word == b_end
    return n if is_whole else -2
