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

from retort.cache.entropy import LOW, Lookup, floor_log2, inlined, lean, pull

TAIL_UNIT = 65_535  # the whole mass
_LEAST_UNITS = np.float32(0.25)  # a mass that rounds to none
_LN2 = np.float32(np.log(2))
_TWO, _TWO_THIRDS = np.float32(2), np.float32(2 / 3)
_TWO_FIFTHS, _TWO_SEVENTHS = np.float32(2 / 5), np.float32(2 / 7)
_TO_NEXT_OCTAVE = np.int32((1 << 23) - 0x3504F3)  # what a mantissa of sqrt(2) lacks
NUM_LANES = 2
_SIZE_CONTEXTS, _PLACE_CONTEXTS = 9, 6 * 5
MAX_VOCABULARY, MAX_STEPS = 1 << 20, 1023
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


@lru_cache(maxsize=32)
def build_grid(num_temperatures: int, steps: int, draw_step: int, width_bits: int) -> Grid:
    """Return the grid for positions that keep fewer than 2^width_bits tokens."""
    counts = np.arange(1 << width_bits)
    # As _bucket_count: the number of binary digits of count - 1.
    digits = np.frexp(np.maximum(counts - 1, 0))[1]
    buckets = np.minimum(digits, _COUNT_BUCKETS - 1)
    lefts = np.zeros(len(counts), _LEFT)
    lefts["gap"] = num_temperatures + _GAP + buckets * _LOG2_BUCKETS
    lefts["level"] = num_temperatures + _LEVEL
    lefts["level"][2:] += (1 + np.minimum(4, buckets[2:])) * _LOG2_BUCKETS
    lefts["inverse"][1:] = 1 / (TAIL_UNIT * counts[1:])
    squares = np.arange(steps + 2.0) ** 2
    log_squares = np.log(np.maximum(squares, 1)).astype(np.float32)
    return Grid(num_temperatures, steps, draw_step, lefts, TAIL_UNIT * squares, log_squares)


@inlined
def _log(x: float) -> float:
    """Natural logarithm of a float32 > 0 to 3e-7, of arithmetic alone: a loop of it becomes vectors, 5x as fast.

    x = 2^e m with m in [0.7, 1.4]; log m = 2 artanh(s) = 2 (s + s^3 / 3 + ...), s = (m - 1) / (m + 1).
    """
    bits = np.float32(x).view(np.int32)
    e = np.int32(np.int32(bits + _TO_NEXT_OCTAVE) >> np.int32(23)) - np.int32(127)
    m = np.int32(bits - np.int32(np.int32(e) << np.int32(23))).view(np.float32)
    s = (m - np.float32(1)) / (m + np.float32(1))
    z = s * s
    log_m = s * (_TWO + z * (_TWO_THIRDS + z * (_TWO_FIFTHS + z * _TWO_SEVENTHS)))
    return np.float32(e) * _LN2 + log_m


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

    Those of lane 1 begin at `cut`; tokens of lane 0, tokens of both, most tokens of one position.
    """

    contexts: NDArray[np.uint16]
    values: NDArray[np.uint32]
    cut: int
    first_tokens: int
    tokens: int
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
    counts = kept.sizes + kept.drawn_sizes
    first_tokens = int(counts[: num_positions // NUM_LANES].sum())
    return Streams(contexts[:end], values[:end], cut, first_tokens, int(counts.sum()), width)


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
    """What a reader fills: P positions that keep N tokens in all, position after position, exact ones first.

    offsets int64 [P + 1]: where each position's tokens begin; sizes int64 [P]: how many of them are exact; ids int32
    and logprobs float32 [N]; tails float32 [P, temperatures]: log of the mass outside them (not filled where tokens are
    drawn: nothing is outside).
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tails: NDArray[np.float32]


class Text(NamedTuple):
    """What a reader knows of the text: ranks of its next tokens, int64 [P], and the id of each rank, int32 [V]."""

    next_ranks: NDArray[np.int64]
    ids: NDArray[np.int32]


class Extent(NamedTuple):
    """What a record's head says: words and tokens of lane 0, tokens of both, most tokens of one position."""

    first_words: int
    first_tokens: int
    tokens: int
    width: int


class _Scratch(NamedTuple):
    """What is known of positions and tokens until both lanes are read.

    units int32 [temperatures, P]: tails in units of 1/65,535; masses float64 [P]: what the squared levels should sum
    to, times 65,535, less what they do; shares float32 [2 P]: log of what a position's exact tokens are multiplied by,
    then of what a drawn one has; owners int32 [N]: which of `shares` is a token's.
    """

    units: NDArray[np.int32]
    masses: NDArray[np.float64]
    shares: NDArray[np.float32]
    owners: NDArray[np.int32]


