"""The teacher's distributions to bytes and back: pure functions on arrays, no files.

Three methods, one parameter each:

    top_k    the K most probable tokens, to half precision; `full` keeps the whole vocabulary
    top_p    every token whose probability is at least `min_probability`: few where the teacher is sure, many where not
    sampled  every token of at least `head_probability`, and an unbiased sample of the others (systematic sampling with
             inclusion probabilities in proportion to size: Madow, Ann. Math. Statist. 20, 1949)

The mass of all other tokens (the *tail*) is stored for each temperature in `cache.temperatures`. It is never dropped:
training treats it as one bucket of its own.

Record of `top_k`, P positions: ids (uint16 where V <= 65,536, else uint32) [P, K] in descending order of probability,
logprobs float16 [P, K], tail logprobs float32 [P, temperatures]; one after the other, little endian, compressed by
zstd. Records of the other two: `sparse_codec`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from retort.cache.sparse_streams import MAX_STEPS, MAX_VOCABULARY, TAIL_UNIT, Grid, build_grid
from retort.config.sections import Cache

# float16 has 11 significant bits: a logprob of -8 is stored to 0.004, and its probability to 0.4 %. Below this floor
# a probability is zero in float32 anyway (a masked token's logprob is -inf).
LOGPROB_FLOOR = -10_000.0
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Codec:
    """What a reader must know to decode a record; part of every file's header."""

    method: str
    top_k: (
        int | None
    )  # number of tokens kept (top_k only, as the next three are of the other methods)
    temperatures: tuple[float, ...]
    vocabulary: int  # width of the teacher's output layer
    min_probability: float | None = None  # from which a token is exact
    steps: int | None = None  # a probability is stored as the square of a multiple of 1 / steps
    order: str | None = None  # digest of the token ids by descending frequency

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that cannot be coded: the compiled code does not check bounds."""
        if self.is_coded and not 1 <= self.vocabulary <= MAX_VOCABULARY:
            raise ValueError(
                f"cache.method {self.method} codes up to {MAX_VOCABULARY:,} ids, but the teacher's output layer has "
                f"{self.vocabulary:,}: use cache.method: top_k."
            )
        if self.is_coded and not 1 <= (self.steps or 0) <= MAX_STEPS:
            raise ValueError(
                f"the codec has {self.steps} steps, expected 1 to {MAX_STEPS}: the file is damaged."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the entry `codec` of a header."""
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
        """Return the codec of a header's entry. Raises ValueError for sizes that cannot be coded."""
        return cls(**(entry | {"temperatures": tuple(entry["temperatures"])}))

    @property
    def is_coded(self) -> bool:
        """Whether records are entropy-coded, with tables beside them."""
        return self.method != "top_k"

    @property
    def sample_step(self) -> int:
        """Mass of one sampled token, in units of 1/65,535; 0 where the method samples none."""
        assert self.min_probability is not None
        return round(self.min_probability * TAIL_UNIT) if self.method == "sampled" else 0

    def build_grid(self, *, width: int) -> Grid:
        """Return the constants of an entropy-coded record whose positions keep at most `width` tokens."""
        assert self.steps is not None
        return build_grid(len(self.temperatures), self.steps, self.sample_step, width.bit_length())

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The integer type of a stored token id."""
        return np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class SparseTargets:
    """Sparse distributions of P positions that keep N tokens in all; each position keeps as many as it needs.

    offsets int64 [P + 1]: where each position's tokens begin in ids int32 [N] and logprobs float32 [N] (nats,
    temperature 1). tail_logprobs float32 [P, temperatures]: log of the mass outside the kept tokens of
    softmax(logits / T). Where the tail is sampled, nothing is outside, and the first `num_exact` int64 [P] tokens of a
    position are exact, the others sampled (None: all are exact).
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32]
    num_exact: NDArray[np.int64] | None = None

    @classmethod
    def from_rows(
        cls,
        ids_PK: NDArray[np.int32],
        logprobs_PK: NDArray[np.float32],
        tail_logprobs: NDArray[np.float32],
    ) -> "SparseTargets":
        """Return positions that keep K tokens each; tail_logprobs [P, temperatures]."""
        offsets = np.arange(len(ids_PK) + 1, dtype=np.int64) * ids_PK.shape[1]
        return cls(offsets, ids_PK.reshape(-1), logprobs_PK.reshape(-1), tail_logprobs)

    def __len__(self) -> int:
        return len(self.tail_logprobs)

    def __getitem__(self, rows: slice) -> "SparseTargets":
        first, stop, _ = rows.indices(len(self))
        offsets = self.offsets[first : stop + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        return SparseTargets(
            offsets - offsets[0],
            self.ids[tokens],
            self.logprobs[tokens],
            self.tail_logprobs[rows],
            None if self.num_exact is None else self.num_exact[rows],
        )

    @classmethod
    def concatenate(cls, pieces: Sequence["SparseTargets"]) -> "SparseTargets":
        """Return several pieces as one, in order; either all or none of them have sampled tokens."""
        sizes = np.concatenate([piece.sizes for piece in pieces])
        exact = [piece.num_exact for piece in pieces if piece.num_exact is not None]
        assert len(exact) in (0, len(pieces))
        return cls(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
            np.concatenate([piece.ids for piece in pieces]),
            np.concatenate([piece.logprobs for piece in pieces]),
            np.concatenate([piece.tail_logprobs for piece in pieces]),
            np.concatenate(exact) if exact else None,
        )

    def below(self, vocabulary: int) -> "SparseTargets":
        """Return the targets without ids >= `vocabulary`, which belong to no token and must have probability zero."""
        is_kept = self.ids < vocabulary
        assert (self.logprobs[~is_kept] <= LOGPROB_FLOOR).all(), "an id without a token has mass"
        kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
        firsts, offsets, num_exact = self.offsets[:-1], kept_before[self.offsets], self.num_exact
        return SparseTargets(
            offsets,
            self.ids[is_kept],
            self.logprobs[is_kept],
            self.tail_logprobs,
            None if num_exact is None else kept_before[firsts + num_exact] - offsets[:-1],
        )

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of tokens that each position keeps, int64 [P]."""
        return np.diff(self.offsets)

    def to_rows(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return ids and logprobs [P, K], K the largest row; shorter rows repeat their last id at -inf."""
        width = int(self.sizes.max(initial=1))
        indices = self.offsets[:-1, None] + np.arange(width)
        last = np.maximum(self.offsets[1:, None] - 1, 0)
        ids = (
            self.ids[np.minimum(indices, last)]
            if len(self.ids)
            else np.zeros(indices.shape, np.int32)
        )
        is_kept = indices < self.offsets[1:, None]
        logprobs = np.full(indices.shape, -np.inf, np.float32)
        logprobs[is_kept] = self.logprobs
        return ids, logprobs


def encode(targets: SparseTargets, codec: Codec) -> bytes:
    """Encode P positions that keep K tokens each. Logprobs are rounded to float16; order and tails are kept exactly."""
    assert codec.top_k is not None
    assert (targets.sizes == codec.top_k).all(), (codec.top_k, targets.sizes)
    assert targets.ids.max(initial=0) < codec.vocabulary, (targets.ids.max(), codec.vocabulary)
    assert targets.tail_logprobs.shape == (len(targets), len(codec.temperatures))
    columns = (
        targets.ids.astype(codec.id_dtype),
        np.maximum(targets.logprobs, LOGPROB_FLOOR).astype("<f2"),
        np.maximum(targets.tail_logprobs, LOGPROB_FLOOR).astype("<f4"),
    )
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(
        b"".join(c.tobytes() for c in columns)
    )


def decode(payload: bytes, codec: Codec, *, num_positions: int) -> SparseTargets:
    """Decode a record of `encode`. Raises ValueError when the bytes are not a record of that many positions."""
    assert codec.top_k is not None
    ids_bytes = num_positions * codec.top_k * codec.id_dtype.itemsize
    values_bytes = num_positions * codec.top_k * 2
    tails_bytes = num_positions * len(codec.temperatures) * 4
    expected = ids_bytes + values_bytes + tails_bytes
    try:
        found = zstandard.frame_content_size(payload)
        # The size is checked first: a damaged one must not be allocated.
        raw = zstandard.ZstdDecompressor().decompress(payload) if found == expected else b""
    except zstandard.ZstdError as error:
        raise ValueError(f"a record cannot be decoded ({error}): the cache is damaged.") from None
    if found != expected:
        raise ValueError(
            f"a record of {num_positions} positions has {found} bytes, expected {expected}: the cache is damaged."
        )
    ids = np.frombuffer(raw, codec.id_dtype, count=num_positions * codec.top_k)
    values = np.frombuffer(raw, "<f2", count=num_positions * codec.top_k, offset=ids_bytes)
    tails = np.frombuffer(raw, "<f4", offset=ids_bytes + values_bytes)
    return SparseTargets(
        offsets=np.arange(num_positions + 1, dtype=np.int64) * codec.top_k,
        ids=ids.astype(np.int32),
        logprobs=values.astype(np.float32),
        tail_logprobs=tails.astype(np.float32).reshape(num_positions, len(codec.temperatures)),
    )


@dataclass(frozen=True)
class TokenOrder:
    """Token ids by descending frequency in the training text, int32 [V], and the rank of each id, int64 [V]."""

    ids: NDArray[np.int32]
    ranks: NDArray[np.int64]

    @classmethod
    def from_ids(cls, ids: NDArray[Any]) -> "TokenOrder":
        """Return the order that ids [V], most frequent first, stand in."""
        ranks = np.empty(len(ids), np.int64)
        ranks[ids] = np.arange(len(ids))
        return cls(ids.astype(np.int32), ranks)

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64], *, vocabulary: int) -> "TokenOrder":
        """Return the order by counts int64 [at most V]; ids that are equally frequent, or have no count, go by id."""
        padded = np.zeros(vocabulary, np.int64)
        padded[: len(counts)] = counts[:vocabulary]
        return cls.from_ids(np.argsort(-padded, kind="stable"))

    def digest(self) -> str:
        """Return 32 hex digits (xxh3-128) of the ids as uint32."""
        return xxhash.xxh3_128_hexdigest(self.ids.astype("<u4").tobytes())


