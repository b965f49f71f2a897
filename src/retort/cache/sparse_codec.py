"""Records of `top_p` and `sampled`: what was selected of a sequence becomes entropy-coded streams, and back.

Layout of a record and of its integers: docs/cache-format.md.
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
from retort.cache.sparse_streams import (
    Extent,
    Kept,
    Rows,
    Streams,
    Text,
    count_contexts,
    read_streams,
    sort_rows,
    write_streams,
)

_HEAD_WORDS = 4  # see Extent
_STATE_WORDS = 2  # of each lane
_LEVEL_BITS = 24  # of a sorting key


@dataclass(frozen=True)
class Selection:
    """What is kept of P positions of one sequence, ragged: N exact tokens and M drawn ones, position after position.

    sizes and drawn_sizes int64 [P]; ids int64 and probs float64 [N]; drawn_ids int64 [M]; tails int64
    [P, temperatures]: mass outside the exact tokens at each temperature, in units of 1/65,535.
    """

    sizes: NDArray[np.int64]
    ids: NDArray[np.int64]
    probs: NDArray[np.float64]
    drawn_sizes: NDArray[np.int64]
    drawn_ids: NDArray[np.int64]
    tails: NDArray[np.int64]

    def __getitem__(self, positions: slice) -> "Selection":
        """Return some positions, first:stop, as a selection of their own."""
        first, stop, _ = positions.indices(len(self.sizes))

        def cut(sizes: NDArray[np.int64]) -> slice:
            begin = int(sizes[:first].sum())
            return slice(begin, begin + int(sizes[first:stop].sum()))

        kept, drawn = cut(self.sizes), cut(self.drawn_sizes)
        return Selection(
            self.sizes[positions],
            self.ids[kept],
            self.probs[kept],
            self.drawn_sizes[positions],
            self.drawn_ids[drawn],
            self.tails[positions],
        )

    @classmethod
    def concatenate(cls, pieces: Sequence["Selection"]) -> "Selection":
        """Return several pieces as one, in order."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in pieces]) for f in fields(cls)))


def draw_uniform(key: bytes, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return numbers in [0, 1) that depend on a sequence's content key and on a place in it alone.

    splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014) as a hash: no number depends
    on which others were asked for.
    """
    seed = np.uint64(int.from_bytes(key[:8], "little"))
    with np.errstate(over="ignore"):
        state = seed + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    uniform: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _find_levels(
    selection: Selection, positions: NDArray[np.int64], codec: Codec, key: bytes
) -> NDArray[np.int64]:
    """Return each exact token's level, 1 at least.

    top_p takes the nearest root. sampled rounds up or down by chance, so that the expectation of the squared level is
    the probability: no bias.
    """
    assert codec.steps is not None
    roots = np.sqrt(selection.probs) * codec.steps
    nearest = np.rint(roots)
    if codec.method == "sampled":
        below = np.floor(roots)
        share = (roots**2 - below**2) / (2 * below + 1)
        # Places of the first 2^32 are those of the draws (room `selection`), one for each position.
        chance = draw_uniform(key, (positions + 1) * (1 << 32) + selection.ids)
        nearest = below + (chance < share)
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
    """Return what is kept of one sequence as streams; `next_ids` [P]: the text's own tokens, `key`: its content key."""
    positions = np.repeat(np.arange(len(selection.sizes)), selection.sizes)
    levels = _find_levels(selection, positions, codec, key)
    keys = (order.ranks[selection.ids] << _LEVEL_BITS) | levels
    sort_rows(selection.sizes, keys)
    drawn_ranks = order.ranks[selection.drawn_ids]
    sort_rows(selection.drawn_sizes, drawn_ranks)
    kept = Kept(
        sizes=selection.sizes,
        ranks=keys >> _LEVEL_BITS,
        levels=keys & ((1 << _LEVEL_BITS) - 1),
        drawn_sizes=selection.drawn_sizes,
        drawn_ranks=drawn_ranks,
        tails=selection.tails,
    )
    width = int((selection.sizes + selection.drawn_sizes).max(initial=1))
    return write_streams(kept, order.ranks[next_ids], codec.build_grid(width=width), width=width)


def encode_streams(sequences: Sequence[Streams], codec: Codec) -> tuple[list[bytes], bytes]:
    """Return the records of some sequences, and the tables that they were coded with, made for them."""
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
    head = np.array([len(first), streams.first_tokens, streams.tokens, streams.width])
    return np.concatenate([head, first, second]).astype("<u4").tobytes()


def decode_streams(
    record: bytes,
    codec: Codec,
    order: TokenOrder,
    lookup: Lookup,
    *,
    next_ids: NDArray[np.int32],
) -> SparseTargets:
    """Decode one record of `encode_streams`. Raises ValueError when the bytes are no such record."""
    num_positions, num_temperatures = len(next_ids), len(codec.temperatures)
    words = np.frombuffer(record, "<u4", count=len(record) // 4)
    head, lanes = words[:_HEAD_WORDS].tolist(), words[_HEAD_WORDS:]
    extent = Extent(*head) if len(head) == _HEAD_WORDS and len(record) % 4 == 0 else None
    if extent is None or not _is_possible(extent, codec, len(lanes), num_positions):
        raise ValueError("a record is shorter than it says: the cache is damaged.")
    rows = Rows(
        offsets=np.empty(num_positions + 1, np.int64),
        sizes=np.empty(num_positions, np.int64),
        ids=np.empty(extent.tokens, np.int32),
        logprobs=np.empty(extent.tokens, np.float32),
        tails=np.empty((num_positions, num_temperatures), np.float32),
    )
    text, grid = Text(order.ranks[next_ids], order.ids), codec.build_grid(width=extent.width)
    if not read_streams(lanes, extent, lookup, text, grid, rows):
        raise ValueError("a record does not end as it must: the cache is damaged.")
    num_exact = None
    if codec.method == "sampled":
        rows.tails.fill(LOGPROB_FLOOR)
        num_exact = rows.sizes
    return SparseTargets(rows.offsets, rows.ids, rows.logprobs, rows.tails, num_exact)


def _is_possible(extent: Extent, codec: Codec, num_words: int, num_positions: int) -> bool:
    """Say whether a record's head can be true of that many words and positions."""
    return (
        _STATE_WORDS <= extent.first_words <= num_words - _STATE_WORDS
        and extent.width <= codec.vocabulary
        and extent.first_tokens <= extent.tokens <= extent.width * num_positions
    )