# A lane's state while it is read: the coder's, the place of the next word and of the first one that is not its own, the
# position and the first one that is not its own, how many exact and drawn tokens are left of the position, the rank
# before, where the next token is put, where the next position's tokens begin and the lane's end, and the mass left.
_OF_LANE = (
    "state",
    "word",
    "last_word",
    "position",
    "end",
    "left",
    "drawn",
    "rank",
    "slot",
    "next_slot",
    "last_slot",
)
_LANE = np.dtype([(name, np.int64) for name in _OF_LANE] + [("mass", np.float64)])


def read_streams(
    words: NDArray[np.uint32], extent: Extent, lookup: Lookup, text: Text, grid: Grid, rows: Rows
) -> bool:
    """Fill `rows`; lane 0 is words[: extent.first_words], lane 1 the others.

    Returns False where the words are not what was written. Whatever they hold, nothing outside the arrays is touched.
    """
    # Words are counted once a position, which takes no more than one for each of its integers.
    padded = np.zeros(len(words) + 2 * extent.width + grid.num_temperatures + 3, np.uint32)
    padded[: len(words)] = words
    num_positions = len(rows.sizes)
    scratch = _Scratch(
        units=np.empty((grid.num_temperatures, num_positions), np.int32),
        masses=np.empty(num_positions, np.float64),
        shares=np.empty(2 * num_positions, np.float32),
        owners=np.empty(extent.tokens, np.int32),
    )
    lanes = np.zeros(NUM_LANES, _LANE)
    # As plain tuples, which numba takes in a third of the time.
    of_all = map(tuple, (extent, lookup, text, grid, rows, scratch))
    return bool(_read_lanes(lanes, padded, len(words), *of_all))


_DAMAGED = -1  # a lane's next word


@lean
def _read_lanes(lanes, words, end, extent, lookup, text, grid, rows, scratch):  # type: ignore[no-untyped-def]
    extent, lookup, text = Extent(*extent), Lookup(*lookup), Text(*text)
    grid, rows, scratch = Grid(*grid), Rows(*rows), _Scratch(*scratch)
    first, second, half = lanes[0], lanes[1], len(rows.sizes) // NUM_LANES
    _start(first, words, 0, extent.first_words)
    _start(second, words, extent.first_words, end)
    first.position, first.end, first.last_slot = -1, half, extent.first_tokens
    second.position, second.end, second.last_slot = half - 1, len(rows.sizes), extent.tokens
    second.next_slot = extent.first_tokens
    read = (words, extent.width, lookup, text, grid, rows, scratch)
    while _advance(first, *read) and _advance(second, *read):
        pass
    while _advance(first, *read):
        pass
    while _advance(second, *read):
        pass
    if not _is_complete(first, extent.first_words) or not _is_complete(second, end):
        return False
    rows.offsets[len(rows.sizes)] = extent.tokens
    _scale_rows(grid, rows, scratch)
    return True


@inlined
def _start(lane, words, first_word, last_word):  # type: ignore[no-untyped-def]
    high = np.int64(words[first_word + 1]) & 0x3FFFFFFF
    lane.state = np.int64(words[first_word]) | (high << 32)
    lane.word, lane.last_word = first_word + 2, last_word


@inlined
def _is_complete(lane, last_word):  # type: ignore[no-untyped-def]
    return lane.state == LOW and lane.word == last_word and lane.next_slot == lane.last_slot


@inlined
def _advance(lane, words, width, lookup, text, grid, rows, scratch):  # type: ignore[no-untyped-def]
    """Read one token, or what stands before a position's tokens; returns False at the lane's end or where damaged."""
    if lane.left > 1:  # the last one apart: one branch that a processor mispredicts, not five
        _read_exact(lane, lane.left, words, lookup, text, grid, rows, scratch)
        return True
    if lane.left == 1:
        _read_exact(lane, 1, words, lookup, text, grid, rows, scratch)
        lane.rank = -1  # drawn ones begin anew
        scratch.masses[np.uint64(lane.position)] = lane.mass
        return True
    if lane.drawn > 0:
        _read_drawn(lane, words, lookup, text, grid, rows, scratch)
        return True
    if lane.position + 1 >= lane.end:
        lane.position = lane.end
        return False
    lane.position += 1
    return _read_head(lane, words, width, lookup, text, grid, rows, scratch)


