"""The teacher's distributions as bytes, and back: pure functions on arrays, no files.

Three methods, one dial each:

    top_k    the K most probable tokens, to half precision; `full` keeps the whole vocabulary
    top_p    every token whose probability is at least `min_probability`: few where the teacher is sure, many where not
    sampled  every token from `head_probability` on, and an unbiased sample of the others (systematic sampling with
             inclusion probabilities in proportion to size: Madow, Ann. Math. Statist. 20, 1949)

The mass of all other tokens (the *tail*) is stored for each temperature in `cache.temperatures`. It is never dropped:
training treats it as one bucket of its own.

Record of `top_k`, P positions: ids (uint16 where V <= 65,536, else uint32) [P, K] in descending order of probability,
logprobs float16 [P, K], tail logprobs float32 [P, temperatures]; one after the other, little endian, through zstd.
Record of the other two: the streams of room `sparse_streams`, entropy-coded (docs/cache-format.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from retort.config import Cache
from retort.entropy import (
    PAD_BYTES,
    build_tables,
    compiled,
    count_symbols,
    encode_bits,
    encode_words,
    pack_tables,
)
from retort.sparse_streams import (
    TAIL_UNIT,
    count_contexts,
    read_streams,
    write_streams,
)

# float16 has 11 significant bits: a logprob of -8 is stored to 0.004, and its probability to 0.4 %. Below
# this floor a probability is zero in float32 anyway (a masked token's logprob is -inf).
_LOGPROB_FLOOR = -10_000.0
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Codec:
    """What a reader must know to decode a record; it travels in every file's header."""

    method: str
    top_k: int | None  # tokens kept, of method top_k
    temperatures: tuple[float, ...]
    vocabulary: int  # width of the teacher's output layer
    min_probability: float | None = None  # from which a token is exact, of the other methods
    steps: int | None = None  # a probability is stored as the square of a multiple of 1 / steps
    order: str | None = None  # digest of the token ids by falling frequency

    def to_json(self) -> dict[str, Any]:
        """Return the header's entry."""
        return {
            "method": self.method,
            "top_k": self.top_k,
            "temperatures": list(self.temperatures),
            "vocabulary": self.vocabulary,
            "min_probability": self.min_probability,
            "steps": self.steps,
            "order": self.order,
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Codec":
        """Read a header's entry."""
        return cls(**(entry | {"temperatures": tuple(entry["temperatures"])}))

    @property
    def is_coded(self) -> bool:
        """Whether records are entropy-coded, with tables beside them."""
        return self.method != "top_k"

    @property
    def draw_step(self) -> int:
        """The mass that one drawn token stands for, in units of 1/65,535; 0: none are drawn."""
        assert self.min_probability is not None
        return round(self.min_probability * TAIL_UNIT) if self.method == "sampled" else 0

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The integer type of a stored token id."""
        return np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class SparseTargets:
    """P positions' distributions, cut to at most K tokens each, in nats.

    top_k_ids int32 [P, K] and top_k_logprobs float32 [P, K] at temperature 1; a position that keeps fewer than K
    tokens repeats its first one with logprob -inf. tail_logprobs float32 [P, temperatures]: log of the mass outside the
    kept tokens of softmax(logits / T); where the tail is sampled, nothing is outside, and `drawn` says which tokens
    were drawn (bool [P, K], None: none).
    """

    top_k_ids: NDArray[np.int32]
    top_k_logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32]
    drawn: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.top_k_ids)

    def __getitem__(self, rows: slice) -> "SparseTargets":
        return SparseTargets(
            self.top_k_ids[rows],
            self.top_k_logprobs[rows],
            self.tail_logprobs[rows],
            None if self.drawn is None else self.drawn[rows],
        )


def encode(targets: SparseTargets, codec: Codec) -> bytes:
    """Encode P positions. The values are rounded to float16; the order and the tail are kept as they are."""
    assert codec.top_k is not None
    assert targets.top_k_ids.shape == (len(targets), codec.top_k), targets.top_k_ids.shape
    assert targets.tail_logprobs.shape == (len(targets), len(codec.temperatures))
    columns = (
        targets.top_k_ids.astype(codec.id_dtype),
        np.maximum(targets.top_k_logprobs, _LOGPROB_FLOOR).astype("<f2"),
        np.maximum(targets.tail_logprobs, _LOGPROB_FLOOR).astype("<f4"),
    )
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(
        b"".join(c.tobytes() for c in columns)
    )


def decode(payload: bytes, codec: Codec, *, num_positions: int) -> SparseTargets:
    """Decode what `encode` returned. Raises ValueError when the bytes are not P positions' records."""
    assert codec.top_k is not None
    ids_bytes = num_positions * codec.top_k * codec.id_dtype.itemsize
    values_bytes = num_positions * codec.top_k * 2
    tails_bytes = num_positions * len(codec.temperatures) * 4
    expected = ids_bytes + values_bytes + tails_bytes
    try:
        found = zstandard.frame_content_size(payload)
        # Asked first: a damaged size must not be allocated.
        raw = zstandard.ZstdDecompressor().decompress(payload) if found == expected else b""
    except zstandard.ZstdError as error:
        raise ValueError(f"a record does not decode ({error}): the cache is damaged.") from None
    if found != expected:
        raise ValueError(
            f"a record of {num_positions} positions has {found} bytes, expected {expected}: the cache is damaged."
        )
    ids = np.frombuffer(raw, codec.id_dtype, count=num_positions * codec.top_k)
    values = np.frombuffer(raw, "<f2", count=num_positions * codec.top_k, offset=ids_bytes)
    tails = np.frombuffer(raw, "<f4", offset=ids_bytes + values_bytes)
    return SparseTargets(
        top_k_ids=ids.astype(np.int32).reshape(num_positions, codec.top_k),
        top_k_logprobs=values.astype(np.float32).reshape(num_positions, codec.top_k),
        tail_logprobs=tails.astype(np.float32).reshape(num_positions, len(codec.temperatures)),
    )


def concatenate(pieces: Sequence[Any]) -> Any:
    """Return several pieces of one kind (SparseTargets of one width, Selections) as one, in order."""
    columns = {
        name: [getattr(piece, name) for piece in pieces] for name in vars(pieces[0]) if pieces
    }
    joined = {
        name: None if values[0] is None else np.concatenate(values)
        for name, values in columns.items()
    }
    return type(pieces[0])(**joined)


# ---------------------------------------------------------------------------------------------------------
# top_p and sampled


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


@dataclass(frozen=True)
class Streams:
    """One sequence before the tables are known: contexts and integers of both streams."""

    a_contexts: NDArray[np.uint16]
    a_values: NDArray[np.uint32]
    b_contexts: NDArray[np.uint16]
    b_values: NDArray[np.uint32]


@dataclass(frozen=True)
class TokenOrder:
    """Token ids by falling frequency in the training text, and each id's rank in it; both int64 [V]."""

    ids: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @classmethod
    def from_ids(cls, ids: NDArray[Any]) -> "TokenOrder":
        """Return the order of ids [V], most frequent first."""
        ranks = np.empty(len(ids), np.int64)
        ranks[ids] = np.arange(len(ids))
        return cls(ids.astype(np.int64), ranks)

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64], *, vocabulary: int) -> "TokenOrder":
        """Return the order by counts [<= V]; equally frequent ids, and those beyond, by id."""
        padded = np.zeros(vocabulary, np.int64)
        padded[: len(counts)] = counts[:vocabulary]
        return cls.from_ids(np.argsort(-padded, kind="stable"))

    def digest(self) -> str:
        """Return 32 hex digits (xxh3-128) of the ids as uint32."""
        return xxhash.xxh3_128_hexdigest(self.ids.astype("<u4").tobytes())


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
    if codec.method == "top_p":
        return np.maximum(1, np.rint(roots)).astype(np.int64)
    below = np.floor(roots)
    share = (roots**2 - below**2) / (2 * below + 1)
    # Places of the first 2^32 are those of `select_sampled`, one for each position.
    chance = draw_uniform(key, (positions + 1) * (1 << 32) + selection.ids)
    return np.maximum(1, below + (chance < share)).astype(np.int64)


