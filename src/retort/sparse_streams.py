"""The kept tokens of a sequence's positions as a stream of small integers, and back.

A position keeps a set of *exact* tokens, each with a probability on the grid (level / steps)^2, and a set of *drawn*
tokens of equal weight (none unless the tail is sampled). Tokens are named by their *rank* in the training text, 0 for
the most frequent: sets are written as gaps between rising ranks, which are small where tokens are frequent.

What helps to guess the next integer chooses its context. Position after position:

    tail    mass outside the exact tokens in units of 1/65,535, one for each temperature
    size    number of exact tokens, given the tail
    place   of the text's own next token: 0 not kept, 1 exact, 2 drawn, given size and rank
    level   of the next token, if it is exact
    gap     to the next rank, given the rank before and how many are left (own tables for drawn tokens), and its
    level   given the mass and the number of tokens left: the mean level that they must have

The next token is known to the reader, so its rank is not written. The last exact token's level is written as the
difference from what the mass that is left demands; that of an only one is 1 and not written.

A sequence's positions are dealt to two *lanes*, the first half and the second, each a stream of its own. A reader
advances them in turn, so that the processor works on two integers at a time (1.3x as fast as one lane).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.entropy import LOW, Lookup, floor_log2, inlined, lean, pull

TAIL_UNIT = 65_535  # the whole mass
NUM_LANES = 2
_SIZE_CONTEXTS, _PLACE_CONTEXTS = 9, 6 * 5
_LOG2_BUCKETS, _COUNT_BUCKETS = 21, 6  # a rank is below 2^20, so is a mean square
_GAP_CONTEXTS = _LEVEL_CONTEXTS = _COUNT_BUCKETS * _LOG2_BUCKETS
# Where each kind's contexts begin, behind those of the tails.
_SIZE = 0
_PLACE = _SIZE + _SIZE_CONTEXTS
_GAP = _PLACE + _PLACE_CONTEXTS
_DRAWN_GAP = _GAP + _GAP_CONTEXTS
_LEVEL = _DRAWN_GAP + _GAP_CONTEXTS
_NEXT_LEVEL = _LEVEL + _LOG2_BUCKETS  # behind those of the last token's level


def count_contexts(num_temperatures: int) -> int:
    """Return the number of contexts."""
    return num_temperatures + _LEVEL + _LEVEL_CONTEXTS


# Of a number of tokens that are left: where the contexts of a gap and of a level begin, and 1 / (65,535 left).
_LEFT = np.dtype([("gap", np.int64), ("level", np.int64), ("inverse", np.float64)])


class Grid(NamedTuple):
    """What both sides know before they begin.

    draw_step: the mass of one drawn token in units of 1/65,535; lefts [>= K + 1]: see _LEFT; weights float64 and
    log_squares float32 [steps + 2]: 65,535 times each level's square, and the log of that square (level 0: 0). Rounding
    by chance may go one level above `steps`.
    """

    num_temperatures: int
    steps: int
    draw_step: int
    lefts: NDArray[np.void]
    weights: NDArray[np.float64]
    log_squares: NDArray[np.float32]


@lru_cache
def build_grid(num_temperatures: int, steps: int, draw_step: int, *, width: int) -> Grid:
    """Return the grid for positions that keep up to `width` tokens."""
    counts = np.arange(1 << width.bit_length())
    buckets = np.array([_bucket_count(int(n)) for n in counts])
    lefts = np.zeros(len(counts), _LEFT)
    lefts["gap"] = num_temperatures + _GAP + buckets * _LOG2_BUCKETS
    lefts["level"] = num_temperatures + _LEVEL
    lefts["level"][2:] += (1 + np.minimum(4, buckets[2:])) * _LOG2_BUCKETS
    lefts["inverse"][1:] = 1 / (TAIL_UNIT * counts[1:])
    squares = np.arange(steps + 2.0) ** 2
    log_squares = np.log(np.maximum(squares, 1)).astype(np.float32)
    return Grid(num_temperatures, steps, draw_step, lefts, TAIL_UNIT * squares, log_squares)


@inlined
def _bucket_count(count: int) -> int:
    """0 for 1, then 2, 3-4, 5-8, 9-16, more."""
    return min(_COUNT_BUCKETS - 1, floor_log2(count - 1) + 1) if count > 1 else 0


@inlined
def _size_context(grid: Grid, tail: int) -> int:
    return grid.num_temperatures + _SIZE + (floor_log2(max(tail, 1)) + 1) // 2


@inlined
def _place_context(grid: Grid, size: int, rank: int) -> int:
    bucket = min(4, floor_log2(rank + 1) // 3)
    return grid.num_temperatures + _PLACE + _bucket_count(size) * 5 + bucket


@inlined
def _bucket_mean(grid: Grid, mass: float, left: int) -> int:
    """floor(log2(1 + mean square of the levels that are left)), from a float64's exponent."""
    mean = (mass if mass > 0.0 else 0.0) * grid.lefts[np.uint64(left)].inverse
    return (np.float64(mean + 1.0).view(np.int64) >> 52) - 1023


