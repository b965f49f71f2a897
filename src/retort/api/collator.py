"""Items of a `CacheDataset` to a batch: padded token ids, and the teacher's distributions as one object.

Legend: B sequences, T tokens of the longest, P counted positions of all, N kept tokens of all these positions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.api.dataset import CacheDataset
from retort.cache.codec import LOGPROB_FLOOR, Codec, SparseTargets
from retort.losses.teacher_rows import TeacherRows
from retort.losses.terms import LossSettings
from retort.training.batches import IGNORE_INDEX, find_counted, find_tail_column, pad_rows


@dataclass(frozen=True)
class Targets:
    """What the losses compare a student with, at the P counted positions of a batch; moved by `to`, like a tensor.

    counted int64 [P]: indices in [B * T] of the positions that predict; labels int64 [P]: the text's tokens after them;
    rows: the teacher's kept tokens, with tail_logprobs [P, temperatures]; shape: (B, T); vocabulary: ids that rows may
    name; codec, path: of the cache.
    """

    counted: Tensor
    labels: Tensor
    rows: TeacherRows
    shape: tuple[int, int]
    vocabulary: int
    codec: Codec
    path: Path

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """Return a copy on a device."""
        device = torch.device(device)
        counted, labels = (t.to(device, non_blocking=non_blocking) for t in self._tensors())
        rows = self.rows.to(device, non_blocking=non_blocking)
        return replace(self, counted=counted, labels=labels, rows=rows)

    def pin_memory(self) -> "Targets":
        """Return a copy in pinned memory; the DataLoader calls this."""
        counted, labels = (t.pin_memory() for t in self._tensors())
        return replace(self, counted=counted, labels=labels, rows=self.rows.pin_memory())

    def choose_rows(self, settings: LossSettings) -> TeacherRows:
        """Return the rows with the tails at the settings' temperature.

        Raises ValueError for a temperature, divergence or weights that the cache has not what it takes for.
        """
        column = find_tail_column(self.codec, settings, path=self.path, prefix="")
        assert column is not None, settings  # they have one temperature
        return self.rows.at(column)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self.counted, self.labels


class Collator:
    """Joins items of a cache to a batch, in DataLoader workers too.

    vocabulary: width of the student's output layer, where it is narrower than the teacher's; pad_token_id: what
    input_ids are padded with, on the right.
    """

    def __init__(
        self, cache: CacheDataset, *, vocabulary: int | None = None, pad_token_id: int = 0
    ) -> None:
        self.codec, self.path = cache.cache.header.codec, cache.path
        self.vocabulary = min(vocabulary or cache.vocabulary, cache.vocabulary)
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels, int64 [B, T], and `targets`, the batch's Targets.

        Raises ValueError when the items have no targets, or one with probability that the student has no id for.
        """
        if not all("targets" in item for item in items):
            raise ValueError(
                "the items have no targets: transformers' Trainer removes what it does not know. Set "
                "TrainingArguments(remove_unused_columns=False)."
            )
        ids_BT = pad_rows([item["input_ids"] for item in items], self.pad_token_id)
        labels_BT = pad_rows([item["labels"] for item in items], IGNORE_INDEX)
        counted = find_counted(labels_BT)
        joined = self._cut(SparseTargets.concatenate([item["targets"] for item in items]))
        columns = joined.offsets, joined.ids.astype("int64"), joined.logprobs, joined.tail_logprobs
        return {
            "input_ids": ids_BT,
            "attention_mask": pad_rows([torch.ones_like(item["input_ids"]) for item in items]),
            "labels": labels_BT,
            "targets": Targets(
                counted,
                labels_BT.flatten()[counted + 1],
                TeacherRows(*map(torch.from_numpy, columns)),
                (ids_BT.shape[0], ids_BT.shape[1]),
                self.vocabulary,
                self.codec,
                self.path,
            ),
        }

    def _cut(self, targets: SparseTargets) -> SparseTargets:
        """Return the targets without ids that only the teacher's wider output layer has."""
        is_beyond = targets.ids >= self.vocabulary
        if (targets.logprobs[is_beyond] > LOGPROB_FLOOR).any():
            found = int(targets.ids[is_beyond][targets.logprobs[is_beyond] > LOGPROB_FLOOR][0])
            raise ValueError(
                f"the teacher of {self.path} gives probability to id {found}, but the student has only "
                f"{self.vocabulary} ids: they have different tokenizers. Use a student with the teacher's."
            )
        return targets.below(self.vocabulary) if is_beyond.any() else targets
