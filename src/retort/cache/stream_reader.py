"""Read the kept tokens of a sequence's positions back from a stream of small integers (the order: `sparse_streams`).

Two lanes are read in turn, and rows are scaled to their masses at the end. Untyped functions are compiled by numba.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.cache.entropy import LOW, Lookup, floor_log2, pull
from retort.cache.jit import inlined, jit
from retort.cache.sparse_streams import (
    GAP_CONTEXTS,
    NEXT_LEVEL,
    NUM_LANES,
    TAIL_UNIT,
    Grid,
    bucket_mean,
    compute_first_mass,
    compute_last_level,
    count_sampled,
    place_context,
    size_context,
)

_LEAST_UNITS = np.float32(0.25)  # a mass that rounds to none
_LN2 = np.float32(np.log(2))
_TWO, _TWO_THIRDS = np.float32(2), np.float32(2 / 3)
_TWO_FIFTHS, _TWO_SEVENTHS = np.float32(2 / 5), np.float32(2 / 7)
_TO_NEXT_OCTAVE = np.int32((1 << 23) - 0x3504F3)  # what a mantissa of sqrt(2) lacks


class DecodedRows(NamedTuple):
    """Output of the reader: P positions that keep N tokens in all, position after position, exact ones first.

    offsets int64 [P + 1]: where each position's tokens begin; sizes int64 [P]: how many of them are exact; ids int32
    and logprobs float32 [N]; tails float32 [P, temperatures]: log of the mass outside them (not filled where tokens are
    sampled: nothing is outside).
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tails: NDArray[np.float32]


class NextTokens(NamedTuple):
    """What the reader knows: ranks of the text's own next tokens, int64 [P], and the id of each rank, int32 [V]."""

    ranks: NDArray[np.int64]
    ids: NDArray[np.int32]


class RecordHeader(NamedTuple):
    """Start of a record: words and tokens of lane 0, tokens of both lanes, most tokens of one position."""

    first_words: int
    first_tokens: int
    tokens: int
    width: int


class _Scratch(NamedTuple):
    """Intermediate results, until both lanes are read.

    units int32 [temperatures, P]: tails in units of 1/65,535; masses float64 [P]: 65,535 times what the squared levels
    should sum to minus what they do sum to; shares float32 [2 P]: log of the factor of each position's exact tokens,
    then log of the probability of each of its sampled ones; owners int32 [N]: each token's index in `shares`.
    """

    units: NDArray[np.int32]
    masses: NDArray[np.float64]
    shares: NDArray[np.float32]
    owners: NDArray[np.int32]


# A lane while it is read.
_LANE = np.dtype(
    [
        ("state", np.int64),  # the coder's
        ("word", np.int64),  # index of the next word
        ("last_word", np.int64),  # index after the lane's last word
        ("position", np.int64),
        ("end", np.int64),  # index after the lane's last position
        ("left", np.int64),  # exact tokens of the position still to come
        ("sampled", np.int64),  # sampled tokens of the position still to come
        ("rank", np.int64),  # of the token before, -1 at the beginning
        ("slot", np.int64),  # index of the next token in the output
        ("next_slot", np.int64),  # where the next position's tokens begin
        ("last_slot", np.int64),  # where the lane's tokens end
        (
            "mass",
            np.float64,
        ),  # 65,535 times what the squares of the levels still to come should sum to
    ]
)


def read_streams(
    words: NDArray[np.uint32],
    header: RecordHeader,
    lookup: Lookup,
    next_tokens: NextTokens,
    grid: Grid,
    rows: DecodedRows,
) -> bool:
    """Fill `rows` from words, uint32 [W]: lane 0 is words[: header.first_words], lane 1 the others.

    Returns False where the words are not what was written. Whatever they hold, nothing outside the arrays is touched.
    """
    # Bounds are checked once a position, which takes at most one word for each of its integers.
    padded = np.zeros(len(words) + 2 * header.width + grid.num_temperatures + 3, np.uint32)
    padded[: len(words)] = words
    num_positions = len(rows.sizes)
    scratch = _Scratch(
        units=np.empty((grid.num_temperatures, num_positions), np.int32),
        masses=np.empty(num_positions, np.float64),
        shares=np.empty(2 * num_positions, np.float32),
        owners=np.empty(header.tokens, np.int32),
    )
    lanes = np.zeros(NUM_LANES, _LANE)
    lanes["last_word"] = header.first_words, len(words)
    # As plain tuples, which numba takes in a third of the time.
    arguments = map(tuple, (header, lookup, next_tokens, grid, rows, scratch))
    return bool(_read_lanes(lanes, padded, *arguments))


_DAMAGED = -1  # as a lane's next word


