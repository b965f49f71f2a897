"""Records of `top_k`: the K most probable tokens of each position, to half precision.

Record of P positions: ids (uint16 where V <= 65,536, else uint32) [P, K] in descending order of probability, logprobs
float16 [P, K], tail logprobs float32 [P, temperatures]; one after the other, little endian, compressed by zstd.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from retort.cache.codec import LOGPROB_FLOOR, Codec, SparseTargets, TokenOrder
from retort.cache.pieces import cut_pieces, map_pieces

_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class TopKCodec(Codec):
    """Keeps `top_k` tokens of each position; a record is encoded by itself, without tables."""

    temperatures: tuple[float, ...]
    vocabulary: int
    top_k: int
    method = "top_k"
    is_bound = True

    @property
    def is_complete(self) -> bool:
        """Whether every position keeps the whole vocabulary."""
        return self.top_k == self.vocabulary

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The integer type of a stored token id."""
        return np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")

    @property
    def bytes_per_position(self) -> float:
        """Bytes of one position before zstd, an upper bound."""
        return self.top_k * (self.id_dtype.itemsize + 2) + 4 * len(self.temperatures)

    def prepare(
        self, selected: SparseTargets, order: TokenOrder, *, next_ids: NDArray[np.int32], key: bytes
    ) -> SparseTargets:
        """Return the same."""
        return selected

    def encode(
        self, sequences: Sequence[SparseTargets], pool: Executor | None = None
    ) -> tuple[list[bytes], bytes]:
        """Return a record for each sequence, and no tables."""
        pieces = cut_pieces(map(len, sequences))
        return map_pieces(self.encode_record, sequences, pieces, pool), b""

    def encode_record(self, targets: SparseTargets) -> bytes:
        """Encode P positions. Logprobs are rounded to float16; order and tails are kept exactly."""
        assert (targets.sizes == self.top_k).all(), (self.top_k, targets.sizes)
        assert targets.ids.max(initial=0) < self.vocabulary, (targets.ids.max(), self.vocabulary)
        assert targets.tail_logprobs.shape == (len(targets), len(self.temperatures))
        columns = (
            targets.ids.astype(self.id_dtype),
            np.maximum(targets.logprobs, LOGPROB_FLOOR).astype("<f2"),
            np.maximum(targets.tail_logprobs, LOGPROB_FLOOR).astype("<f4"),
        )
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(
            b"".join(c.tobytes() for c in columns)
        )

    def open_tables(self, packed: bytes, order: TokenOrder) -> None:
        """Return None: there are no tables."""

    def decode(self, record: bytes, tables: None, *, next_ids: NDArray[np.int32]) -> SparseTargets:
        """Decode one record. Raises ValueError when the bytes are not a record of as many positions as `next_ids`."""
        num_positions = len(next_ids)
        count = num_positions * self.top_k
        ids_bytes, values_bytes = count * self.id_dtype.itemsize, count * 2
        expected = ids_bytes + values_bytes + num_positions * len(self.temperatures) * 4
        try:
            found = zstandard.frame_content_size(record)
            # The size is checked first: a damaged one must not be allocated.
            raw = zstandard.ZstdDecompressor().decompress(record) if found == expected else b""
        except zstandard.ZstdError as error:
            raise ValueError(
                f"a record cannot be decoded ({error}): the cache is damaged."
            ) from None
        if found != expected:
            raise ValueError(
                f"a record of {num_positions} positions has {found} bytes, expected {expected}: the cache is damaged."
            )
        ids = np.frombuffer(raw, self.id_dtype, count=count)
        values = np.frombuffer(raw, "<f2", count=count, offset=ids_bytes)
        tails = np.frombuffer(raw, "<f4", offset=ids_bytes + values_bytes)
        return SparseTargets(
            offsets=np.arange(num_positions + 1, dtype=np.int64) * self.top_k,
            ids=ids.astype(np.int32),
            logprobs=values.astype(np.float32),
            tail_logprobs=tails.astype(np.float32).reshape(num_positions, len(self.temperatures)),
        )
