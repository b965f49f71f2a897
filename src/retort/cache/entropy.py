"""Entropy coding of small integers, to within a percent of their entropy.

An integer is split into a *symbol* (the integer itself below 8, else its exponent and its three leading bits) and the
*low bits* below those. Both go through a range asymmetric numeral system (rANS; Duda, arXiv 1311.2540, 2013) with
static tables: a symbol is coded in a *context*, and each context has its own table of frequencies, which sum to 1,024;
low bits are coded as equally frequent.

Shapes: C contexts, S = 80 symbols, N integers. Functions marked @jit or @inlined are compiled by numba.
"""

from typing import NamedTuple

import numpy as np
import zstandard
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from retort.cache.jit import inlined, jit

NUM_SYMBOLS = 80  # integers up to 2^21 - 1
PROBABILITY_BITS = 10
SCALE = 1 << PROBABILITY_BITS
# The coder's state is in [2^30, 2^62). It moves 32 bits at a time, once for a symbol's 10 bits and up to 18 low bits.
LOW = 1 << 30
_ZSTD_LEVEL = 12  # of the tables

_SYMBOL_BITS = np.array([0 if i < 8 else (i - 4) >> 2 for i in range(NUM_SYMBOLS)], np.int64)
_SYMBOL_BASE = np.array([i if i < 8 else 4 + (i & 3) for i in range(NUM_SYMBOLS)]) << _SYMBOL_BITS
# One entry of a lookup table. Fields take fewer instructions than shifted bits.
_ENTRY = np.dtype([("frequency", "<u2"), ("start", "<u2"), ("integer", "<u4")])
_BITS_BITS = 5  # `integer`: the number of low bits in its lowest 5 bits, above them the base