# Defaults of cache.min_probability and cache.head_probability, as in the schema's descriptions.
_DEFAULT_PROBABILITY = {"top_p": 0.001, "sampled": 0.05}
# Tokens that a teacher of 2.1 nats of entropy keeps at a probability of 0.01, and their growth (make benchmark-cache).
_KEPT_AT_ONE_PERCENT, _KEPT_EXPONENT = 9.0, -0.58
_BYTES_PER_KEPT, _BYTES_PER_POSITION = 1.4, 4.0
_SAFETY_FACTOR = 3  # a teacher that is less certain keeps more


def bytes_per_position(codec: Codec) -> float:
    """Return the bytes of one position: an upper bound for top_k, else three times those of a usual teacher."""
    num_tails = len(codec.temperatures)
    if codec.top_k is not None:
        return codec.top_k * (codec.id_dtype.itemsize + 2) + 4 * num_tails
    assert codec.min_probability is not None
    kept = _KEPT_AT_ONE_PERCENT * (codec.min_probability / 0.01) ** _KEPT_EXPONENT
    sampled = 0.3 / codec.min_probability if codec.sample_step else 0.0
    kept = min(_SAFETY_FACTOR * kept, 1 / codec.min_probability) + sampled
    return _BYTES_PER_KEPT * min(kept, codec.vocabulary) + _BYTES_PER_POSITION + 2 * num_tails


