"""Entropy coding of small integers, to within a percent of their entropy.

An integer is split into a *symbol* (the integer itself below 8, else its exponent and its three leading bits) and the
*low bits* below those. Both go through a range asymmetric numeral system (rANS; Duda, arXiv 1311.2540, 2013) with
static tables: a symbol is coded in a *context*, and each context has its own table of frequencies, which sum to 1,024;
low bits are coded as equally frequent.

Shapes: C contexts, S = 80 symbols, N integers. Functions marked @jit or @inlined are compiled by numba.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import zstandard
from llvmlite import ir
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


@intrinsic
def _multiply_high(typing_context, a, b):  # type: ignore[no-untyped-def]
    """The upper 64 bits of a product of two uint64: one processor instruction; numba has no function for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        wide = ir.IntType(128)
        first, second = (builder.zext(argument, wide) for argument in arguments)
        upper = builder.lshr(builder.mul(first, second), ir.Constant(wide, 64))
        return builder.trunc(upper, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@inlined
def floor_log2(value: int) -> int:
    """Return floor(log2(value)) of an integer >= 1."""
    return 63 - _count_leading_zeros(value)


@inlined
def split(value: int) -> tuple[int, int]:
    """Return (symbol, number of low bits) of an integer below 2^21.

    Without a branch, which could not be predicted: below 8 there are no low bits, and the symbol is the integer.
    """
    bits = floor_log2(value | 4) - 2
    return 4 * bits + (value >> bits), bits


@jit
def _count(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], counts: NDArray[np.int64]
) -> None:
    for i in range(len(values)):
        counts[contexts[i], split(np.int64(values[i]))[0]] += 1


def count_symbols(
    streams: Iterable[tuple[NDArray[np.uint16], NDArray[np.uint32]]], *, num_contexts: int
) -> NDArray[np.int64]:
    """Return how often each symbol occurs in each context, int64 [C, S]; contexts and values of a stream are [N]."""
    counts = np.zeros((num_contexts, NUM_SYMBOLS), np.int64)
    for contexts, values in streams:
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


# One symbol of a table, for the encoder. x // frequency = (x * reciprocal) >> (63 + shift) for every x below 2^62
# (Granlund, Montgomery, Division by Invariant Integers using Multiplication, PLDI 1994): a division takes as long as
# all else of a symbol.
_FACTOR = np.dtype(
    [("reciprocal", "<u8"), ("frequency", "<u4"), ("start", "<u2"), ("shift", "<u2")]
)


@lru_cache(maxsize=1)
def _build_reciprocals() -> NDArray[np.void]:
    """Return the reciprocal of every frequency from 1 to 1,024, [1025]."""
    factors = np.zeros(SCALE + 1, _FACTOR)
    for frequency in range(1, SCALE + 1):
        shift = (frequency - 1).bit_length()
        reciprocal = -(-(1 << (63 + shift)) // frequency)
        factors[frequency] = (reciprocal, frequency, 0, shift)
    return factors


def build_encoder(tables: NDArray[np.uint16]) -> NDArray[np.void]:
    """Return the encoder's table, [C * 80], for frequencies [C, S]."""
    encoder = _build_reciprocals()[tables.reshape(-1)]
    encoder["start"] = (np.cumsum(tables, axis=1, dtype=np.int64) - tables).reshape(-1)
    return encoder


def encode_lanes(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], cut: int, encoder: NDArray[np.void]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return two streams of integers, [:cut] and [cut:] of [N], as words uint32 in reading order.

    The first two words of a stream are the state. Both are written in turn, so that the processor works on two integers
    at a time.
    """
    first, second = np.empty(cut + 2, np.uint32), np.empty(len(values) - cut + 2, np.uint32)
    starts = _encode_lanes(contexts, values, cut, encoder, first, second)
    return first[starts[0] :], second[starts[1] :]


@jit
def _encode_lanes(contexts, values, cut, encoder, first, second):  # type: ignore[no-untyped-def]
    """Fill both lanes from their ends, the last integer first; return the indices of their first words."""
    i, j = np.int64(cut), np.int64(len(values))
    index, state = np.int64(len(first)), np.int64(LOW)
    other_index, other_state = np.int64(len(second)), np.int64(LOW)
    for _ in range(min(i, j - i)):
        i, j = i - 1, j - 1
        state, index = _push(state, index, first, contexts, values, i, encoder)
        other_state, other_index = _push(
            other_state, other_index, second, contexts, values, j, encoder
        )
    while i > 0:
        i -= 1
        state, index = _push(state, index, first, contexts, values, i, encoder)
    while j > cut:
        j -= 1
        other_state, other_index = _push(
            other_state, other_index, second, contexts, values, j, encoder
        )
    return _finish(state, index, first), _finish(other_state, other_index, second)


@inlined
def _push(state, index, words, contexts, values, i, encoder):  # type: ignore[no-untyped-def]
    """Code integer i; return the new state and the index of the first word. Without a branch, as `pull`."""
    value = np.int64(values[np.uint64(i)])
    symbol, bits = split(value)
    factor = encoder[np.uint64(np.int64(contexts[np.uint64(i)]) * NUM_SYMBOLS + symbol)]
    frequency = np.int64(factor.frequency)
    words[np.uint64(index - 1)] = state & 0xFFFFFFFF  # there is one more word than integers to come
    is_full = state >= frequency << (62 - PROBABILITY_BITS - bits)
    state = state >> 32 if is_full else state
    state = (state << bits) | (value & ((1 << bits) - 1))
    product = _multiply_high(np.uint64(state << 1), factor.reciprocal)
    quotient = np.int64(product >> np.uint64(factor.shift))
    # quotient * 1,024 + the remainder, state - quotient * frequency
    state += quotient * (SCALE - frequency) + np.int64(factor.start)
    return state, index - np.int64(is_full)


@inlined
def _finish(state, index, words):  # type: ignore[no-untyped-def]
    words[index - 2] = state & 0xFFFFFFFF
    words[index - 1] = state >> 32
    return index - 2


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
