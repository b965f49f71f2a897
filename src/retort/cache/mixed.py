"""Several caches of the same sequences, of teachers whose distributions are mixed, read side by side.

Legend: P positions, M teachers, N tokens that any of them keeps, over all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.cache.codec import Codec, SparseTargets
from retort.cache.jit import jit
from retort.cache.reader import LogitCache
from retort.tokens.sequences import SequenceTable


@dataclass(frozen=True)
class CacheMix:
    """Caches of M teachers, the main one first, and the shares of their distributions, which sum to 1."""

    caches: tuple[LogitCache, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless all caches hold the same sequences in the same order, and tails at one set of T."""
        first = self.caches[0]
        for cache in self.caches[1:]:
            if not np.array_equal(cache.table.keys, first.table.keys):
                raise ValueError(
                    f"{cache.path} holds other sequences than {first.path}, so their distributions cannot be mixed. "
                    "Give caches that were made from one index.json."
                )
            mine, other = cache.header.codec.temperatures, first.header.codec.temperatures
            if mine != other:
                raise ValueError(
                    f"{cache.path} holds the tail's mass at {mine}, {first.path} at {other}. Give caches with the same "
                    "cache.temperatures."
                )

    def __len__(self) -> int:
        return len(self.caches[0])

    @property
    def table(self) -> SequenceTable:
        """The sequences."""
        return self.caches[0].table

    @property
    def codecs(self) -> list[Codec]:
        """Of each cache."""
        return [cache.header.codec for cache in self.caches]

    @property
    def is_whole(self) -> bool:
        """Whether no mass is outside the kept tokens: then the mixture itself is known."""
        return all(codec.is_complete or codec.method == "sampled" for codec in self.codecs)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Ask the store, if records are in one, for those of several sequences at the same time."""
        for cache in self.caches:
            cache.prefetch(indices)

    def read_targets(self, index: int) -> tuple[SparseTargets, ...]:
        """Return each teacher's distributions at the counted positions of a sequence; raises as LogitCache does.

        Each cache checks its own sequence against its content key, and the keys are equal.
        """
        return tuple(cache.read_targets(index) for cache in self.caches)


@dataclass(frozen=True)
class JoinedTargets:
    """Distributions of M teachers over the tokens that any of them keeps.

    offsets int64 [P + 1] and ids int32 [N] as in SparseTargets; logprobs float32 [M, N], -inf where a teacher does not
    keep the token; tail_logprobs float32 [M, P, temperatures].
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32]


def join_targets(members: Sequence[SparseTargets]) -> JoinedTargets:
    """Join the distributions of M teachers at the same P positions; ids are in the order of first sight."""
    assert len({len(member) for member in members}) == 1, [len(member) for member in members]
    num_positions = len(members[0])
    width = 1 + max(int(member.ids.max(initial=0)) for member in members)
    room = sum(len(member.ids) for member in members)
    offsets = np.zeros(num_positions + 1, np.int64)
    ids = np.empty(room, np.int32)
    logprobs = np.full((len(members), room), -np.inf, np.float32)
    slots = np.full(width, -1, np.int64)  # where an id of the position at hand is
    columns = np.concatenate([member.offsets for member in members])
    firsts = np.cumsum([0, *(len(member.ids) for member in members)])
    all_ids = np.concatenate([member.ids for member in members])
    all_logprobs = np.concatenate([member.logprobs for member in members])
    _join(
        columns.reshape(len(members), -1),
        firsts,
        all_ids,
        all_logprobs,
        slots,
        offsets,
        ids,
        logprobs,
    )
    total = int(offsets[-1])
    return JoinedTargets(
        offsets,
        ids[:total],
        np.ascontiguousarray(logprobs[:, :total]),
        np.stack([member.tail_logprobs for member in members]),
    )


@jit  # type: ignore[untyped-decorator]  # of numba
def _join(
    columns: Any,
    firsts: Any,
    all_ids: Any,
    all_logprobs: Any,
    slots: Any,
    offsets: Any,
    ids: Any,
    logprobs: Any,
) -> None:
    """Fill offsets, ids and logprobs. A slot before the position's first one is of an earlier position."""
    count = 0
    for position in range(len(offsets) - 1):
        first = count
        for member in range(len(columns)):
            start = firsts[member] + columns[member, position]
            stop = firsts[member] + columns[member, position + 1]
            for token in range(start, stop):
                slot = slots[all_ids[token]]
                if slot < first:
                    slot = count
                    slots[all_ids[token]] = slot
                    ids[slot] = all_ids[token]
                    count += 1
                logprobs[member, slot] = all_logprobs[token]
        offsets[position + 1] = count
