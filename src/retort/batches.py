"""Sequences become batches: read by index, shuffled by the seed alone, padded, with their targets beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from retort.cache import LogitCache
from retort.codec import SparseTargets
from retort.tokens import Sequence, SequenceTable

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Item:
    """One sequence, and the teacher's distributions at its counted positions where a cache is read."""

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
            return Item(self.source.table[index], self.source.read_targets(index))
        return Item(self.source[index], None)


class EpochShuffle(Sampler[int]):
    """A permutation that depends on (seed, epoch, number of sequences) and on nothing else."""

    def __init__(self, num_sequences: int, *, seed: int) -> None:
        self.num_sequences = num_sequences
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch, and on resuming."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_sequences

    def __iter__(self) -> Iterator[int]:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        return iter(generator.permutation(self.num_sequences).tolist())


@dataclass(frozen=True)
class Collator:
    """Pad items to a batch; `temperature_place` is the column of the stored tail that training uses."""

    temperature_place: int = 0

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels [B, T] (labels[t] = ids[t] where its prediction counts) and,
        from a cache, the teacher's rows in the batch's order as `TeacherRows` has them: kept_offsets [P + 1],
        kept_ids and kept_logprobs [N], tail_logprobs [P]."""
        width = max(len(item.sequence.ids) for item in items)
        batch = {
            "input_ids": torch.zeros((len(items), width), dtype=torch.long),
            "attention_mask": torch.zeros((len(items), width), dtype=torch.long),
            "labels": torch.full((len(items), width), IGNORE_INDEX, dtype=torch.long),
        }
        for b, item in enumerate(items):
            ids = torch.from_numpy(np.array(item.sequence.ids, dtype=np.int64))
            counts = torch.from_numpy(np.array(item.sequence.loss_mask))
            batch["input_ids"][b, : len(ids)] = ids
            batch["attention_mask"][b, : len(ids)] = 1
            batch["labels"][b, 1 : len(ids)] = ids[1:].masked_fill(~counts[:-1], IGNORE_INDEX)
        targets = [item.targets for item in items if item.targets is not None]
        if targets:
            joined = SparseTargets.concatenate(targets)
            tails = np.ascontiguousarray(joined.tail_logprobs[:, self.temperature_place])
            batch["kept_offsets"] = torch.from_numpy(joined.offsets)
            batch["kept_ids"] = torch.from_numpy(joined.ids.astype(np.int64))
            batch["kept_logprobs"] = torch.from_numpy(joined.logprobs)
            batch["tail_logprobs"] = torch.from_numpy(tails)
        return batch
