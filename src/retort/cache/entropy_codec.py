"""Records of `top_p` and `sampled`: the selected tokens of a sequence to entropy-coded streams, and back.

Layout of a record and of its integers: docs/cache-format.md. Shapes: P positions, N exact tokens, M sampled ones.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.cache.codec import LOGPROB_FLOOR, Codec, SparseTargets, TokenOrder
from retort.cache.entropy import (
    Lookup,
    build_encoder,
    build_lookup,
    build_tables,
    count_symbols,
    encode_lanes,
    pack_tables,
    unpack_tables,
)
from retort.cache.pieces import cut_pieces, do_pieces, map_pieces
from retort.cache.sparse_streams import (
    MAX_STEPS,
    MAX_VOCABULARY,
    TAIL_UNIT,
    Grid,
    Streams,
    build_grid,
    count_contexts,
)
from retort.cache.stream_reader import DecodedRows, NextTokens, RecordHeader, read_streams
from retort.cache.stream_writer import RankedSelection, sort_by_rank, write_streams

_HEADER_WORDS = 4  # see RecordHeader
_STATE_WORDS = 2  # of each lane
_INTEGERS_AT_ONCE = 1 << 17  # in a piece of work: some 2,000 positions
# Tokens that a teacher of 2.1 nats of entropy keeps at a probability of 0.01, and their growth (make benchmark-cache).
_KEPT_AT_ONE_PERCENT, _KEPT_EXPONENT = 9.0, -0.58
_BYTES_PER_KEPT, _BYTES_PER_POSITION = 1.4, 4.0  # at a vocabulary of 32,768
_BYTES_PER_DOUBLING = 0.08  # of the vocabulary, for a kept token: its id


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


class Tables(NamedTuple):
    """What records of one part are decoded with."""

    lookup: Lookup
    order: TokenOrder


def choose_steps(method: str, min_probability: float) -> int:
    """Return the number of steps on which square roots of probabilities are stored.

    top_p: rounding costs about K / (6 steps^2) nats, K the mean number of kept tokens; these steps keep it at 0.8e-3
    for a teacher of 2.1 nats of entropy. sampled: rounding adds 3-5 % to the variance of the sample.
    """
    steps = (
        43 * (min_probability / 0.01) ** -0.285 if method == "top_p" else 8 * min_probability**-0.5
    )
    return min(max(2, round(steps)), MAX_STEPS)


@dataclass(frozen=True)
class EntropyCodec(Codec):
    """Keeps as many tokens as each position needs; the sequences of a part share tables of frequencies."""

    temperatures: tuple[float, ...]
    vocabulary: int
    method: str
    min_probability: float  # from which a token is exact
    steps: int  # a probability is stored as the square of a multiple of 1 / steps
    order: str | None = None  # digest of the token ids by descending frequency
    is_bound = False

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that cannot be coded: the compiled code does not check bounds."""
        if not 1 <= self.vocabulary <= MAX_VOCABULARY:
            raise ValueError(
                f"cache.method {self.method} codes up to {MAX_VOCABULARY:,} ids, but the teacher's output layer has "
                f"{self.vocabulary:,}: use cache.method: top_k."
            )
        if not 1 <= (self.steps or 0) <= MAX_STEPS:
            raise ValueError(
                f"the codec has {self.steps} steps, expected 1 to {MAX_STEPS}: the file is damaged."
            )

    @property
    def sample_step(self) -> int:
        """Mass of one sampled token, in units of 1/65,535; 0 where the method samples none."""
        return round(self.min_probability * TAIL_UNIT) if self.method == "sampled" else 0

    @property
    def bytes_per_position(self) -> float:
        """Bytes of one position of a usual teacher, which has 2.1 nats of entropy: others differ severalfold."""
        kept = _KEPT_AT_ONE_PERCENT * (self.min_probability / 0.01) ** _KEPT_EXPONENT
        sampled = 0.1 / self.min_probability if self.sample_step else 0.0
        kept = min(kept, 1 / self.min_probability) + sampled
        each = _BYTES_PER_KEPT + _BYTES_PER_DOUBLING * (math.log2(self.vocabulary) - 15)
        tails = 2 * len(self.temperatures)
        return each * min(kept, self.vocabulary) + _BYTES_PER_POSITION + tails

    @property
    def bytes_per_part(self) -> int:
        """Bytes of the order of tokens."""
        return 4 * self.vocabulary

    def order_tokens(self, counts: NDArray[np.int64]) -> TokenOrder:
        """Return the order of tokens by counts int64 [at most V], which must be the one that the codec names."""
        order = TokenOrder.from_counts(counts, vocabulary=self.vocabulary)
        assert order.digest() == self.order, (order.digest(), self.order)
        return order

    def prepare(
        self, selected: Selection, order: TokenOrder, *, next_ids: NDArray[np.int32], key: bytes
    ) -> Streams:
        """Return the kept tokens of one sequence as streams of integers."""
        levels = self._find_levels(selected, key)
        ranks, levels = sort_by_rank(selected.sizes, selected.ids, levels, order.ranks)
        sampled_ranks, _ = sort_by_rank(
            selected.sampled_sizes,
            selected.sampled_ids,
            np.zeros_like(selected.sampled_ids),
            order.ranks,
        )
        ranked = RankedSelection(
            sizes=selected.sizes,
            ranks=ranks,
            levels=levels,
            sampled_sizes=selected.sampled_sizes,
            sampled_ranks=sampled_ranks,
            tails=selected.tails,
        )
        width = int((selected.sizes + selected.sampled_sizes).max(initial=1))
        return write_streams(ranked, order.ranks[next_ids], self._grid(width), width=width)

    def encode(
        self, sequences: Sequence[Streams], pool: Executor | None = None
    ) -> tuple[list[bytes], bytes]:
        """Return a record for each sequence, and the packed tables, made for these sequences."""
        num_contexts = count_contexts(len(self.temperatures))
        pieces = cut_pieces((len(s.values) for s in sequences), least=_INTEGERS_AT_ONCE)

        def count(piece: slice) -> NDArray[np.int64]:
            streams = ((s.contexts, s.values) for s in sequences[piece])
            return count_symbols(streams, num_contexts=num_contexts)

        none = count_symbols((), num_contexts=num_contexts)
        tables = build_tables(sum(do_pieces(count, pieces, pool), none))
        encode = partial(_encode_record, encoder=build_encoder(tables))
        return map_pieces(encode, sequences, pieces, pool), pack_tables(tables)

    def open_tables(self, packed: bytes, order: TokenOrder) -> Tables:
        """Return the decoder's tables of one part. Raises ValueError when they are damaged."""
        num_contexts = count_contexts(len(self.temperatures))
        return Tables(build_lookup(unpack_tables(packed, num_contexts=num_contexts)), order)

    def decode(
        self, record: bytes, tables: Tables, *, next_ids: NDArray[np.int32]
    ) -> SparseTargets:
        """Decode one record: the distributions of P positions, exact tokens before sampled ones.

        The text's own next tokens, next_ids int32 [P], are not in the record. Raises ValueError when the bytes are
        damaged.
        """
        num_positions, num_temperatures = len(next_ids), len(self.temperatures)
        words = np.frombuffer(record, "<u4", count=len(record) // 4)
        start, lanes = words[:_HEADER_WORDS].tolist(), words[_HEADER_WORDS:]
        is_whole = len(start) == _HEADER_WORDS and len(record) % 4 == 0
        header = RecordHeader(*start) if is_whole else None
        if header is None or not self._is_possible(header, len(lanes), num_positions):
            raise ValueError("a record's sizes do not fit its length: the cache is damaged.")
        rows = DecodedRows(
            offsets=np.empty(num_positions + 1, np.int64),
            sizes=np.empty(num_positions, np.int64),
            ids=np.empty(header.tokens, np.int32),
            logprobs=np.empty(header.tokens, np.float32),
            tails=np.empty((num_positions, num_temperatures), np.float32),
        )
        next_tokens = NextTokens(tables.order.ranks[next_ids], tables.order.ids)
        grid = self._grid(header.width)
        if not read_streams(lanes, header, tables.lookup, next_tokens, grid, rows):
            raise ValueError("a record does not end where it should: the cache is damaged.")
        num_exact = None
        if self.method == "sampled":
            rows.tails.fill(LOGPROB_FLOOR)
            num_exact = rows.sizes
        return SparseTargets(rows.offsets, rows.ids, rows.logprobs, rows.tails, num_exact)

    def _grid(self, width: int) -> Grid:
        """Return the constants of a record whose positions keep at most `width` tokens."""
        return build_grid(len(self.temperatures), self.steps, self.sample_step, width.bit_length())

    def _find_levels(self, selected: Selection, key: bytes) -> NDArray[np.int64]:
        """Return the level of each exact token, int64 [N], at least 1.

        top_p rounds to the nearest step. sampled rounds up or down at random, so that the squared level is unbiased.
        """
        roots = np.sqrt(selected.probs)
        roots *= self.steps
        if self.method == "sampled":
            below = np.floor(roots)
            share = (roots**2 - below**2) / (2 * below + 1)
            positions = np.repeat(np.arange(len(selected.sizes)), selected.sizes)
            # Counters below 2^32 belong to the sampling of tokens (teacher.selection), one for each position.
            uniform = hash_to_uniform(key, (positions + 1) * (1 << 32) + selected.ids)
            roots = below + (uniform < share)
        else:
            np.rint(roots, out=roots)
        levels: NDArray[np.int64] = np.maximum(roots, 1, out=roots).astype(np.int64)
        return levels

    def _is_possible(self, header: RecordHeader, num_words: int, num_positions: int) -> bool:
        """Say whether a record of that many words and positions can have this header."""
        return (
            _STATE_WORDS <= header.first_words <= num_words - _STATE_WORDS
            and header.width <= self.vocabulary
            and header.first_tokens <= header.tokens <= header.width * num_positions
        )


def _encode_record(streams: Streams, encoder: NDArray[np.void]) -> bytes:
    first, second = encode_lanes(streams.contexts, streams.values, streams.cut, encoder)
    header = [len(first), streams.first_tokens, streams.tokens, streams.width]
    return np.concatenate([np.array(header, np.uint32), first, second]).astype("<u4").tobytes()
