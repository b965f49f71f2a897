"""Entropy coding of small integers: a stream of them takes what its statistics allow, to within a percent.

An integer is split into a *symbol* (itself when below 8, else its leading three bits' place on a quarter-octave
scale) and the bits below, which are written as they are. Symbols go through a range asymmetric numeral system (rANS;
Duda, arXiv 1311.2540, 2013) with static tables: each is coded in a *context*, and each context has its own table of
frequencies, which sum to 2,048.

Compiled by numba: the functions marked so are its subset of Python, and run at the speed of C.
"""

import numba
import numpy as np
import zstandard
from numpy.typing import NDArray

NUM_SYMBOLS = 80  # integers up to 2^21 - 1
PROBABILITY_BITS = 11
_SCALE = 1 << PROBABILITY_BITS
_LOW = 1 << 16  # the coder's state lies in [2^16, 2^32), and 16 bits move at a time
# One entry of a lookup table: symbol in 7 bits, frequency in 12, slot's distance from the symbol's first one in 12.
_FREQUENCY_SHIFT, _DISTANCE_SHIFT = 7, 19
PAD_BYTES = 16  # what a reader may touch behind a stream's end

compiled = numba.njit(cache=True, nogil=True)
inlined = numba.njit(cache=True, nogil=True, inline="always")

_LOG2 = np.array([0, *((i.bit_length() - 1) for i in range(1, 4096))], np.uint8)
_SYMBOL_BASE = np.array([i if i < 8 else 4 + (i & 3) for i in range(NUM_SYMBOLS)], np.uint8)
_SYMBOL_BITS = np.array([0 if i < 8 else (i - 4) >> 2 for i in range(NUM_SYMBOLS)], np.uint8)


@compiled
def floor_log2(value: int) -> int:
    """Return the place of an integer's highest bit; 0 for 0. The integer is below 2^24."""
    if value < 4096:
        return np.int64(_LOG2[value])
    return 12 + np.int64(_LOG2[value >> 12])


@compiled
def split(value: int) -> tuple[int, int]:
    """Return (symbol, number of bits below it) of an integer."""
    if value < 8:
        return value, 0
    bits = floor_log2(value) - 2
    return 4 + 4 * bits + ((value >> bits) & 3), bits


@compiled
def _find_symbols(values: NDArray[np.uint32]) -> NDArray[np.uint8]:
    symbols = np.empty(len(values), np.uint8)
    for i in range(len(values)):
        symbols[i] = split(np.int64(values[i]))[0]
    return symbols


def count_symbols(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], *, num_contexts: int
) -> NDArray[np.int64]:
    """Return how often each symbol comes in each context, [C, S]."""
    places = contexts.astype(np.int64) * NUM_SYMBOLS + _find_symbols(values)
    counts = np.bincount(places, minlength=num_contexts * NUM_SYMBOLS)
    return counts.reshape(num_contexts, NUM_SYMBOLS).astype(np.int64)


def build_tables(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Return frequencies [C, S] that sum to 2,048 in every context in use, from counts [C, S].

    A symbol that comes at all has a frequency of 1 at least. Integers throughout: equal counts, equal tables.
    """
    tables = np.zeros(counts.shape, np.uint16)
    for context in np.flatnonzero(counts.sum(axis=1)):
        row = counts[context]
        scaled = np.where(row > 0, np.maximum(1, row * _SCALE // row.sum()), 0)
        while (excess := int(scaled.sum()) - _SCALE) > 0:  # rare symbols were raised to 1
            most = int(scaled.argmax())
            scaled[most] -= min(excess, max(1, int(scaled[most]) // 2))
        scaled[int(scaled.argmax())] -= excess
        tables[context] = scaled
    return tables


def pack_tables(tables: NDArray[np.uint16]) -> bytes:
    """Return tables as they are stored: uint16, little endian, through zstd."""
    return zstandard.ZstdCompressor(level=19).compress(tables.astype("<u2").tobytes())


def unpack_tables(packed: bytes, *, num_contexts: int) -> NDArray[np.uint16]:
    """Return the tables [C, S] that `pack_tables` packed. Raises ValueError when the bytes are no such tables."""
    size = num_contexts * NUM_SYMBOLS * 2
    try:
        if zstandard.frame_content_size(packed) != size:
            raise ValueError(f"the codec's tables are not {size} bytes: the cache is damaged.")
        raw = zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise ValueError(
            f"the codec's tables do not unpack ({error}): the cache is damaged."
        ) from None
    tables = np.frombuffer(raw, "<u2").reshape(num_contexts, NUM_SYMBOLS).astype(np.uint16)
    if not np.isin(tables.sum(axis=1), (0, _SCALE)).all():
        raise ValueError(f"the codec's tables do not sum to {_SCALE}: the cache is damaged.")
    return tables


def _find_starts(tables: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return (np.cumsum(tables, axis=1, dtype=np.int64) - tables).astype(np.uint16)


@compiled
def build_lookup(tables: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Return for every context and slot what a decoder needs, [C, 2048]."""
    lookup = np.zeros((tables.shape[0], _SCALE), np.uint32)
    for context in range(tables.shape[0]):
        slot = 0
        for symbol in range(NUM_SYMBOLS):
            frequency = np.uint32(tables[context, symbol])
            entry = np.uint32(symbol) | (frequency << np.uint32(_FREQUENCY_SHIFT))
            for distance in range(frequency):
                lookup[context, slot] = entry | (np.uint32(distance) << np.uint32(_DISTANCE_SHIFT))
                slot += 1
    return lookup


def encode_words(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], tables: NDArray[np.uint16]
) -> NDArray[np.uint16]:
    """Return a stream's symbols as words, in the order in which they are read; the first two are the state."""
    words: NDArray[np.uint16] = _encode_words(contexts, values, tables, _find_starts(tables))
    return words


