"""Sequences to batches: read by index, in an order that depends on the seed alone, padded, with the teacher's rows.

A *row* of a batch holds one sequence, or several one after another (`packing`).

Legend: B rows of a batch, T tokens of the longest row, P counted positions, N kept tokens of all these positions.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from retort.cache.codec import Codec, SparseTargets
from retort.cache.mixed import CacheMix, join_targets
from retort.cache.reader import LogitCache
from retort.config.sections import Training
from retort.losses.teacher_rows import Mix, TeacherRows
from retort.losses.terms import LossSettings
from retort.models.causal_lm import RowBounds
from retort.models.packing import number_positions
from retort.tokens.sequences import Sequence, SequenceTable

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Item:
    """One sequence, its number in the token index, and the teacher's distributions at its counted positions.

    others: those of further teachers, of a mixture.
    """

    index: int
    sequence: Sequence
    targets: SparseTargets | None
    others: tuple[SparseTargets, ...] = ()


TrainingSource = SequenceTable | LogitCache | CacheMix


Row = tuple[int, ...]  # the numbers of a row's sequences in the token index


class TrainingData(Dataset[list[Item]]):
    """The sequences of a row: from a table, or from caches, which contain them."""

    def __init__(self, source: TrainingSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: Row) -> list[Item]:
        return [self.read(index) for index in row]

    def __getitems__(self, rows: list[Row]) -> list[list[Item]]:
        """Return the sequences of several rows; those of a cache in a store are asked for at the same time."""
        if not isinstance(self.source, SequenceTable):
            self.source.prefetch([index for row in rows for index in row])
        return [self[row] for row in rows]

    def read(self, index: int) -> Item:
        """Return one sequence by its number in the token index."""
        if isinstance(self.source, CacheMix):
            targets, *others = self.source.read_targets(index)
            return Item(index, self.source.table[index], targets, tuple(others))
        if isinstance(self.source, LogitCache):
            return Item(index, self.source.table[index], self.source.read_targets(index))
        return Item(index, self.source[index], None)


class RowOrder(Protocol):
    """In which rows, and in which order, the sequences of each epoch are read: every sequence once."""

    @property
    def rows_per_epoch(self) -> int:
        """The same in every epoch."""

    def list_rows(self, epoch: int) -> Iterable[Row]:
        """Return the rows of an epoch, which depend on it, the sequences' lengths, the seed and nothing else."""


@dataclass(frozen=True)
class Shuffled:
    """A row for each sequence, in another order in each epoch."""

    num_sequences: int
    seed: int

    @property
    def rows_per_epoch(self) -> int:
        """The number of sequences."""
        return self.num_sequences

    def list_rows(self, epoch: int) -> Iterable[Row]:
        """Return the rows of an epoch."""
        return zip(make_generator(self.seed, epoch).permutation(self.num_sequences).tolist())


def make_generator(seed: int, epoch: int) -> np.random.Generator:
    """Return the random numbers of an epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch]))


class RowStream(Sampler[Row]):
    """The first `count` rows of an endless stream of epochs.

    Global batches are cut from the stream across the ends of epochs, so all are of one size, on any number of GPUs.
    """

    def __init__(self, order: RowOrder, *, count: int) -> None:
        self.order, self.count = order, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        epochs = map(self.order.list_rows, itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), self.count)


def count_steps(num_rows: int, training: Training) -> int:
    """Return the number of optimizer steps: `max_steps`, or the global batches of the epochs' rows, rounded up."""
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.num_epochs * num_rows / training.global_batch))


def find_counted(labels_BT: Tensor) -> Tensor:
    """Return the indices int64 [P], in [B * T], of the positions before labels other than IGNORE_INDEX."""
    return (labels_BT.flatten()[1:] != IGNORE_INDEX).nonzero()[:, 0]


def find_tail_column(
    codec: Codec, training: Training | LossSettings, *, path: Path, prefix: str = "training."
) -> int | None:
    """Return the column of the stored tails at the training's temperature; any, where the whole vocabulary is kept.

    None where the temperature goes from one stored one to another.

    prefix: of the settings' names in messages. Raises ValueError when the cache in `path` has no tail at this
    temperature, or holds samples, which are of use at temperature 1 with forward_kl and without position_weights only.
    """
    temperature, divergence = training.temperature, training.divergence
    wanted = [t for t in (temperature, training.temperature_end) if t is not None]
    if codec.method == "sampled" and training.position_weights is not None:
        raise ValueError(
            f"{prefix}position_weights is {training.position_weights}, but {path} holds samples (cache.method: "
            "sampled), which give these weights wrongly. Leave it out, or use a cache of cache.method: top_p."
        )
    if codec.method == "sampled" and (set(wanted) != {1.0} or divergence != "forward_kl"):
        raise ValueError(
            f"{prefix}temperature is {wanted[-1]} and {prefix}divergence {divergence!r}, but {path} holds samples "
            "(cache.method: sampled), which are unbiased for forward_kl at temperature 1 alone. Use these two, or a "
            "cache of cache.method: top_p."
        )
    is_constant = len(set(wanted)) == 1
    if is_constant and temperature in codec.temperatures:
        return codec.temperatures.index(temperature)
    if codec.is_complete:
        return 0
    for missing in (t for t in wanted if t not in codec.temperatures):
        raise ValueError(
            f"{prefix}temperature is {missing}, but {path} holds the tail's mass at {codec.temperatures} only. "
            f"Use one of them, or add {missing} to cache.temperatures, which makes a new cache."
        )
    return None