def to_streams(
    selection: Selection,
    codec: Codec,
    order: TokenOrder,
    *,
    next_ids: NDArray[Any],
    key: bytes,
) -> Streams:
    """Return what is kept of one sequence as streams; `next_ids` [P]: the text's own tokens, `key`: its content key."""
    positions = np.repeat(np.arange(len(selection.sizes)), selection.sizes)
    levels = _find_levels(selection, positions, codec, key)
    ranks = order.ranks[selection.ids]
    by_rank = np.argsort(positions * codec.vocabulary + ranks)  # 3x as fast as lexsort
    drawn_positions = np.repeat(np.arange(len(selection.sizes)), selection.drawn_sizes)
    drawn_ranks = order.ranks[selection.drawn_ids]
    drawn_ranks = drawn_ranks[np.argsort(drawn_positions * codec.vocabulary + drawn_ranks)]
    streams = write_streams(
        selection.sizes,
        ranks[by_rank],
        levels[by_rank],
        selection.drawn_sizes,
        drawn_ranks,
        selection.tails,
        order.ranks[next_ids],
        codec.steps,
    )
    return Streams(*streams)


def encode_streams(sequences: Sequence[Streams], codec: Codec) -> tuple[list[bytes], bytes]:
    """Return the records of some sequences, and the tables that they were coded with, made for them."""
    num_contexts = count_contexts(len(codec.temperatures))
    counts = np.zeros((num_contexts, 80), np.int64)
    for s in sequences:
        counts += count_symbols(s.a_contexts, s.a_values, num_contexts=num_contexts)
        counts += count_symbols(s.b_contexts, s.b_values, num_contexts=num_contexts)
    tables = build_tables(counts)
    return [_encode_record(s, tables) for s in sequences], pack_tables(tables)