@compiled
def _encode_words(
    contexts: NDArray[np.uint16],
    values: NDArray[np.uint32],
    tables: NDArray[np.uint16],
    starts: NDArray[np.uint16],
) -> NDArray[np.uint16]:
    words = np.empty(
        len(values) + 2, np.uint16
    )  # filled from the end: the last symbol is coded first
    place = len(words)
    state = np.int64(_LOW)
    for i in range(len(values) - 1, -1, -1):
        symbol = split(np.int64(values[i]))[0]
        frequency = np.int64(tables[contexts[i], symbol])
        if state >= frequency << (32 - PROBABILITY_BITS):
            place -= 1
            words[place] = state & 0xFFFF
            state >>= 16
        state = ((state // frequency) << PROBABILITY_BITS) + state % frequency
        state += np.int64(starts[contexts[i], symbol])
    place -= 2
    words[place] = state & 0xFFFF
    words[place + 1] = state >> 16
    return words[place:].copy()


@compiled
def encode_bits(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the bits below a stream's symbols, packed from the lowest bit of the first word on."""
    total = 0
    for i in range(len(values)):
        total += split(np.int64(values[i]))[1]
    words = np.zeros((total >> 5) + 2, np.uint32)
    place = 0
    for i in range(len(values)):
        bits = split(np.int64(values[i]))[1]
        low = np.uint64(values[i]) & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
        shifted = low << np.uint64(place & 31)
        words[place >> 5] |= np.uint32(shifted & np.uint64(0xFFFFFFFF))
        words[(place >> 5) + 1] |= np.uint32(shifted >> np.uint64(32))
        place += bits
    return words[: (total + 31) >> 5].copy()


@inlined
def pull_symbol(
    state: int, place: int, words: NDArray[np.uint16], context: int, lookup: NDArray[np.uint32]
) -> tuple[int, int, int]:
    """Decode one symbol: returns the new state, the next word's place, the symbol. No branch: none is predictable."""
    entry = np.int64(lookup[context, state & (_SCALE - 1)])
    frequency = (entry >> _FREQUENCY_SHIFT) & 0xFFF
    state = frequency * (state >> PROBABILITY_BITS) + (entry >> _DISTANCE_SHIFT)
    is_low = np.int64(state < _LOW)
    state = (state << (16 * is_low)) | (np.int64(words[place]) * is_low)
    return state, place + is_low, entry & 0x7F


@inlined
def pull_bits(symbol: int, words: NDArray[np.uint32], place: int) -> tuple[int, int]:
    """Return (integer, place of the next bit): a symbol's integer with the bits below it."""
    bits = np.int64(_SYMBOL_BITS[symbol])
    window = np.uint64(words[place >> 5]) | (np.uint64(words[(place >> 5) + 1]) << np.uint64(32))
    low = np.int64(window >> np.uint64(place & 31)) & ((1 << bits) - 1)
    return (np.int64(_SYMBOL_BASE[symbol]) << bits) | low, place + bits
