"""Entropy coding of small integers: a stream of them takes what its statistics allow, to within a percent.

An integer is split into a *symbol* (itself when below 8, else its leading three bits' place on a quarter-octave
scale) and the bits below. Both go through a range asymmetric numeral system (rANS; Duda, arXiv 1311.2540, 2013) with
static tables: a symbol is coded in a *context*, and each context has its own table of frequencies, which sum to 1,024;
the bits below are coded as equally frequent.

Compiled by numba: the functions marked so are its subset of Python, and run at the speed of C.
"""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import xxhash
import zstandard
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

NUM_SYMBOLS = 80  # integers up to 2^21 - 1
PROBABILITY_BITS = 10
SCALE = 1 << PROBABILITY_BITS
# The coder's state lies in [2^30, 2^62); 32 bits move at a time, and once for a symbol's 10 bits and the 18 below it.
LOW = 1 << 30
_TABLE_LEVEL = 12  # zstd's


def _place_machine_code() -> None:
    """Keep compiled functions in a folder named by the digest of their sources.

    numba makes one anew when its own file changes, not when a function that was compiled into it does, which may be
    another file's: after an update, seen to decode by the old layout of a table.
    """
    here = Path(__file__).parent
    sources = b"".join((here / f"{room}.py").read_bytes() for room in ("entropy", "sparse_streams"))
    folder = here / "__pycache__" / f"compiled-{xxhash.xxh3_64_hexdigest(sources)}"
    with contextlib.suppress(OSError):  # read-only: numba finds a place of the user's
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            numba.config.CACHE_DIR = str(folder)


_place_machine_code()
# Without counted references, which took 0.6 of a decoder's time: such functions make no arrays.
lean = numba.njit(cache=True, nogil=True, _nrt=False, error_model="numpy")
inlined = numba.njit(cache=True, nogil=True, _nrt=False, error_model="numpy", forceinline=True)

_SYMBOL_BITS = np.array([0 if i < 8 else (i - 4) >> 2 for i in range(NUM_SYMBOLS)], np.int64)
_SYMBOL_BASE = np.array([i if i < 8 else 4 + (i & 3) for i in range(NUM_SYMBOLS)]) << _SYMBOL_BITS
# One entry of a lookup table. Fields take fewer instructions than shifted bits.
_ENTRY = np.dtype([("frequency", "<u2"), ("start", "<u2"), ("integer", "<u4")])
_BITS_BITS = 5  # the lowest of `integer`; above them the base


@intrinsic
def _count_leading_zeros(typing_context, value):  # type: ignore[no-untyped-def]
    """One instruction; numba has no function for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, False))

    return types.int64(types.int64), generate


@inlined
def floor_log2(value: int) -> int:
    """Return the place of an integer's highest bit. The integer is 1 at least."""
    return 63 - _count_leading_zeros(value)


@inlined
def split(value: int) -> tuple[int, int]:
    """Return (symbol, number of bits below it) of an integer."""
    if value < 8:
        return value, 0
    bits = floor_log2(value) - 2
    return 4 + 4 * bits + ((value >> bits) & 3), bits


@lean
def _count(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], counts: NDArray[np.int64]
) -> None:
    for i in range(len(values)):
        counts[contexts[i], split(np.int64(values[i]))[0]] += 1


def count_symbols(
    contexts: NDArray[np.uint16], values: NDArray[np.uint32], *, num_contexts: int
) -> NDArray[np.int64]:
    """Return how often each symbol comes in each context, [C, S]."""
    counts = np.zeros((num_contexts, NUM_SYMBOLS), np.int64)
    _count(contexts, values, counts)
    return counts


def build_tables(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Return frequencies [C, S] that sum to 1,024 in every context in use, from counts [C, S].

    A symbol that comes at all has a frequency of 1 at least. Integers throughout: equal counts, equal tables.
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
    """Return tables as they are stored: uint16, little endian, through zstd."""
    return zstandard.ZstdCompressor(level=_TABLE_LEVEL).compress(tables.astype("<u2").tobytes())


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
    tables = np.frombuffer(raw, "<u2").reshape(num_contexts, NUM_SYMBOLS)
    sums = tables.sum(axis=1, dtype=np.int64)
    if not ((sums == 0) | (sums == SCALE)).all():
        raise ValueError(f"the codec's tables do not sum to {SCALE}: the cache is damaged.")
    return tables


class Lookup(NamedTuple):
    """What a decoder reads: the symbol of each context's slots, uint8 [C * 1024], and its entry [C * 80].

    Two small tables instead of one of every slot's entry: they fit a core's caches.
    """

    symbols: NDArray[np.uint8]
    entries: NDArray[np.void]


def build_lookup(tables: NDArray[np.uint16]) -> Lookup:
    """Return a decoder's view of tables [C, S]."""
    symbols = np.zeros(len(tables) << PROBABILITY_BITS, np.uint8)
    entries = np.zeros(len(tables) * NUM_SYMBOLS, _ENTRY)
    _fill_lookup(tables, _SYMBOL_BITS | (_SYMBOL_BASE << _BITS_BITS), symbols, entries)
    return Lookup(symbols, entries)


@lean
def _fill_lookup(tables, integers, symbols, entries):  # type: ignore[no-untyped-def]
    """Numpy took 10x as long; readers that jump between many parts do this for every sequence."""
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
    """Return a stream as words, in the order in which they are read; the first two are the state."""
    words = np.empty(len(values) + 2, np.uint32)
    first = _encode_words(contexts, values, lookup, words)
    return words[first:]


@lean
def _encode_words(
    contexts: NDArray[np.uint16],
    values: NDArray[np.uint32],
    lookup: Lookup,
    words: NDArray[np.uint32],
) -> int:
    """Fill `words` from its end, the last integer first; return where they begin."""
    place = len(words)
    state = np.int64(LOW)
    for i in range(len(values) - 1, -1, -1):
        value = np.int64(values[i])
        symbol, bits = split(value)
        entry = lookup.entries[np.int64(contexts[i]) * NUM_SYMBOLS + symbol]
        frequency = np.int64(entry.frequency)
        if state >= frequency << (62 - PROBABILITY_BITS - bits):
            place -= 1
            words[place] = state & 0xFFFFFFFF
            state >>= 32
        state = (state << bits) | (value & ((1 << bits) - 1))
        state = ((state // frequency) << PROBABILITY_BITS) + state % frequency
        state += np.int64(entry.start)
    place -= 2
    words[place] = state & 0xFFFFFFFF
    words[place + 1] = state >> 32
    return place


@inlined
def pull(
    state: int, place: int, words: NDArray[np.uint32], context: int, lookup: Lookup
) -> tuple[int, int, int]:
    """Decode one integer: returns the new state, the next word's place, the integer. No branch: none is predictable.

    It reads words[place] whatever it is: the caller sees to it that there is one. Indices are unsigned, which spares
    numba's test for negative ones.
    """
    slot = state & (SCALE - 1)
    symbol = np.int64(lookup.symbols[np.uint64((context << PROBABILITY_BITS) + slot)])
    entry = lookup.entries[np.uint64(context * NUM_SYMBOLS + symbol)]
    state = np.int64(entry.frequency) * (state >> PROBABILITY_BITS) + slot - np.int64(entry.start)
    integer = np.int64(entry.integer)
    bits = integer & ((1 << _BITS_BITS) - 1)
    value = (integer >> _BITS_BITS) + (state & ((1 << bits) - 1))
    state >>= bits
    word = np.int64(words[np.uint64(place)])
    is_low = state < LOW
    return (state << 32) | word if is_low else state, place + np.int64(is_low), value