@jit
def _read_lanes(lanes, words, header, lookup, next_tokens, grid, rows, scratch):  # type: ignore[no-untyped-def]
    header, lookup, next_tokens = RecordHeader(*header), Lookup(*lookup), NextTokens(*next_tokens)
    grid, rows, scratch = Grid(*grid), DecodedRows(*rows), _Scratch(*scratch)
    first, second, half = lanes[0], lanes[1], len(rows.sizes) // NUM_LANES
    _start(first, words, 0)
    _start(second, words, header.first_words)
    first.position, first.end, first.last_slot = -1, half, header.first_tokens
    second.position, second.end, second.last_slot = half - 1, len(rows.sizes), header.tokens
    second.next_slot = header.first_tokens
    read = (words, header.width, lookup, next_tokens, grid, rows, scratch)
    while _advance(first, *read) and _advance(second, *read):
        pass
    while _advance(first, *read):
        pass
    while _advance(second, *read):
        pass
    if not _is_complete(first) or not _is_complete(second):
        return False
    rows.offsets[len(rows.sizes)] = header.tokens
    _scale_rows(grid, rows, scratch)
    return True


@inlined
def _start(lane, words, first_word):  # type: ignore[no-untyped-def]
    high = np.int64(words[first_word + 1]) & 0x3FFFFFFF
    lane.state = np.int64(words[first_word]) | (high << 32)
    lane.word = first_word + 2


@inlined
def _is_complete(lane):  # type: ignore[no-untyped-def]
    return lane.state == LOW and lane.word == lane.last_word and lane.next_slot == lane.last_slot


@inlined
def _advance(lane, words, width, lookup, next_tokens, grid, rows, scratch):  # type: ignore[no-untyped-def]
    """Read one token, or the beginning of a position; return False at the lane's end or where it is damaged."""
    if lane.left > 1:  # the last one separately: one branch that a processor mispredicts, not five
        _read_exact(lane, lane.left, words, lookup, next_tokens, grid, rows, scratch)
        return True
    if lane.left == 1:
        _read_exact(lane, 1, words, lookup, next_tokens, grid, rows, scratch)
        lane.rank = -1  # gaps of sampled tokens start over
        scratch.masses[np.uint64(lane.position)] = lane.mass
        return True
    if lane.sampled > 0:
        _read_sampled(lane, words, lookup, next_tokens, grid, rows, scratch)
        return True
    if lane.position + 1 >= lane.end:
        lane.position = lane.end
        return False
    lane.position += 1
    return _read_beginning(lane, words, width, lookup, next_tokens, grid, rows, scratch)


@inlined
def _read_beginning(lane, words, width, lookup, next_tokens, grid, rows, scratch):  # type: ignore[no-untyped-def]
    """Read a position's tails, sizes and next token; return False where its tokens do not fit into the rows."""
    p, state, word = np.uint64(lane.position), lane.state, lane.word
    for t in range(grid.num_temperatures):
        state, word, tail = pull(state, word, words, t, lookup)
        scratch.units[t, p] = min(tail, TAIL_UNIT)
    tail = np.int64(scratch.units[0, p])
    state, word, size = pull(state, word, words, size_context(grid, tail), lookup)
    sampled = count_sampled(tail, grid.sample_step)
    slot = lane.next_slot
    last = slot + size + sampled
    if size + sampled > width or last > lane.last_slot or word > lane.last_word:
        lane.position, lane.word = lane.end, _DAMAGED
        return False
    rank = next_tokens.ranks[p]
    context = place_context(grid, size, rank)
    lane.state, lane.word, place = pull(state, word, words, context, lookup)
    mass = compute_first_mass(grid, tail)
    rows.offsets[p], rows.sizes[p] = slot, size
    lane.slot, lane.next_slot = slot, last
    lane.left, lane.sampled, lane.rank = size, sampled, -1
    lane.mass = mass
    if place == 1 and size > 0:
        level = 1
        if size > 1:
            context = grid.num_temperatures + NEXT_LEVEL + bucket_mean(grid, mass, size)
            lane.state, lane.word, written = pull(lane.state, lane.word, words, context, lookup)
            level = written + 1
        _store(lane, rank, level, next_tokens, grid, rows, scratch)
        lane.left = size - 1
        scratch.masses[p] = lane.mass
    elif size == 1:
        context = grid.lefts[1].gap  # of rank -1
        lane.state, lane.word, gap = pull(lane.state, lane.word, words, context, lookup)
        _store(lane, min(gap, len(next_tokens.ids) - 1), 1, next_tokens, grid, rows, scratch)
        lane.left = 0
        scratch.masses[p] = lane.mass
    if place == 2 and sampled > 0:
        _store_sampled(lane, last - 1, rank, next_tokens, rows, scratch)
        lane.sampled = sampled - 1
    return True


