"""The kept tokens of a sequence's positions as a stream of small integers: what writer and reader share.

A position keeps a set of *exact* tokens, each with a probability on the grid (level / steps)^2, and a set of *sampled*
tokens of equal weight (none unless the method is `sampled`). A token is named by its *rank* in the training text, 0 for
the most frequent: a set is written as gaps between ascending ranks, which are small where tokens are frequent.

What helps to predict an integer selects its context. Position after position:

    tail    mass outside the exact tokens in units of 1/65,535, one for each temperature
    size    number of exact tokens, given the tail
    place   of the text's own next token: 0 not kept, 1 exact, 2 sampled, given size and rank
    level   of the next token, if it is exact
    gap     to the next rank, given the rank before and how many are left (own tables for sampled tokens), and its
    level   given the mass and the number of tokens left: the mean level that they must have

The reader knows the next token, so its rank is not written. The last exact token's level is written as the difference
from what the remaining mass demands; that of a single one is 1 and not written.

The first half of a sequence's positions and the second are two *lanes*, each a stream of its own. The reader advances
them in turn, so that the processor works on two integers at a time (1.3x as fast as one lane).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.cache.entropy import floor_log2
from retort.cache.jit import inlined

TAIL_UNIT = 65_535  # the whole mass
NUM_LANES = 2
_SIZE_CONTEXTS, _PLACE_CONTEXTS = 9, 6 * 5
MAX_VOCABULARY, MAX_STEPS = 1 << 20, 1023
_LOG2_BUCKETS, _COUNT_BUCKETS = 21, 6  # a rank is below 2^20, so is a mean square
GAP_CONTEXTS = _LEVEL_CONTEXTS = _COUNT_BUCKETS * _LOG2_BUCKETS
# Where the contexts of each kind begin, after those of the tails.
_SIZE = 0
_PLACE = _SIZE + _SIZE_CONTEXTS
_GAP = _PLACE + _PLACE_CONTEXTS
_SAMPLED_GAP = _GAP + GAP_CONTEXTS
_LEVEL = _SAMPLED_GAP + GAP_CONTEXTS
NEXT_LEVEL = _LEVEL + _LOG2_BUCKETS  # after those of the last token's level


def count_contexts(num_temperatures: int) -> int:
    """Return the number of contexts of a codec that stores tails at so many temperatures."""
    return num_temperatures + _LEVEL + _LEVEL_CONTEXTS


# For each number of tokens left: where the contexts of a gap and of a level begin, and 1 / (65,535 left).
_LEFT = np.dtype([("gap", np.int64), ("level", np.int64), ("inverse", np.float64)])


class Grid(NamedTuple):
    """Constants of a codec that writer and reader share.

    sample_step: the mass of one sampled token in units of 1/65,535 (0: none are sampled); lefts [>= K + 1]: see _LEFT;
    weights float64 and log_squares float32 [steps + 2]: 65,535 times each level's square, and the log of that square
    (level 0: 0). Random rounding may go one level above `steps`.
    """

    num_temperatures: int
    steps: int
    sample_step: int
    lefts: NDArray[np.void]
    weights: NDArray[np.float64]
    log_squares: NDArray[np.float32]


@lru_cache(maxsize=32)
def build_grid(num_temperatures: int, steps: int, sample_step: int, width_bits: int) -> Grid:
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
    return Grid(num_temperatures, steps, sample_step, lefts, TAIL_UNIT * squares, log_squares)


@inlined
def _bucket_count(count: int) -> int:
    """0 for 1, then 2, 3-4, 5-8, 9-16, more."""
    return min(_COUNT_BUCKETS - 1, floor_log2(count - 1) + 1) if count > 1 else 0


@inlined
def size_context(grid: Grid, tail: int) -> int:
    return grid.num_temperatures + _SIZE + (floor_log2(max(tail, 1)) + 1) // 2


@inlined
def place_context(grid: Grid, size: int, rank: int) -> int:
    bucket = min(4, floor_log2(rank + 1) // 3)
    return grid.num_temperatures + _PLACE + _bucket_count(size) * 5 + bucket


@inlined
def bucket_mean(grid: Grid, mass: float, left: int) -> int:
    """floor(log2(1 + mean square of the levels still to come)), from a float64's exponent."""
    mean = (mass if mass > 0.0 else 0.0) * grid.lefts[np.uint64(left)].inverse
    return (np.float64(mean + 1.0).view(np.int64) >> 52) - 1023


@inlined
def compute_first_mass(grid: Grid, tail: int) -> float:
    """What a position's squared levels should sum to, times 65,535; the half keeps rounding errors off integers."""
    return np.float64((TAIL_UNIT - tail) * grid.steps * grid.steps) + 0.5


@inlined
def compute_last_level(mass: float) -> int:
    """The level that the remaining mass demands of the last token: the floor of a square root."""
    square = np.int64(mass) // TAIL_UNIT if mass > 0.0 else np.int64(0)
    root = np.int64(np.sqrt(np.float64(square)))
    return root - 1 if root * root > square else root


@inlined
def count_sampled(tail: int, step: int) -> int:
    """Return the number of sampled tokens: one for each `step` of the tail, in units of 1/65,535; 0 if step is 0."""
    # Floats divide several times as fast; the half keeps rounding errors off integers.
    return max(1, np.int64((tail + 0.5) / step)) if step > 0 and tail > 0 else 0


class Streams(NamedTuple):
    """One sequence before the tables are known: the integers of both lanes, each with its context, [I].

    Lane 1 begins at `cut`. first_tokens, tokens: how many tokens lane 0 and both lanes keep; width: the most that a
    single position keeps.
    """

    contexts: NDArray[np.uint16]
    values: NDArray[np.uint32]
    cut: int
    first_tokens: int
    tokens: int
    width: int