@inlined
def _read_head(lane, words, width, lookup, text, grid, rows, scratch):  # type: ignore[no-untyped-def]
    """Read a position's tails, its sizes and its next token; returns False where they do not fit into the rows."""
    p, state, word = np.uint64(lane.position), lane.state, lane.word
    for t in range(grid.num_temperatures):
        state, word, tail = pull(state, word, words, t, lookup)
        scratch.units[t, p] = min(tail, TAIL_UNIT)
    tail = np.int64(scratch.units[0, p])
    state, word, size = pull(state, word, words, _size_context(grid, tail), lookup)
    drawn = count_drawn(tail, grid.draw_step)
    slot = lane.next_slot
    last = slot + size + drawn
    if size + drawn > width or last > lane.last_slot or word > lane.last_word:
        lane.position, lane.word = lane.end, _DAMAGED
        return False
    rank = text.next_ranks[p]
    context = _place_context(grid, size, rank)
    lane.state, lane.word, place = pull(state, word, words, context, lookup)
    mass = _first_mass(grid, tail)
    rows.offsets[p], rows.sizes[p] = slot, size
    lane.slot, lane.next_slot = slot, last
    lane.left, lane.drawn, lane.rank = size, drawn, -1
    lane.mass = mass
    if place == 1 and size > 0:
        level = 1
        if size > 1:
            context = grid.num_temperatures + _NEXT_LEVEL + _bucket_mean(grid, mass, size)
            lane.state, lane.word, written = pull(lane.state, lane.word, words, context, lookup)
            level = written + 1
        _store(lane, rank, level, text, grid, rows, scratch)
        lane.left = size - 1
        scratch.masses[p] = lane.mass
    elif size == 1:
        context = grid.lefts[1].gap  # of rank -1
        lane.state, lane.word, gap = pull(lane.state, lane.word, words, context, lookup)
        _store(lane, min(gap, len(text.ids) - 1), 1, text, grid, rows, scratch)
        lane.left = 0
        scratch.masses[p] = lane.mass
    if place == 2 and drawn > 0:
        _store_drawn(lane, last - 1, rank, text, rows, scratch)
        lane.drawn = drawn - 1
    return True


@inlined
def _read_exact(lane, left, words, lookup, text, grid, rows, scratch):  # type: ignore[no-untyped-def]
    of_left = grid.lefts[np.uint64(left)]
    context = of_left.gap + floor_log2(lane.rank + 2)
    state, word, gap = pull(lane.state, lane.word, words, context, lookup)
    rank = min(lane.rank + gap + 1, len(text.ids) - 1)
    context = of_left.level + _bucket_mean(grid, lane.mass, left)
    lane.state, lane.word, written = pull(state, word, words, context, lookup)
    level = written + 1 if left > 1 else max(1, _read_last_level(written, lane.mass))
    _store(lane, rank, level, text, grid, rows, scratch)
    lane.rank = rank
    lane.left = left - 1


@inlined
def _store(lane, rank, level, text, grid, rows, scratch):  # type: ignore[no-untyped-def]
    slot, level = np.uint64(lane.slot), np.uint64(min(level, len(grid.weights) - 1))
    rows.ids[slot] = text.ids[np.uint64(rank)]
    rows.logprobs[slot] = grid.log_squares[level]
    scratch.owners[slot] = lane.position
    lane.mass -= grid.weights[level]
    lane.slot += 1


@inlined
def _read_drawn(lane, words, lookup, text, grid, rows, scratch):  # type: ignore[no-untyped-def]
    context = grid.lefts[np.uint64(lane.drawn)].gap + _GAP_CONTEXTS + floor_log2(lane.rank + 2)
    lane.state, lane.word, gap = pull(lane.state, lane.word, words, context, lookup)
    lane.rank = min(lane.rank + gap + 1, len(text.ids) - 1)
    _store_drawn(lane, lane.slot, lane.rank, text, rows, scratch)
    lane.slot += 1
    lane.drawn -= 1


@inlined
def _store_drawn(lane, slot, rank, text, rows, scratch):  # type: ignore[no-untyped-def]
    slot = np.uint64(slot)
    rows.ids[slot] = text.ids[np.uint64(rank)]
    rows.logprobs[slot] = 0.0
    scratch.owners[slot] = lane.position + len(rows.sizes)


@inlined
def _scale_rows(grid, rows, scratch):  # type: ignore[no-untyped-def]
    """Let exact tokens share what the tail leaves, drawn ones the tail. Loops that a compiler makes vectors of."""
    num_positions = len(rows.sizes)
    for t in range(grid.num_temperatures if grid.draw_step == 0 else 0):
        units = scratch.units[t]
        for p in range(num_positions):
            rows.tails[p, t] = _log(_to_mass(units[p]))
    units = scratch.units[0]
    for p in range(num_positions):
        squares = max((_first_mass(grid, units[p]) - scratch.masses[p]) / TAIL_UNIT, 1.0)
        scratch.shares[p] = _log(_to_mass(TAIL_UNIT - units[p]) / np.float32(squares))
    for p in range(num_positions if grid.draw_step > 0 else 0):
        drawn = np.int32(rows.offsets[p + 1] - rows.offsets[p] - rows.sizes[p])
        share = _to_mass(units[p]) / max(np.float32(drawn), np.float32(1))
        scratch.shares[num_positions + p] = _log(share)
    for i in range(len(rows.ids)):
        rows.logprobs[i] += scratch.shares[np.uint64(scratch.owners[i])]


@inlined
def _to_mass(units: int) -> float:
    return max(np.float32(units), _LEAST_UNITS) / np.float32(TAIL_UNIT)