@intrinsic
def _count_leading_zeros(typing_context, value):  # type: ignore[no-untyped-def]
    """One processor instruction; numba has no function for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, False))

    return types.int64(types.int64), generate


@inlined
def floor_log2(value: int) -> int:
    """Return floor(log2(value)) of an integer >= 1."""
    return 63 - _count_leading_zeros(value)


@inlined
def split(value: int) -> tuple[int, int]:
    """Return (symbol, number of low bits) of an integer below 2^21."""
    if value < 8:
        return value, 0
    bits = floor_log2(value) - 2
    return 4 + 4 * bits + ((value >> bits) & 3), bits


@jit
def _count(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], counts: NDArray[np.int64]
) -> None:
    for i in range(len(values)):
        counts[contexts[i], split(np.int64(values[i]))[0]] += 1


def count_symbols(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], *, num_contexts: int
) -> NDArray[np.int64]:
    """Return how often each symbol occurs in each context, int64 [C, S]; contexts and values are [N]."""
    counts = np.zeros((num_contexts, NUM_SYMBOLS), np.int64)
    _count(contexts, values, counts)
    return counts


def build_tables(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Return frequencies, uint16 [C, S], that sum to 1,024 in every context in use, from counts [C, S].

    A symbol that occurs at all has at least frequency 1. Integer arithmetic only: equal counts give equal tables.
    """
    tables = np.zeros(counts.shape, np.uint16)
    for context in np.flatnonzero(counts.sum(axis=1)):
        row = counts[context]
        scaled = np.where(row > 0, np.maximum(1, row * SCALE // row.sum()), 0)
        while (excess := int(scaled.sum()) - SCALE) > 0:  # rare symbols were raised to 1
            most = int(scaled.argmax())
            scaled[most] -= min(excess, max(1, int(scaled[most]) // 2))
        scaled[int(scaled.argmax())] -= excess
        tables[context] = scaled
    return tables


def pack_tables(tables: NDArray[np.uint16]) -> bytes:
    """Return tables [C, S] as they are stored: uint16, little endian, compressed by zstd."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(tables.astype("<u2").tobytes())


def unpack_tables(packed: bytes, *, num_contexts: int) -> NDArray[np.uint16]:
    """Return the tables, uint16 [C, S], that `pack_tables` packed. Raises ValueError when the bytes are damaged."""
    size = num_contexts * NUM_SYMBOLS * 2
    try:
        if zstandard.frame_content_size(packed) != size:
            raise ValueError(f"the codec's tables are not {size} bytes: the cache is damaged.")
        raw = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise ValueError(
            f"the codec's tables cannot be decompressed ({error}): the cache is damaged."
        ) from None
    tables = np.frombuffer(raw, "<u2").reshape(num_contexts, NUM_SYMBOLS)
    sums = tables.sum(axis=1, dtype=np.int64)
    if not ((sums == 0) | (sums == SCALE)).all():
        raise ValueError(f"the codec's tables do not sum to {SCALE}: the cache is damaged.")
    return tables


class Lookup(NamedTuple):
    """A decoder's tables: the symbol of each slot, uint8 [C * 1024], and the entry of each symbol, [C * 80].

    Two small tables fit a core's caches; one with an entry for each slot would not.
    """

    symbols: NDArray[np.uint8]
    entries: NDArray[np.void]


def build_lookup(tables: NDArray[np.uint16]) -> Lookup:
    """Return the decoder's tables for frequencies [C, S]."""
    symbols = np.zeros(len(tables) << PROBABILITY_BITS, np.uint8)
    entries = np.zeros(len(tables) * NUM_SYMBOLS, _ENTRY)
    _fill_lookup(tables, _SYMBOL_BITS | (_SYMBOL_BASE << _BITS_BITS), symbols, entries)
    return Lookup(symbols, entries)


@jit
def _fill_lookup(tables, integers, symbols, entries):  # type: ignore[no-untyped-def]
    """Fill both tables. Compiled because a reader that jumps between parts does this often: numpy took 10x as long."""
    for context in range(len(tables)):
        start = 0
        for symbol in range(NUM_SYMBOLS):
            frequency = np.int64(tables[context, symbol])
            if frequency > 0:
                entry = entries[context * NUM_SYMBOLS + symbol]
                entry.frequency, entry.start = frequency, start
                entry.integer = integers[symbol]
                slots = symbols[(context << PROBABILITY_BITS) + start :][:frequency]
                for slot in range(len(slots)):
                    slots[slot] = symbol
                start += frequency


def encode_words(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], lookup: Lookup
) -> NDArray[np.uint32]:
    """Return a stream of N integers as words, uint32 [at most N + 2], in reading order; the first two are the state."""
    words = np.empty(len(values) + 2, np.uint32)
    first = _encode_words(contexts, values, lookup, words)
    return words[first:]


@jit
def _encode_words(
    contexts: NDArray[np.uint16],
    values: NDArray[np.uint32],
    lookup: Lookup,
    words: NDArray[np.uint32],
) -> int:
    """Fill `words` from its end, the last integer first; return the index of the first word."""
    index = len(words)
    state = np.int64(LOW)
    for i in range(len(values) - 1, -1, -1):
        value = np.int64(values[i])
        symbol, bits = split(value)
        entry = lookup.entries[np.int64(contexts[i]) * NUM_SYMBOLS + symbol]
        frequency = np.int64(entry.frequency)
        if state >= frequency << (62 - PROBABILITY_BITS - bits):
            index -= 1
            words[index] = state & 0xFFFFFFFF
            state >>= 32
        state = (state << bits) | (value & ((1 << bits) - 1))
        state = ((state // frequency) << PROBABILITY_BITS) + state % frequency
        state += np.int64(entry.start)
    index -= 2
    words[index] = state & 0xFFFFFFFF
    words[index + 1] = state >> 32
    return index


@inlined
def pull(
    state: int, index: int, words: NDArray[np.uint32], context: int, lookup: Lookup
) -> tuple[int, int, int]:
    """Decode one integer; return the new state, the index of the next word, and the integer.

    There is no branch, since none could be predicted: words[index] is read even where it is not used, so the caller
    must ensure that it exists. Indices are unsigned, which saves numba's test for negative ones.
    """
    slot = state & (SCALE - 1)
    symbol = np.int64(lookup.symbols[np.uint64((context << PROBABILITY_BITS) + slot)])
    entry = lookup.entries[np.uint64(context * NUM_SYMBOLS + symbol)]
    state = np.int64(entry.frequency) * (state >> PROBABILITY_BITS) + slot - np.int64(entry.start)
    integer = np.int64(entry.integer)
    bits = integer & ((1 << _BITS_BITS) - 1)
    value = (integer >> _BITS_BITS) + (state & ((1 << bits) - 1))
    state >>= bits
    word = np.int64(words[np.uint64(index)])
    is_low = state < LOW
    return (state << 32) | word if is_low else state, index + np.int64(is_low), value