def _encode_record(streams: Streams, tables: NDArray[np.uint16]) -> bytes:
    """Return one record: how many words hold the bits of A, of B, the symbols of A (uint32 each), then all words."""
    a_bits, b_bits = encode_bits(streams.a_values), encode_bits(streams.b_values)
    a_words = encode_words(streams.a_contexts, streams.a_values, tables)
    b_words = encode_words(streams.b_contexts, streams.b_values, tables)
    head = np.array([len(a_bits), len(b_bits), len(a_words)], "<u4")
    return b"".join(x.tobytes() for x in (head, a_bits, b_bits, a_words, b_words))


def decode_streams(
    record: bytes,
    codec: Codec,
    order: TokenOrder,
    lookup: NDArray[np.uint32],
    *,
    next_ids: NDArray[Any],
) -> SparseTargets:
    """Decode one record of `encode_streams`. Raises ValueError when the bytes are no such record."""
    num_positions, num_temperatures = len(next_ids), len(codec.temperatures)
    raw = np.zeros((len(record) + PAD_BYTES) // 4 * 4, np.uint8)
    raw[: len(record)] = np.frombuffer(record, np.uint8)
    bits, words = raw.view("<u4"), raw.view("<u2")
    num_a_bits, num_b_bits, num_a_words = (int(n) for n in bits[:3])
    a_word = 2 * (3 + num_a_bits + num_b_bits)
    if len(record) % 2 or a_word + num_a_words > len(record) // 2:
        raise ValueError("a record is shorter than it says: the cache is damaged.")
    bounds = (
        96,
        32 * (3 + num_a_bits),
        a_word,
        a_word + num_a_words,
        a_word + num_a_words,
        len(record) // 2,
    )
    sizes = np.empty(num_positions, np.int64)
    drawn = np.empty(num_positions, np.int64)
    tails = np.empty((num_positions, num_temperatures), np.int64)
    most = num_positions * codec.vocabulary
    room, found = min(most, 32 * num_positions + 1024), -1
    next_ranks = order.ranks[next_ids]
    while found == -1:
        ranks, levels = np.empty(room, np.int32), np.empty(room, np.int32)
        found = read_streams(
            words, bits, bounds, next_ranks, num_temperatures, codec.steps, codec.draw_step, lookup,
            sizes, drawn, tails, ranks, levels,
        )  # fmt: skip
        if room == most:
            break
        room = min(most, 4 * room)
    if found < 0:
        raise ValueError("a record does not end as it must: the cache is damaged.")
    width = int((sizes + drawn).max(initial=1))
    log_squares = 2 * np.log(np.maximum(np.arange(levels[:found].max(initial=1) + 1), 1))
    ids, logprobs, is_drawn = _pad(
        ranks, levels, sizes, drawn, tails[:, 0], order.ids, log_squares, width
    )
    outside = np.full(tails.shape, _LOGPROB_FLOOR, np.float32)
    if codec.method == "top_p":
        np.log(np.maximum(tails, 0.25) / TAIL_UNIT, out=outside, casting="same_kind")
    return SparseTargets(ids, logprobs, outside, is_drawn if codec.draw_step else None)


@compiled
def _pad(
    ranks: NDArray[np.int32],
    levels: NDArray[np.int32],
    sizes: NDArray[np.int64],
    drawn: NDArray[np.int64],
    tails: NDArray[np.int64],
    ids_by_rank: NDArray[np.int64],
    log_squares: NDArray[np.float64],
    width: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.bool_]]:
    """Return ids, logprobs and whether drawn, [P, width]: exact tokens share what the tail leaves, drawn the tail."""
    ids = np.empty((len(sizes), width), np.int32)
    logprobs = np.full((len(sizes), width), -np.inf, np.float32)
    is_drawn = np.zeros((len(sizes), width), np.bool_)
    first = 0
    for p in range(len(sizes)):
        squares = 0.0
        for i in range(sizes[p]):
            squares += (
                np.float64(levels[first + i]) * levels[first + i] if levels[first + i] > 0 else 0.0
            )
        total = sizes[p] + drawn[p]
        of_exact = np.log(
            (TAIL_UNIT - tails[p] if tails[p] < TAIL_UNIT else 0.25) / TAIL_UNIT / max(squares, 1.0)
        )
        of_drawn = np.log(tails[p] / TAIL_UNIT / drawn[p]) if drawn[p] > 0 else 0.0
        for i in range(total):
            level = levels[first + i]
            ids[p, i] = ids_by_rank[ranks[first + i]]
            logprobs[p, i] = of_exact + log_squares[level] if level > 0 else of_drawn
            is_drawn[p, i] = level == 0
        for i in range(total, width):
            ids[p, i] = ids[p, 0] if total else 0
        first += total
    return ids, logprobs, is_drawn


