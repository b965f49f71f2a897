"""How the sequences of a batch are laid out: end to end, packed, by length, or padded in rows of one sequence each.

Legend: S sequences, R rows.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.config.sections import Training
from retort.models.attention import join_attention, split_attention
from retort.models.causal_lm import CausalLM
from retort.models.packing import find_joining_fault, find_packing_fault
from retort.training.batches import Row, RowOrder, Shuffled, make_generator

logger = logging.getLogger(__name__)

_BATCHES_SORTED = 50  # global batches that are sorted by length at once: transformers' group_by_length has as many


def fit_lengths(descending: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the row int64 [S] that each length is put into: the fullest one with room for it, else a new one.

    Best-fit decreasing, which needs at most 11/9 of the fewest rows (Johnson, Near-optimal bin packing algorithms,
    1973). The rows that have room are found by a bit for each number of tokens that is left in some row.
    """
    assert descending.max(initial=0) <= capacity, (descending.max(), capacity)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by tokens left
    spaces, num_rows, found = 0, 0, []
    for length in descending.tolist():
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            space, row, num_rows = capacity, num_rows, num_rows + 1
        found.append(row)
        if left := space - length:
            rows_with[left].append(row)
            spaces |= 1 << left
    return np.array(found, np.int64)


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of whole sequences, at most `capacity` tokens long, in another order in each epoch.

    How many tokens each row has, and in sequences of which lengths, is the same in every epoch; which of the sequences
    of a length is in which row, and the order of the rows, are drawn.
    """

    lengths: NDArray[np.int64]  # [S], tokens
    capacity: int
    seed: int

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ranks by length of all rows' sequences, row after row, int64 [S], and where each row begins [R + 1]."""
        rows = fit_lengths(-np.sort(-self.lengths), self.capacity)
        return np.argsort(rows, kind="stable"), np.r_[0, np.cumsum(np.bincount(rows))]

    @property
    def rows_per_epoch(self) -> int:
        """R."""
        return len(self._places[1]) - 1

    def list_rows(self, epoch: int) -> Iterator[Row]:
        """Yield the rows of an epoch."""
        generator = make_generator(self.seed, epoch)
        shuffled = generator.permutation(len(self.lengths))
        by_length = shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]
        ranks, firsts = self._places
        sequences = by_length[ranks]
        for row in generator.permutation(self.rows_per_epoch).tolist():
            yield tuple(sequences[firsts[row] : firsts[row + 1]].tolist())


@dataclass(frozen=True, eq=False)
class Grouped:
    """A row for each sequence; those of a global batch are of similar length, and batches come in a random order.

    In the manner of transformers' group_by_length: some batches' sequences are drawn, then sorted.
    """

    lengths: NDArray[np.int64]  # [S], tokens
    global_batch: int
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        """S."""
        return len(self.lengths)

    def list_rows(self, epoch: int) -> Iterator[Row]:
        """Yield the rows of an epoch; its first ones complete the last batch of the epoch before."""
        generator, size = make_generator(self.seed, epoch), self.global_batch
        shuffled = generator.permutation(len(self.lengths))
        first = -epoch * len(self.lengths) % size
        yield from zip(shuffled[:first].tolist())
        for start in range(first, len(shuffled), size * _BATCHES_SORTED):
            drawn = shuffled[start : start + size * _BATCHES_SORTED]
            drawn = drawn[np.argsort(-self.lengths[drawn], kind="stable")]
            whole = len(drawn) // size
            for batch in generator.permutation(whole).tolist():
                yield from zip(drawn[batch * size : (batch + 1) * size].tolist())
            yield from zip(drawn[whole * size :].tolist())


def choose_layout(
    lengths: NDArray[np.int64],
    training: Training,
    *,
    capacity: int,
    student: CausalLM,
    teacher: CausalLM | None,
) -> tuple[RowOrder, bool]:
    """Return the order of rows, and whether those of a batch are joined end to end, without padding.

    capacity: tokens of a packed row. A live teacher reads the student's batches. Raises ValueError when
    training.packing or padding_free is true and student or teacher mixes the sequences of a row, and when a sequence is
    longer than a row.
    """
    if training.packing and (longest := int(lengths.max())) > capacity:
        raise ValueError(
            f"training.packing fills rows of dataset.max_length ({capacity}) tokens, but a sequence has {longest}. "
            "Give the dataset.max_length that the tokens were made with."
        )
    faults = find_layout_faults([m for m in (student, teacher) if m is not None], training)
    order: RowOrder = Shuffled(len(lengths), training.seed)
    if training.packing and faults.packing is None:
        order = packed = Packed(lengths, capacity, training.seed)
        rows = packed.rows_per_epoch
        logger.info(
            f"{len(lengths):,} sequences are packed in {rows:,} rows, {lengths.sum() / rows / capacity:.1%} full"
        )
    elif training.packing:
        order = Grouped(lengths, training.global_batch, training.seed)
        logger.info(
            f"{faults.packing}: they are not packed, and batches are of sequences of similar length"
        )
    elif faults.joining and training.padding_free:
        logger.info(f"{faults.joining}: batches are padded")
    return order, faults.joining is None


class LayoutFaults(NamedTuple):
    """Why the rows of a batch cannot be joined end to end, and why several sequences cannot share a row."""

    joining: str | None
    packing: str | None


def find_layout_faults(models: list[CausalLM], training: Training) -> LayoutFaults:
    """Return what speaks against the layouts that are asked for; let the models attend by sequence, if they can.

    Raises ValueError when training.packing or padding_free is true and there is a fault.
    """
    joining: str | None = "training.padding_free is false"
    if training.padding_free and training.torch_compile:  # it would compile again for every batch
        joining = "training.torch_compile is true"
    elif training.padding_free:
        for model in models:
            split_attention(model.model)
        joining = next(filter(None, map(find_joining_fault, models)), None)
    if joining:
        for model in models:
            join_attention(model.model)
    if joining and training.padding_free is True:
        raise ValueError(
            f"training.padding_free is true, but {joining}. Use training.padding_free: auto, which then pads, or false."
        )
    packing = None
    if joining and training.packing:
        faults = (find_packing_fault(model, at_once=True) for model in models)
        packing = next(filter(None, faults), None)
    if packing and training.packing is True:
        raise ValueError(
            f"training.packing is true, but {packing}. Use training.packing: auto, which then takes batches of similar "
            "length, or false."
        )
    return LayoutFaults(joining, packing)