@inlined
def _first_mass(grid: Grid, tail: int) -> float:
    """What the squared levels of a position sum to, times 65,535; the half keeps rounding away from integers."""
    return np.float64((TAIL_UNIT - tail) * grid.steps * grid.steps) + 0.5


@inlined
def _last_level(mass: float) -> int:
    """The level that the mass demands of the last token: the whole part of a square root."""
    square = np.int64(mass) // TAIL_UNIT if mass > 0.0 else np.int64(0)
    root = np.int64(np.sqrt(np.float64(square)))
    return root - 1 if root * root > square else root


@inlined
def _write_level(level: int, mass: float, left: int) -> int:
    if left > 1:
        return level - 1
    difference = level - _last_level(mass)
    return 2 * difference if difference >= 0 else -2 * difference - 1


@inlined
def _read_last_level(written: int, mass: float) -> int:
    difference = -((written + 1) >> 1) if written & 1 else written >> 1
    return _last_level(mass) + difference


@inlined
def count_drawn(tail: int, step: int) -> int:
    """Return how many tokens were drawn: one for each `step` (in units of 1/65,535) of the tail; 0: none ever are."""
    # As floats, which divide several times as fast; the half keeps rounding away from integers.
    return max(1, np.int64((tail + 0.5) / step)) if step > 0 and tail > 0 else 0


# ---------------------------------------------------------------------------------------------------------
# Writing


