"""Records of `top_p` and `sampled`: the selected tokens of a sequence to entropy-coded streams, and back.

Layout of a record and of its integers: docs/cache-format.md. Shapes: P positions, N exact tokens, M sampled ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from retort.cache.codec import LOGPROB_FLOOR, Codec, SparseTargets, TokenOrder
from retort.cache.entropy import (
    NUM_SYMBOLS,
    Lookup,
    build_lookup,
    build_tables,
    count_symbols,
    encode_words,
    pack_tables,
)
from retort.cache.sparse_streams import Streams, count_contexts
from retort.cache.stream_reader import DecodedRows, NextTokens, RecordHeader, read_streams
from retort.cache.stream_writer import RankedSelection, sort_rows, write_streams

_HEADER_WORDS = 4  # see RecordHeader
_STATE_WORDS = 2  # of each lane
_LEVEL_BITS = 24  # of a sorting key


@dataclass(frozen=True)
class Selection:
    """The kept tokens of P positions of one sequence, position after position.

    sizes, sampled_sizes int64 [P]: numbers of exact and of sampled tokens; ids int64 and probs float64 [N]; sampled_ids
    int64 [M]; tails int64 [P, temperatures]: mass outside the exact tokens, in units of 1/65,535.
    """

    sizes: NDArray[np.int64]
    ids: NDArray[np.int64]
    probs: NDArray[np.float64]
    sampled_sizes: NDArray[np.int64]
    sampled_ids: NDArray[np.int64]
    tails: NDArray[np.int64]

    def __getitem__(self, positions: slice) -> "Selection":
        """Return some positions, first:stop, as a selection of their own."""
        first, stop, _ = positions.indices(len(self.sizes))

        def cut(sizes: NDArray[np.int64]) -> slice:
            begin = int(sizes[:first].sum())
            return slice(begin, begin + int(sizes[first:stop].sum()))

        exact, sampled = cut(self.sizes), cut(self.sampled_sizes)
        return Selection(
            self.sizes[positions],
            self.ids[exact],
            self.probs[exact],
            self.sampled_sizes[positions],
            self.sampled_ids[sampled],
            self.tails[positions],
        )

    @classmethod
    def concatenate(cls, pieces: Sequence["Selection"]) -> "Selection":
        """Return several pieces as one, in order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in pieces]) for f in fields(cls)))


def hash_to_uniform(key: bytes, counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each counter, [N]; it depends on the counter and a sequence's content key alone.

    splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014), used as a hash.
    """
    seed = np.uint64(int.from_bytes(key[:8], "little"))
    with np.errstate(over="ignore"):
        state = seed + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    uniform: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _find_levels(
    selection: Selection, positions: NDArray[np.int64], codec: Codec, key: bytes
) -> NDArray[np.int64]:
    """Return the level of each exact token, int64 [N], at least 1; positions int64 [N]: the position of each.

    top_p rounds to the nearest step. sampled rounds up or down at random, so that the squared level is unbiased.
    """
    assert codec.steps is not None
    roots = np.sqrt(selection.probs) * codec.steps
    nearest = np.rint(roots)
    if codec.method == "sampled":
        below = np.floor(roots)
        share = (roots**2 - below**2) / (2 * below + 1)
        # Counters below 2^32 belong to the sampling of tokens (teacher.selection), one for each position.
        uniform = hash_to_uniform(key, (positions + 1) * (1 << 32) + selection.ids)
        nearest = below + (uniform < share)
    levels: NDArray[np.int64] = np.maximum(nearest, 1).astype(np.int64)
    return levels


def to_streams(
    selection: Selection,
    codec: Codec,
    order: TokenOrder,
    *,
    next_ids: NDArray[np.int32],
    key: bytes,
) -> Streams:
    """Return the kept tokens of one sequence as streams; next_ids int32 [P]: the text's next tokens; `key`: its key."""
    positions = np.repeat(np.arange(len(selection.sizes)), selection.sizes)
    levels = _find_levels(selection, positions, codec, key)
    keys = (order.ranks[selection.ids] << _LEVEL_BITS) | levels
    sort_rows(selection.sizes, keys)
    sampled_ranks = order.ranks[selection.sampled_ids]
    sort_rows(selection.sampled_sizes, sampled_ranks)
    ranked = RankedSelection(
        sizes=selection.sizes,
        ranks=keys >> _LEVEL_BITS,
        levels=keys & ((1 << _LEVEL_BITS) - 1),
        sampled_sizes=selection.sampled_sizes,
        sampled_ranks=sampled_ranks,
        tails=selection.tails,
    )
    width = int((selection.sizes + selection.sampled_sizes).max(initial=1))
    return write_streams(ranked, order.ranks[next_ids], codec.build_grid(width=width), width=width)


