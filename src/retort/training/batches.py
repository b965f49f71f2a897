"""Sequences to batches: read by index, in an order that depends on the seed alone, padded, with the teacher's rows.

Legend: B batch, T tokens of the longest sequence, P counted positions, N kept tokens of all these positions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from retort.cache.codec import SparseTargets
from retort.cache.reader import LogitCache
from retort.tokens.sequences import Sequence, SequenceTable
from retort.training.teacher_rows import TeacherRows

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Item:
    """One sequence, its number in the token index, and the teacher's distributions at its counted positions."""

    index: int
    sequence: Sequence
    targets: SparseTargets | None


class TrainingData(Dataset[Item]):
    """Sequences by their number in the token index: from a table, or from a cache, which contains them."""

    def __init__(self, source: SequenceTable | LogitCache) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        if isinstance(self.source, LogitCache):
            return Item(index, self.source.table[index], self.source.read_targets(index))
        return Item(index, self.source[index], None)


class ShuffledStream(Sampler[int]):
    """The first `count` indices of an endless stream of permutations of all sequences, one for each epoch.

    The permutation of epoch e depends on (seed, e, number of sequences) and on nothing else. Global batches are cut
    from the stream across the ends of epochs, so all are of one size, on any number of GPUs.
    """

    def __init__(self, num_sequences: int, *, seed: int, count: int) -> None:
        self.num_sequences = num_sequences
        self.seed = seed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for epoch in range(math.ceil(self.count / self.num_sequences)):
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            left = self.count - epoch * self.num_sequences
            yield from generator.permutation(self.num_sequences)[:left].tolist()


def count_steps(
    num_sequences: int, *, global_batch: int, max_steps: int | None, num_epochs: float
) -> int:
    """Return the number of optimizer steps: `max_steps`, or the epochs' global batches, rounded up."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(num_epochs * num_sequences / global_batch))


def find_counted(labels_BT: Tensor) -> Tensor:
    """Return the indices int64 [P], in [B * T], of the positions before labels other than IGNORE_INDEX."""
    return (labels_BT.flatten()[1:] != IGNORE_INDEX).nonzero()[:, 0]


def _label(sequence: Sequence) -> Tensor:
    """Return the labels [T] of one sequence (see `Collator`)."""
    labels = np.full(len(sequence.ids), IGNORE_INDEX, np.int64)
    labels[1:][sequence.loss_mask[:-1]] = sequence.next_ids
    return torch.from_numpy(labels)


@dataclass(frozen=True)
class Collator:
    """Pads items to a batch.

    tail_column: that of the stored tails whose temperature is the training's; vocabulary: of a student whose output
    layer is narrower than the teacher's, ids beyond it are dropped; needs_mask: whether the student must be told of the
    padding behind its tokens.
    """

    tail_column: int = 0
    vocabulary: int | None = None
    needs_mask: bool = True

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """Return the batch: int64 input_ids, attention_mask (if needed) and labels [B, T], counted [P], sequences [B],
        and teacher.

        labels[t] is ids[t] where its prediction counts, else IGNORE_INDEX; counted: indices in [B * T] of the positions
        that make these predictions (a GPU would make the host wait for their number); sequences: numbers in the token
        index; teacher: from a cache alone, the TeacherRows of all counted positions, in the batch's order.
        """
        ids = [torch.from_numpy(item.sequence.ids.astype(np.int64)) for item in items]
        labels = [_label(item.sequence) for item in items]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "sequences": torch.tensor([item.index for item in items]),
        }
        batch["counted"] = find_counted(batch["labels"])
        if self.needs_mask:
            mask = [torch.ones_like(row) for row in ids]
            batch["attention_mask"] = pad_sequence(mask, batch_first=True)
        targets = [item.targets for item in items if item.targets is not None]
        if targets:
            batch["teacher"] = self._join(targets)
        return batch

    def _join(self, targets: list[SparseTargets]) -> TeacherRows:
        joined = SparseTargets.concatenate(targets)
        if self.vocabulary is not None:
            joined = joined.below(self.vocabulary)
        tails = np.ascontiguousarray(joined.tail_logprobs[:, self.tail_column])
        columns = joined.offsets, joined.ids.astype(np.int64), joined.logprobs, tails
        return TeacherRows(*map(torch.from_numpy, columns))
