"""The tokens of a decoded dataset to keep, as a cache's codec takes them, and how far the cache is from them.

Legend: P positions, C of them at once, K tokens of each that the dataset has.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from retort.cache.codec import SparseTargets
from retort.cache.entropy_codec import Selection, choose_steps
from retort.cache.sparse_streams import MAX_STEPS, TAIL_UNIT
from retort.imports.distillkit import Compression
from retort.imports.kernels import NO_SUCH_ID, TWICE, keep_probable

_POSITIONS_AT_ONCE = 2048  # 2 MB of 128 tokens each, which stay in the processor's cache
_LEAST_MASS = 0.25 / TAIL_UNIT  # what a tail of zero is read as
_ROUNDING_COST = 4e-4  # nats
# Sums of a position's probabilities: above this, values are not log-probabilities (fits alone reach 1.02).
_LARGEST_MASS = 1.2


@dataclass(frozen=True)
class Selector:
    """Keeps every token of at least `least`, and the most probable one; num_tokens: of the tokenizer.

    is_normalized: whether values are log-probabilities, so that 1 - their sum is the mass of what the dataset has not.
    Otherwise that mass is unknown, and the dataset's K tokens have all of it. steps: of the codec's grid.
    """

    compression: Compression
    least: float
    num_tokens: int
    is_normalized: bool
    steps: int

    @classmethod
    def choose(
        cls,
        compression: Compression,
        values_PK: NDArray[np.float64],
        *,
        least: float,
        num_tokens: int,
    ) -> "Selector":
        """Return the selector for a dataset, by some positions of it."""
        probs_PK = np.exp(values_PK)
        sums_P = probs_PK.sum(axis=1)
        is_normalized = bool(np.median(sums_P) <= _LARGEST_MASS)
        if not is_normalized:
            probs_PK /= sums_P[:, None]
        num_kept = float((probs_PK >= least).sum(axis=1).mean())
        # Rounding costs about K / (6 steps^2) nats, and half of that more where many are barely kept.
        steps = int(np.ceil(np.sqrt(num_kept / (6 * _ROUNDING_COST))))
        steps = min(MAX_STEPS, max(choose_steps("top_p", least), steps))
        return cls(compression, least, num_tokens, is_normalized, steps)

    def select(self, columns: dict[str, NDArray[Any]]) -> Selection:
        """Return what is kept at the positions of columns [P, ...].

        Raises ValueError for ids beyond the tokenizer that have probability, and values that are not numbers.
        """
        num_positions = len(columns[self.compression.columns[0]])
        pieces = [
            self._select(
                {name: rows[at : at + _POSITIONS_AT_ONCE] for name, rows in columns.items()}
            )
            for at in range(0, num_positions, _POSITIONS_AT_ONCE)
        ]
        return Selection.concatenate(pieces)

    def _select(self, columns: dict[str, NDArray[Any]]) -> Selection:
        ids_CK, values_CK = self.compression.decode(columns)
        num = len(ids_CK)
        sizes, ids, probs = (
            np.empty(num, np.int64),
            np.empty(ids_CK.size, np.int64),
            np.empty(ids_CK.size),
        )
        tails = np.empty(num)
        with np.errstate(over="ignore"):
            np.exp(values_CK, out=values_CK)
        count, fault = keep_probable(
            ids_CK,
            values_CK,
            self.least,
            self.is_normalized,
            (sizes, ids, probs, tails),
            np.zeros(self.num_tokens, np.int64),
        )
        if fault:
            self._refuse(fault, ids_CK[count])
        ids, probs = ids[:count].copy(), probs[:count].copy()
        units = np.rint(tails * TAIL_UNIT).astype(np.int64)[:, None]
        none = np.zeros(num, np.int64)
        return Selection(sizes, ids, probs, none, none[:0], units)

    def _refuse(self, fault: int, ids: NDArray[np.int64]) -> NoReturn:
        """Raise ValueError for a position with these ids."""
        if fault == NO_SUCH_ID:
            raise ValueError(
                f"the teacher gives probability to id {ids[ids >= self.num_tokens][0]}, but the tokenizer has only "
                f"{self.num_tokens} tokens: it, or the compression's config, is another one than the dataset was made "
                "with (--tokenizer, --compression)."
            )
        what = "has an id twice" if fault == TWICE else "has values that are not numbers"
        raise ValueError(
            f"a position {what}: the file is damaged, or the compression's config is of another dataset."
        )


@dataclass
class FidelitySums:
    """Sums over positions of what `Fidelity` has the means of: KL(dataset || cache) over kept tokens and the tail."""

    positions: int = 0
    kl: float = 0.0
    agreement: float = 0.0
    tail_mass: float = 0.0

    def add(self, selected: Selection, cached: SparseTargets) -> None:
        """Add the positions of one sequence. Raises ValueError when the cache has other tokens there."""
        rows = np.repeat(np.arange(len(selected.sizes)), selected.sizes)
        mine, theirs = np.lexsort((selected.ids, rows)), np.lexsort((cached.ids, rows))
        if not np.array_equal(selected.ids[mine], cached.ids[theirs]):
            raise ValueError("the cache has other tokens than the dataset: delete it and rerun")
        p, q = selected.probs[mine], np.exp(cached.logprobs[theirs].astype(np.float64))
        tail = np.maximum(1 - np.bincount(rows, selected.probs), _LEAST_MASS)
        q_tail = np.exp(cached.tail_logprobs[:, 0].astype(np.float64))
        self.positions += len(tail)
        self.kl += float((p * np.log(p / q)).sum() + (tail * np.log(tail / q_tail)).sum())
        firsts = np.r_[0, np.cumsum(selected.sizes)][:-1]
        best = np.maximum.reduceat(q, firsts)
        best_p = np.maximum.reduceat(p, firsts)
        is_both = (q == best[rows]) & (p == best_p[rows])
        self.agreement += len(np.unique(rows[is_both]))
        self.tail_mass += float(tail.sum())