def label_tokens(sequence: Sequence) -> Tensor:
    """Return the labels int64 [T] of one sequence (see `Collator`)."""
    labels = np.full(len(sequence.ids), IGNORE_INDEX, np.int64)
    labels[1:][sequence.loss_mask[:-1]] = sequence.next_ids
    return torch.from_numpy(labels)


def pad_rows(rows: list[Tensor], value: int = 0) -> Tensor:
    """Return rows of any lengths as one tensor, padded on the right."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


@dataclass(frozen=True)
class Collator:
    """Joins the sequences of each row, and pads rows to a batch.

    tail_column: that of the stored tails whose temperature is the training's, None: all of them; vocabulary: of a
    student whose output layer is narrower than the teacher's, ids beyond it are dropped; needs_mask: whether the
    student must be told of the padding behind its tokens; is_joined: whether rows of several sequences, or of unlike
    lengths, are laid end to end; mix: of several teachers.
    """

    tail_column: int | None = 0
    vocabulary: int | None = None
    needs_mask: bool = True
    is_joined: bool = False
    mix: Mix | None = None

    def __call__(self, rows: list[list[Item]]) -> dict[str, Any]:
        """Return the batch: int64 input_ids, attention_mask (if needed) and labels [B, T], counted [P], sequences, and
        teacher.

        labels[t] is ids[t] where its prediction counts, else IGNORE_INDEX; counted: indices in [B * T] of the positions
        that make these predictions (a GPU would make the host wait for their number); sequences: numbers in the token
        index; teacher: from a cache alone, the TeacherRows of all counted positions, in the batch's order. Where a row
        has several sequences, position_ids [B, T] that begin again at each are there in place of a mask, and, of joined
        rows (B = 1), their RowBounds as `bounds`.
        """
        items = [item for row in rows for item in row]
        lengths = [[len(item.sequence.ids) for item in row] for row in rows]
        if self.is_joined and (len(items) > len(rows) or len(set(map(sum, lengths))) > 1):
            rows, lengths = [items], [list(itertools.chain(*lengths))]
        width = max(map(sum, lengths))
        ids = [np.concatenate([item.sequence.ids for item in row]) for row in rows]
        labels = [torch.cat([label_tokens(item.sequence) for item in row]) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": pad_rows([torch.from_numpy(row.astype(np.int64)) for row in ids]),
            "labels": pad_rows(labels, IGNORE_INDEX),
            "sequences": torch.tensor([item.index for item in items]),
        }
        batch["counted"] = find_counted(batch["labels"])
        if len(items) > len(rows):
            positions = [number_positions([*row, width - sum(row)]) for row in lengths]
            batch["position_ids"] = torch.stack(positions)
            if len(rows) == 1:
                batch["bounds"] = RowBounds.of(lengths[0])
        elif self.needs_mask:
            batch["attention_mask"] = pad_rows([torch.ones_like(row) for row in labels])
        targets = [(item.targets, *item.others) for item in items if item.targets is not None]
        if targets:
            members = [self._concatenate(member) for member in zip(*targets, strict=True)]
            batch["teacher"] = self._build_rows(members)
        return batch

    def _concatenate(self, targets: tuple[SparseTargets, ...]) -> SparseTargets:
        joined = SparseTargets.concatenate(targets)
        return joined if self.vocabulary is None else joined.below(self.vocabulary)

    def _build_rows(self, members: list[SparseTargets]) -> TeacherRows:
        joined = members[0] if self.mix is None else join_targets(members)
        tails = joined.tail_logprobs
        if self.tail_column is not None:
            tails = np.ascontiguousarray(tails[..., self.tail_column])
        columns = joined.offsets, joined.ids.astype(np.int64), joined.logprobs, tails
        return replace(TeacherRows(*map(torch.from_numpy, columns)), mix=self.mix)