@lean
def sort_rows(sizes: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
    """Sort each position's keys in place, position after position; 4x as fast as one sort of all.

    Shell's, with the gaps of Ciura (2001).
    """
    first = 0
    for size in sizes:
        row = keys[first : first + size]
        for gap in (701, 301, 132, 57, 23, 10, 4, 1):
            for i in range(gap, size):
                key, place = row[i], i
                while place >= gap and row[place - gap] > key:
                    row[place] = row[place - gap]
                    place -= gap
                row[place] = key
        first += size


class Kept(NamedTuple):
    """What one sequence keeps, ragged: ranks rise within a position.

    sizes, drawn_sizes int64 [P]; ranks and levels int64 [N], drawn_ranks int64 [M], position after position; tails
    int64 [P, temperatures].
    """

    sizes: NDArray[np.int64]
    ranks: NDArray[np.int64]
    levels: NDArray[np.int64]
    drawn_sizes: NDArray[np.int64]
    drawn_ranks: NDArray[np.int64]
    tails: NDArray[np.int64]


class Streams(NamedTuple):
    """One sequence before the tables are known: the integers of both lanes with their contexts.

    Those of lane 1 begin at `cut`; `width` is the greatest number of tokens that a position keeps.
    """

    contexts: NDArray[np.uint16]
    values: NDArray[np.uint32]
    cut: int
    width: int


def write_streams(kept: Kept, next_ranks: NDArray[np.int64], grid: Grid, *, width: int) -> Streams:
    """Return one sequence's integers; `next_ranks` [P]: ranks of the text's own tokens."""
    num_positions = len(kept.sizes)
    # Compiled code does not look where it writes.
    assert num_positions == len(kept.drawn_sizes) == len(kept.tails) == len(next_ranks)
    assert kept.sizes.sum() == len(kept.ranks) == len(kept.levels)
    assert kept.drawn_sizes.sum() == len(kept.drawn_ranks)
    most = num_positions * (grid.num_temperatures + 2) + 2 * len(kept.ranks) + len(kept.drawn_ranks)
    contexts, values = np.empty(most, np.uint16), np.empty(most, np.uint32)
    cut, end = _write_streams(kept, next_ranks, grid, contexts, values)
    return Streams(contexts[:end], values[:end], cut, width)


@lean
def _write_streams(
    kept: Kept,
    next_ranks: NDArray[np.int64],
    grid: Grid,
    contexts: NDArray[np.uint16],
    values: NDArray[np.uint32],
) -> tuple[int, int]:
    """Fill contexts and values; return where lane 1 begins and where it ends."""
    n = cut = stop = drawn_stop = 0
    for p in range(len(next_ranks)):
        if p == len(next_ranks) // NUM_LANES:
            cut = n
        for t in range(grid.num_temperatures):
            contexts[n], values[n] = t, kept.tails[p, t]
            n += 1
        tail, size, next_rank = kept.tails[p, 0], kept.sizes[p], next_ranks[p]
        first, stop = stop, stop + size
        drawn_first, drawn_stop = drawn_stop, drawn_stop + kept.drawn_sizes[p]
        place, place_of_next = 0, -1
        for i in range(first, stop):
            if kept.ranks[i] == next_rank:
                place, place_of_next = 1, i
        for i in range(drawn_first, drawn_stop):
            if kept.drawn_ranks[i] == next_rank:
                place = 2
        contexts[n], values[n] = _size_context(grid, tail), size
        contexts[n + 1], values[n + 1] = _place_context(grid, size, next_rank), place
        n += 2
        mass, left, before = _first_mass(grid, tail), size, -1
        if place == 1:
            if size > 1:
                level = kept.levels[place_of_next]
                kind = grid.num_temperatures + _NEXT_LEVEL
                contexts[n] = kind + _bucket_mean(grid, mass, left)
                values[n] = level - 1
                mass -= grid.weights[level]
                n += 1
            left -= 1
        for i in range(first, stop):
            if i != place_of_next:
                contexts[n] = grid.lefts[left].gap + floor_log2(before + 2)
                values[n] = kept.ranks[i] - before - 1
                before = kept.ranks[i]
                n += 1
                if size > 1:
                    level = kept.levels[i]
                    contexts[n] = grid.lefts[left].level + _bucket_mean(grid, mass, left)
                    values[n] = _write_level(level, mass, left)
                    mass -= grid.weights[level]
                    n += 1
                left -= 1
        before = -1
        left = drawn_stop - drawn_first - (place == 2)
        for i in range(drawn_first, drawn_stop):
            if kept.drawn_ranks[i] != next_rank:
                contexts[n] = grid.lefts[left].gap + _GAP_CONTEXTS + floor_log2(before + 2)
                values[n] = kept.drawn_ranks[i] - before - 1
                before = kept.drawn_ranks[i]
                n += 1
                left -= 1
    return cut, n


# ---------------------------------------------------------------------------------------------------------
# Reading


class Rows(NamedTuple):
    """What a reader fills, P positions of at most K tokens: exact tokens first, then drawn ones.

    sizes and drawn_sizes int64 [P]; tails int64 [P, temperatures]; masses float64 [P]: what the squared levels should
    sum to, times 65,535, less what they do; ids int32 and logprobs float32 [P * K].
    """

    sizes: NDArray[np.int64]
    drawn_sizes: NDArray[np.int64]
    tails: NDArray[np.int64]
    masses: NDArray[np.float64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


class Text(NamedTuple):
    """What a reader knows of the text: ranks of its next tokens, int64 [P], and the id of each rank, int32 [V]."""

    next_ranks: NDArray[np.int64]
    ids: NDArray[np.int32]


# A lane's state while it is read: the coder's, the place of the next word and of the first one that is not its own, the
# position and the first one that is not its own, the width of a row, how many exact and drawn tokens are left of the
# position, the rank before, where the next token is put, and the mass that is left.
_OF_LANE = (
    "state",
    "word",
    "last_word",
    "position",
    "end",
    "width",
    "left",
    "drawn",
    "rank",
    "slot",
)
_LANE = np.dtype([(name, np.int64) for name in _OF_LANE] + [("mass", np.float64)])


def read_streams(
    words: NDArray[np.uint32], cut: int, lookup: Lookup, text: Text, grid: Grid, rows: Rows
) -> bool:
    """Fill `rows`; lane 0 is words[:cut], lane 1 the others.

    Returns False where the words are not what was written. Whatever they hold, nothing outside the arrays is touched.
    """
    width = len(rows.ids) // max(1, len(rows.sizes))
    # Words are counted once a position, which takes no more than one for each of its integers.
    padded = np.zeros(len(words) + 2 * (2 * width + grid.num_temperatures + 3), np.uint32)
    padded[: len(words)] = words
    lanes = np.zeros(NUM_LANES, _LANE)
    return bool(_read_lanes(lanes, padded, cut, len(words), lookup, text, grid, rows))


_DAMAGED = -1  # a lane's next word


@lean
def _read_lanes(lanes, words, cut, end, lookup, text, grid, rows):  # type: ignore[no-untyped-def]
    lanes[0].width = lanes[1].width = len(rows.ids) // max(1, len(rows.sizes))
    first, second, half = lanes[0], lanes[1], len(rows.sizes) // NUM_LANES
    _start(first, words, 0, cut, 0, half)
    _start(second, words, cut, end, half, len(rows.sizes))
    while _advance(first, words, lookup, text, grid, rows) and _advance(
        second, words, lookup, text, grid, rows
    ):
        pass
    while _advance(first, words, lookup, text, grid, rows):
        pass
    while _advance(second, words, lookup, text, grid, rows):
        pass
    if first.state != LOW or second.state != LOW or first.word != cut or second.word != end:
        return False
    _scale_rows(grid, rows)
    return True


@inlined
def _start(lane, words, first_word, last_word, first_position, end):  # type: ignore[no-untyped-def]
    high = np.int64(words[first_word + 1]) & 0x3FFFFFFF
    lane.state = np.int64(words[first_word]) | (high << 32)
    lane.word = first_word + 2
    lane.last_word = last_word
    lane.position = first_position - 1
    lane.end = end


@inlined
def _advance(lane, words, lookup, text, grid, rows):  # type: ignore[no-untyped-def]
    """Read one token, or what stands before a position's tokens; returns False at the lane's end or where damaged."""
    if lane.left > 1:  # the last one apart: one branch that a processor mispredicts, not five
        _read_exact(lane, lane.left, words, lookup, text, grid, rows)
        return True
    if lane.left == 1:
        _read_exact(lane, 1, words, lookup, text, grid, rows)
        lane.rank = -1  # drawn ones begin anew
        rows.masses[np.uint64(lane.position)] = lane.mass
        return True
    if lane.drawn > 0:
        _read_drawn(lane, words, lookup, text, grid, rows)
        return True
    if lane.position + 1 >= lane.end:
        lane.position = lane.end
        return False
    lane.position += 1
    return _read_head(lane, words, lookup, text, grid, rows)


@inlined
def _read_head(lane, words, lookup, text, grid, rows):  # type: ignore[no-untyped-def]
    """Read a position's tails, its sizes and its next token; returns False where they do not fit into the rows."""
    p, state, word = np.uint64(lane.position), lane.state, lane.word
    for t in range(grid.num_temperatures):
        state, word, tail = pull(state, word, words, t, lookup)
        rows.tails[p, t] = min(tail, TAIL_UNIT)
    tail = rows.tails[p, 0]
    state, word, size = pull(state, word, words, _size_context(grid, tail), lookup)
    drawn = count_drawn(tail, grid.draw_step)
    if size + drawn > lane.width or word > lane.last_word:
        lane.position, lane.word = lane.end, _DAMAGED
        return False
    rank = text.next_ranks[p]
    context = _place_context(grid, size, rank)
    lane.state, lane.word, place = pull(state, word, words, context, lookup)
    mass = _first_mass(grid, tail)
    rows.sizes[p], rows.drawn_sizes[p] = size, drawn
    lane.slot = lane.position * lane.width
    lane.left, lane.drawn, lane.rank = size, drawn, -1
    lane.mass = mass
    if place == 1 and size > 0:
        level = 1
        if size > 1:
            context = grid.num_temperatures + _NEXT_LEVEL + _bucket_mean(grid, mass, size)
            lane.state, lane.word, written = pull(lane.state, lane.word, words, context, lookup)
            level = written + 1
        _store(lane, rank, level, text, grid, rows)
        lane.left = size - 1
        rows.masses[p] = lane.mass
    elif size == 1:
        context = grid.lefts[1].gap  # of rank -1
        lane.state, lane.word, gap = pull(lane.state, lane.word, words, context, lookup)
        _store(lane, min(gap, len(text.ids) - 1), 1, text, grid, rows)
        lane.left = 0
        rows.masses[p] = lane.mass
    if place == 2 and drawn > 0:
        rows.ids[np.uint64(lane.position * lane.width + size + drawn - 1)] = text.ids[rank]
        lane.drawn = drawn - 1
    return True


@inlined
def _read_exact(lane, left, words, lookup, text, grid, rows):  # type: ignore[no-untyped-def]
    of_left = grid.lefts[np.uint64(left)]
    context = of_left.gap + floor_log2(lane.rank + 2)
    state, word, gap = pull(lane.state, lane.word, words, context, lookup)
    rank = min(lane.rank + gap + 1, len(text.ids) - 1)
    context = of_left.level + _bucket_mean(grid, lane.mass, left)
    lane.state, lane.word, written = pull(state, word, words, context, lookup)
    level = written + 1 if left > 1 else max(1, _read_last_level(written, lane.mass))
    _store(lane, rank, level, text, grid, rows)
    lane.rank = rank
    lane.left = left - 1


@inlined
def _store(lane, rank, level, text, grid, rows):  # type: ignore[no-untyped-def]
    slot, level = np.uint64(lane.slot), np.uint64(min(level, len(grid.weights) - 1))
    rows.ids[slot] = text.ids[np.uint64(rank)]
    rows.logprobs[slot] = grid.log_squares[level]
    lane.mass -= grid.weights[level]
    lane.slot += 1


@inlined
def _read_drawn(lane, words, lookup, text, grid, rows):  # type: ignore[no-untyped-def]
    context = grid.lefts[np.uint64(lane.drawn)].gap + _GAP_CONTEXTS + floor_log2(lane.rank + 2)
    lane.state, lane.word, gap = pull(lane.state, lane.word, words, context, lookup)
    lane.rank = min(lane.rank + gap + 1, len(text.ids) - 1)
    rows.ids[np.uint64(lane.slot)] = text.ids[np.uint64(lane.rank)]
    lane.slot += 1
    lane.drawn -= 1


@inlined
def _scale_rows(grid, rows):  # type: ignore[no-untyped-def]
    """Let exact tokens share what the tail leaves, drawn ones the tail; pad with the first id, at probability zero."""
    width = np.uint64(len(rows.ids) // max(1, len(rows.sizes)))
    for p in range(np.uint64(len(rows.sizes))):
        tail, drawn = rows.tails[p, 0], rows.drawn_sizes[p]
        first = p * width
        drawn_first = first + np.uint64(rows.sizes[p])
        padding_first, end = drawn_first + np.uint64(drawn), first + width
        squares = (_first_mass(grid, tail) - rows.masses[p]) / TAIL_UNIT
        share = (TAIL_UNIT - tail if tail < TAIL_UNIT else 0.25) / TAIL_UNIT / max(squares, 1.0)
        of_exact = np.log(np.float32(share))
        for i in range(first, drawn_first):
            rows.logprobs[i] += of_exact
        if drawn > 0:
            of_drawn = np.log(np.float32(tail / TAIL_UNIT / drawn))
            for i in range(drawn_first, padding_first):
                rows.logprobs[i] = of_drawn
        padding = rows.ids[first] if padding_first > first else np.int32(0)
        for i in range(padding_first, end):
            rows.ids[i] = padding
            rows.logprobs[i] = -np.inf