# The dial where it is left out (the schema's descriptions say so).
DEFAULT_PROBABILITY = {"top_p": 0.001, "sampled": 0.05}
# What a teacher of 2.1 nats of entropy keeps at a probability of 0.01, and how that grows (benchmarks/cache.py).
_KEPT_AT_ONE_PERCENT, _KEPT_EXPONENT = 9.0, -0.58
_BYTES_PER_KEPT, _BYTES_PER_POSITION = 1.4, 4.0
_SAFETY = 3  # a teacher less sure of its words keeps more


def bytes_per_position(codec: Codec) -> float:
    """Return what one position takes at most: a bound for top_k, else three times what a usual teacher takes."""
    num_tails = len(codec.temperatures)
    if codec.top_k is not None:
        return codec.top_k * (codec.id_dtype.itemsize + 2) + 4 * num_tails
    assert codec.min_probability is not None
    kept = _KEPT_AT_ONE_PERCENT * (codec.min_probability / 0.01) ** _KEPT_EXPONENT
    drawn = 0.3 / codec.min_probability if codec.draw_step else 0.0
    kept = min(_SAFETY * kept, 1 / codec.min_probability) + drawn
    return _BYTES_PER_KEPT * min(kept, codec.vocabulary) + _BYTES_PER_POSITION + 2 * num_tails


def resolve_top_k(top_k: int | str, *, vocabulary: int) -> int:
    """Return K: `full` is the whole vocabulary, and K never exceeds it."""
    return vocabulary if top_k == "full" else min(int(top_k), vocabulary)


def choose_steps(method: str, min_probability: float) -> int:
    """Return how finely roots of probabilities are stored.

    top_p: rounding costs about K / (6 steps^2) nats, K the mean number of kept tokens; these steps keep it at 0.8e-3
    for a teacher of 2.1 nats of entropy. sampled: rounding adds 3-5 % to the variance of the draws.
    """
    if method == "top_p":
        return max(2, round(43 * (min_probability / 0.01) ** -0.285))
    return max(2, round(8 * min_probability**-0.5))


def build_codec(
    cache: Cache, *, vocabulary: int, token_counts: NDArray[np.int64] | None = None
) -> Codec:
    """Return the codec of a `cache` section for a teacher of that output width.

    `token_counts`: how often each id comes in the training text; only where files are written or read. Raises
    ValueError when temperature 1, at which every cache is measured, is not among those stored.
    """
    if 1.0 not in cache.temperatures:
        raise ValueError(
            f"cache.temperatures is {list(cache.temperatures)}, but the cache's fidelity is measured at temperature 1. "
            f"Add it: {sorted([1.0, *cache.temperatures])}."
        )
    if cache.method == "top_k":
        top_k = resolve_top_k(cache.top_k, vocabulary=vocabulary)
        return Codec(cache.method, top_k, tuple(cache.temperatures), vocabulary)
    dial = cache.min_probability if cache.method == "top_p" else cache.head_probability
    least = DEFAULT_PROBABILITY[cache.method] if dial is None else dial
    order = (
        TokenOrder.from_counts(token_counts, vocabulary=vocabulary).digest()
        if token_counts is not None
        else None
    )
    # Temperature 1 comes first: sizes and levels are told from its tail.
    temperatures = (1.0, *(t for t in cache.temperatures if t != 1.0))
    steps = choose_steps(cache.method, least)
    return Codec(cache.method, None, temperatures, vocabulary, least, steps, order)