def encode_streams(sequences: Sequence[Streams], codec: Codec) -> tuple[list[bytes], bytes]:
    """Return a record for each sequence, and the packed tables, made for these sequences, that they are coded with."""
    num_contexts = count_contexts(len(codec.temperatures))
    counts = np.zeros((num_contexts, NUM_SYMBOLS), np.int64)
    for s in sequences:
        counts += count_symbols(s.contexts, s.values, num_contexts=num_contexts)
    tables = build_tables(counts)
    lookup = build_lookup(tables)
    return [_encode_record(s, lookup) for s in sequences], pack_tables(tables)


def _encode_record(streams: Streams, lookup: Lookup) -> bytes:
    cut = streams.cut
    first = encode_words(streams.contexts[:cut], streams.values[:cut], lookup)
    second = encode_words(streams.contexts[cut:], streams.values[cut:], lookup)
    header = np.array([len(first), streams.first_tokens, streams.tokens, streams.width])
    return np.concatenate([header, first, second]).astype("<u4").tobytes()


def decode_streams(
    record: bytes,
    codec: Codec,
    order: TokenOrder,
    lookup: Lookup,
    *,
    next_ids: NDArray[np.int32],
) -> SparseTargets:
    """Decode one record of `encode_streams`: the distributions of P positions, exact tokens before sampled ones.

    next_ids int32 [P]: the text's own next tokens, which are not in the record. Raises ValueError when the bytes are
    damaged.
    """
    num_positions, num_temperatures = len(next_ids), len(codec.temperatures)
    words = np.frombuffer(record, "<u4", count=len(record) // 4)
    start, lanes = words[:_HEADER_WORDS].tolist(), words[_HEADER_WORDS:]
    is_whole = len(start) == _HEADER_WORDS and len(record) % 4 == 0
    header = RecordHeader(*start) if is_whole else None
    if header is None or not _is_possible(header, codec, len(lanes), num_positions):
        raise ValueError("a record's sizes do not fit its length: the cache is damaged.")
    rows = DecodedRows(
        offsets=np.empty(num_positions + 1, np.int64),
        sizes=np.empty(num_positions, np.int64),
        ids=np.empty(header.tokens, np.int32),
        logprobs=np.empty(header.tokens, np.float32),
        tails=np.empty((num_positions, num_temperatures), np.float32),
    )
    next_tokens = NextTokens(order.ranks[next_ids], order.ids)
    grid = codec.build_grid(width=header.width)
    if not read_streams(lanes, header, lookup, next_tokens, grid, rows):
        raise ValueError("a record does not end where it should: the cache is damaged.")
    num_exact = None
    if codec.method == "sampled":
        rows.tails.fill(LOGPROB_FLOOR)
        num_exact = rows.sizes
    return SparseTargets(rows.offsets, rows.ids, rows.logprobs, rows.tails, num_exact)


def _is_possible(header: RecordHeader, codec: Codec, num_words: int, num_positions: int) -> bool:
    """Say whether a record of that many words and positions can have this header."""
    return (
        _STATE_WORDS <= header.first_words <= num_words - _STATE_WORDS
        and header.width <= codec.vocabulary
        and header.first_tokens <= header.tokens <= header.width * num_positions
    )
