"""Sequences become batches: read by index, shuffled by the seed alone, padded, with their targets beside them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from retort.cache.codec import SparseTargets
from retort.cache.reader import LogitCache
from retort.tokens.sequences import Sequence, SequenceTable
from retort.training.fused_loss import TeacherRows

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Item:
    """One sequence, its place in the token index, and the teacher's distributions at its counted positions."""

    place: int
    sequence: Sequence
    targets: SparseTargets | None


class TrainingData(Dataset[Item]):
    """Sequences by index, in the token index's order: from a table, or from a cache that holds its own."""

    def __init__(self, source: SequenceTable | LogitCache) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        if isinstance(self.source, LogitCache):
            return Item(index, self.source.table[index], self.source.read_targets(index))
        return Item(index, self.source[index], None)


class ShuffledStream(Sampler[int]):
    """`count` places of a stream that is one permutation of all sequences after the other, without end.

    The permutation of epoch e depends on (seed, e, number of sequences) and on nothing else. Global batches are cut
    from the stream, so that all are of one size and none is left over, on any number of GPUs.
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
    """Return the number of optimizer steps: as given, or as many whole global batches as the epochs begin."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(num_epochs * num_sequences / global_batch))


@dataclass(frozen=True)
class Collator:
    """Pad items to a batch; `temperature_place` is the column of the stored tail that training uses.

    `vocabulary`: of a student whose output layer is narrower than the teacher's; ids beyond it are left out.
    """

    temperature_place: int = 0
    vocabulary: int | None = None

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels [B, T] (labels[t] = ids[t] where its prediction counts), places [B]
        in the token index and, from a cache, the teacher's rows in the batch's order."""
        width = max(len(item.sequence.ids) for item in items)
        batch: dict[str, Any] = {
            "input_ids": torch.zeros((len(items), width), dtype=torch.long),
            "attention_mask": torch.zeros((len(items), width), dtype=torch.long),
            "labels": torch.full((len(items), width), IGNORE_INDEX, dtype=torch.long),
            "places": torch.tensor([item.place for item in items]),
        }
        for b, item in enumerate(items):
            ids = torch.from_numpy(np.array(item.sequence.ids, dtype=np.int64))
            counts = torch.from_numpy(np.array(item.sequence.loss_mask))
            batch["input_ids"][b, : len(ids)] = ids
            batch["attention_mask"][b, : len(ids)] = 1
            batch["labels"][b, 1 : len(ids)] = ids[1:].masked_fill(~counts[:-1], IGNORE_INDEX)
        targets = [item.targets for item in items if item.targets is not None]
        if targets:
            batch["teacher"] = self._join(targets)
        return batch

    def _join(self, targets: list[SparseTargets]) -> TeacherRows:
        joined = SparseTargets.concatenate(targets)
        if self.vocabulary is not None:
            joined = joined.below(self.vocabulary)
        tails = np.ascontiguousarray(joined.tail_logprobs[:, self.temperature_place])
        columns = joined.offsets, joined.ids.astype(np.int64), joined.logprobs, tails
        return TeacherRows(*map(torch.from_numpy, columns))