def resolve_top_k(top_k: int | str, *, vocabulary: int) -> int:
    """Return K: `full` is the whole vocabulary, and K never exceeds it."""
    return vocabulary if top_k == "full" else min(int(top_k), vocabulary)


def choose_steps(method: str, min_probability: float) -> int:
    """Return the number of steps on which square roots of probabilities are stored.

    top_p: rounding costs about K / (6 steps^2) nats, K the mean number of kept tokens; these steps keep it at 0.8e-3
    for a teacher of 2.1 nats of entropy. sampled: rounding adds 3-5 % to the variance of the sample.
    """
    steps = (
        43 * (min_probability / 0.01) ** -0.285 if method == "top_p" else 8 * min_probability**-0.5
    )
    return min(max(2, round(steps)), MAX_STEPS)


def build_codec(
    cache: Cache, *, vocabulary: int, token_counts: NDArray[np.int64] | None = None
) -> Codec:
    """Return the codec of a `cache` section for a teacher whose output layer has `vocabulary` ids.

    token_counts int64 [at most V]: how often each id occurs in the training text; needed to write or read files.
    Raises ValueError when temperature 1, at which every cache is measured, is not among those stored, or when the
    vocabulary is too large for the method.
    """
    if 1.0 not in cache.temperatures:
        raise ValueError(
            f"cache.temperatures is {list(cache.temperatures)}, but the cache's fidelity is measured at temperature 1. "
            f"Add it: {sorted([1.0, *cache.temperatures])}."
        )
    if cache.method == "top_k":
        top_k = resolve_top_k(cache.top_k, vocabulary=vocabulary)
        return Codec(cache.method, top_k, tuple(cache.temperatures), vocabulary)
    given = cache.min_probability if cache.method == "top_p" else cache.head_probability
    least = _DEFAULT_PROBABILITY[cache.method] if given is None else given
    order = (
        TokenOrder.from_counts(token_counts, vocabulary=vocabulary).digest()
        if token_counts is not None
        else None
    )
    # Temperature 1 comes first: sizes and levels are predicted from its tail. A sample is unbiased at no other.
    others = tuple(t for t in cache.temperatures if t != 1.0 and cache.method != "sampled")
    temperatures = (1.0, *others)
    steps = choose_steps(cache.method, least)
    return Codec(cache.method, None, temperatures, vocabulary, least, steps, order)
