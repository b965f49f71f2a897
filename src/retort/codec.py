"""One position's teacher distribution as bytes, and back: pure functions on arrays, no files.

What is kept of a distribution over V tokens is its K most probable tokens, their logprobs, and the mass of all
the others (the *tail*) as one logprob for each temperature in `cache.temperatures`. The tail is never dropped:
training treats it as one bucket of its own.

Record layout of `method: top_k`, P positions: ids (uint16 where V <= 65,536, else uint32) [P, K] in descending
order of probability, logprobs float16 [P, K], tail logprobs float32 [P, temperatures]; the three columns one
after the other, little endian, through zstd.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from retort.config import Cache

# float16 has 11 significant bits: a logprob of -8 is stored to 0.004, and its probability to 0.4 %. Below
# this floor a probability is zero in float32 anyway (a masked token's logprob is -inf).
_LOGPROB_FLOOR = -10_000.0
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Codec:
    """What a reader must know to decode a record; it travels in every file's header."""

    method: str
    top_k: int
    temperatures: tuple[float, ...]
    vocabulary: int  # width of the teacher's output layer

    def to_json(self) -> dict[str, Any]:
        """Return the header's entry."""
        return {
            "method": self.method,
            "top_k": self.top_k,
            "temperatures": list(self.temperatures),
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Codec":
        """Read a header's entry."""
        return cls(
            entry["method"], entry["top_k"], tuple(entry["temperatures"]), entry["vocabulary"]
        )

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The integer type of a stored token id."""
        return np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class SparseTargets:
    """P positions' distributions, cut to K tokens each, in nats.

    top_k_ids int32 [P, K] and top_k_logprobs float32 [P, K] at temperature 1, most probable first;
    tail_logprobs float32 [P, temperatures]: log of the mass outside the K tokens of softmax(logits / T).
    """

    top_k_ids: NDArray[np.int32]
    top_k_logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.top_k_ids)

    def __getitem__(self, rows: slice) -> "SparseTargets":
        return SparseTargets(
            self.top_k_ids[rows], self.top_k_logprobs[rows], self.tail_logprobs[rows]
        )


def encode(targets: SparseTargets, codec: Codec) -> bytes:
    """Encode P positions. The values are rounded to float16; the order and the tail are kept as they are."""
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


def bytes_per_position(codec: Codec) -> int:
    """An upper bound on the stored bytes of one position, before zstd."""
    return codec.top_k * (codec.id_dtype.itemsize + 2) + 4 * len(codec.temperatures)


def resolve_top_k(top_k: int | str, *, vocabulary: int) -> int:
    """Return K: `full` is the whole vocabulary, and K never exceeds it."""
    return vocabulary if top_k == "full" else min(int(top_k), vocabulary)


def build_codec(cache: Cache, *, vocabulary: int) -> Codec:
    """Return the codec of a `cache` section for a teacher of that output width.

    Raises ValueError when temperature 1, at which every cache is measured, is not among those stored.
    """
    if 1.0 not in cache.temperatures:
        raise ValueError(
            f"cache.temperatures is {list(cache.temperatures)}, but the cache's fidelity is measured at temperature 1. "
            f"Add it: {sorted([1.0, *cache.temperatures])}."
        )
    top_k = resolve_top_k(cache.top_k, vocabulary=vocabulary)
    return Codec(cache.method, top_k, tuple(cache.temperatures), vocabulary)