@inlined
def _read_exact(lane, left, words, lookup, next_tokens, grid, rows, scratch):  # type: ignore[no-untyped-def]
    of_left = grid.lefts[np.uint64(left)]
    context = of_left.gap + floor_log2(lane.rank + 2)
    state, word, gap = pull(lane.state, lane.word, words, context, lookup)
    rank = min(lane.rank + gap + 1, len(next_tokens.ids) - 1)
    context = of_left.level + bucket_mean(grid, lane.mass, left)
    lane.state, lane.word, written = pull(state, word, words, context, lookup)
    level = written + 1 if left > 1 else max(1, _read_last_level(written, lane.mass))
    _store(lane, rank, level, next_tokens, grid, rows, scratch)
    lane.rank = rank
    lane.left = left - 1


@inlined
def _store(lane, rank, level, next_tokens, grid, rows, scratch):  # type: ignore[no-untyped-def]
    slot, level = np.uint64(lane.slot), np.uint64(min(level, len(grid.weights) - 1))
    rows.ids[slot] = next_tokens.ids[np.uint64(rank)]
    rows.logprobs[slot] = grid.log_squares[level]
    scratch.owners[slot] = lane.position
    lane.mass -= grid.weights[level]
    lane.slot += 1


@inlined
def _read_sampled(lane, words, lookup, next_tokens, grid, rows, scratch):  # type: ignore[no-untyped-def]
    context = grid.lefts[np.uint64(lane.sampled)].gap + GAP_CONTEXTS + floor_log2(lane.rank + 2)
    lane.state, lane.word, gap = pull(lane.state, lane.word, words, context, lookup)
    lane.rank = min(lane.rank + gap + 1, len(next_tokens.ids) - 1)
    _store_sampled(lane, lane.slot, lane.rank, next_tokens, rows, scratch)
    lane.slot += 1
    lane.sampled -= 1


@inlined
def _store_sampled(lane, slot, rank, next_tokens, rows, scratch):  # type: ignore[no-untyped-def]
    slot = np.uint64(slot)
    rows.ids[slot] = next_tokens.ids[np.uint64(rank)]
    rows.logprobs[slot] = 0.0
    scratch.owners[slot] = lane.position + len(rows.sizes)


@inlined
def _scale_rows(grid, rows, scratch):  # type: ignore[no-untyped-def]
    """Scale exact tokens to the mass that the tail leaves, sampled ones to the tail. These loops are vectorized."""
    num_positions = len(rows.sizes)
    for t in range(grid.num_temperatures if grid.sample_step == 0 else 0):
        units = scratch.units[t]
        for p in range(num_positions):
            rows.tails[p, t] = _log(_to_mass(units[p]))
    units = scratch.units[0]
    for p in range(num_positions):
        squares = max((compute_first_mass(grid, units[p]) - scratch.masses[p]) / TAIL_UNIT, 1.0)
        scratch.shares[p] = _log(_to_mass(TAIL_UNIT - units[p]) / np.float32(squares))
    for p in range(num_positions if grid.sample_step > 0 else 0):
        sampled = np.int32(rows.offsets[p + 1] - rows.offsets[p] - rows.sizes[p])
        share = _to_mass(units[p]) / max(np.float32(sampled), np.float32(1))
        scratch.shares[num_positions + p] = _log(share)
    for i in range(len(rows.ids)):
        rows.logprobs[i] += scratch.shares[np.uint64(scratch.owners[i])]


@inlined
def _to_mass(units: int) -> float:
    return max(np.float32(units), _LEAST_UNITS) / np.float32(TAIL_UNIT)


@inlined
def _read_last_level(written: int, mass: float) -> int:
    difference = -((written + 1) >> 1) if written & 1 else written >> 1
    return compute_last_level(mass) + difference


@inlined
def _log(x: float) -> float:
    """Natural logarithm of a float32 > 0 to 3e-7, by arithmetic alone: loops of it are vectorized, 5x as fast.

    x = 2^e m with m in [0.7, 1.4]; log m = 2 artanh(s) = 2 (s + s^3 / 3 + ...), s = (m - 1) / (m + 1).
    """
    bits = np.float32(x).view(np.int32)
    e = np.int32(np.int32(bits + _TO_NEXT_OCTAVE) >> np.int32(23)) - np.int32(127)
    m = np.int32(bits - np.int32(np.int32(e) << np.int32(23))).view(np.float32)
    s = (m - np.float32(1)) / (m + np.float32(1))
    z = s * s
    log_m = s * (_TWO + z * (_TWO_THIRDS + z * (_TWO_FIFTHS + z * _TWO_SEVENTHS)))
    return np.float32(e) * _LN2 + log_m
