"""The teacher's distributions to bytes and back: what every codec has in common, and what it decodes to.

Three methods, one parameter each:

    top_k    the K most probable tokens, to half precision; `full` keeps the whole vocabulary
    top_p    every token whose probability is at least `min_probability`: few where the teacher is sure, many where not
    sampled  every token of at least `head_probability`, and an unbiased sample of the others (systematic sampling with
             inclusion probabilities in proportion to size: Madow, Ann. Math. Statist. 20, 1949)

The mass of all other tokens (the *tail*) is stored for each temperature in `cache.temperatures`. It is never dropped:
training treats it as one bucket of its own. Records of `top_k`: `top_k_codec`, of the other two: `entropy_codec`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

# float16 has 11 significant bits: a logprob of -8 is stored to 0.004, and its probability to 0.4 %. Below this floor
# a probability is zero in float32 anyway (a masked token's logprob is -inf).
LOGPROB_FLOOR = -10_000.0


class Selected(Protocol):
    """The kept tokens of P positions, before they are encoded; which class it is depends on the codec."""

    def __getitem__(self, positions: slice, /) -> Self: ...

    @classmethod
    def concatenate(cls, pieces: Sequence[Self]) -> Self:
        """Return several pieces as one, in order."""


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


@dataclass(frozen=True)
class TokenOrder:
    """Token ids by descending frequency in the training text, int32 [V], and the rank of each id, int64 [V].

    Empty where the codec names tokens by their ids.
    """

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


NO_ORDER = TokenOrder.from_ids(np.empty(0, np.int32))


class Codec(ABC):
    """What a reader must know to decode a record; part of every file's header.

    A part's sequences are selected on the teacher's device (`teacher.selection`), prepared one by one, and encoded
    together, since they may share tables. What `prepare` returns, and what `open_tables` does, is the codec's own.
    """

    method: str
    temperatures: tuple[float, ...]
    vocabulary: int  # width of the teacher's output layer
    order: str | None = None  # digest of the TokenOrder, where records name tokens by their ranks
    is_bound: bool  # whether `bytes_per_position` is an upper bound

    def to_json(self) -> dict[str, Any]:
        """Return the entry `codec` of a header: the same keys for every codec, null where a key is of others."""
        names = "method", "top_k", "vocabulary", "min_probability", "steps", "order"
        entry = {name: getattr(self, name, None) for name in names}
        return entry | {"temperatures": list(self.temperatures)}

    @property
    def is_complete(self) -> bool:
        """Whether every position keeps the whole vocabulary."""
        return False

    @property
    @abstractmethod
    def bytes_per_position(self) -> float:
        """Bytes of one position: at most if `is_bound`, else those of a usual teacher."""

    @property
    def bytes_per_part(self) -> int:
        """Bytes that a part has beside its records."""
        return 0

    def order_tokens(self, counts: NDArray[np.int64]) -> TokenOrder:
        """Return the order that tokens are ranked by; counts int64 [at most V]: how often each id is in the text."""
        return NO_ORDER

    @abstractmethod
    def prepare(
        self, selected: Any, order: TokenOrder, *, next_ids: NDArray[np.int32], key: bytes
    ) -> Any:
        """Return the kept tokens of one sequence, ready for `encode`.

        next_ids int32 [P]: the text's own next tokens; key: the sequence's content key.
        """

    @abstractmethod
    def encode(
        self, sequences: Sequence[Any], pool: Executor | None = None
    ) -> tuple[list[bytes], bytes]:
        """Return a record for each prepared sequence of a part, and the packed tables that they are coded with.

        pool: threads that do it; any number makes the same bytes.
        """

    @abstractmethod
    def open_tables(self, packed: bytes, order: TokenOrder) -> Any:
        """Return the tables of a part, ready for `decode`. Raises ValueError when they are damaged."""

    @abstractmethod
    def decode(self, record: bytes, tables: Any, *, next_ids: NDArray[np.int32]) -> SparseTargets:
        """Decode one record; next_ids int32 [P]: see `prepare`. Raises ValueError when the bytes are damaged."""
