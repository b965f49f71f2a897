"""Sequences of token ids, and tables of them.

A *sequence* is one row of token ids fed to a model. Position t predicts the token at t + 1; `loss_mask[t]` says whether
that prediction counts: always for plain text, only for the response after a prompt, never at the last position. A
*counted position* is one where it does.
Consecutive sequences of a long document overlap by one token, so that each of its tokens is predicted exactly once.

Every sequence has a *content key*, a hash of its ids, segment starts and loss mask. Code that pairs other data with a
sequence (a teacher's distributions) compares keys first.
"""

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

SPLITS = ("train", "val")
Labels = tuple[tuple[str, ...], ...]  # (category, language[, source]), by number
KEY_BYTES = 16


@dataclass(frozen=True)
class Sequence:
    """One row of T tokens in G segments: ids and loss mask [T], segment starts [G] (the first is 0), content key."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    segment_starts: NDArray[np.int32]
    key: bytes

    @property
    def num_positions(self) -> int:
        """Number of counted positions."""
        return int(self.loss_mask.sum())

    @property
    def next_ids(self) -> NDArray[np.int32]:
        """The token that each counted position predicts."""
        return self.ids[1:][self.loss_mask[:-1]]


def content_key(
    ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], segment_starts: NDArray[np.int32]
) -> bytes:
    """Return the content key, 16 bytes of xxh3-128; other segments or another mask give another key."""
    state = xxhash.xxh3_128()
    for array, dtype in ((ids, "<i4"), (segment_starts, "<i4"), (loss_mask, "u1")):
        state.update(len(array).to_bytes(8, "little"))
        state.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return state.digest()


@dataclass(frozen=True)
class SequenceTable:
    """S sequences as flat columns, with N tokens and G segments in total."""

    ids: NDArray[np.int32]  # [N]
    loss_mask: NDArray[np.bool_]  # [N]
    offsets: NDArray[np.int64]  # [S + 1], where each sequence's tokens begin in `ids`
    segment_starts: NDArray[np.int32]  # [G], relative to the sequence
    segment_offsets: NDArray[np.int64]  # [S + 1]
    keys: NDArray[np.uint8]  # [S, 16]
    documents: NDArray[np.int64]  # [S], index of the document in the corpus
    labels: NDArray[np.int32]  # [S], index into label_names
    label_names: Labels = (("", ""),)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sequence:
        tokens = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        segments = slice(int(self.segment_offsets[index]), int(self.segment_offsets[index + 1]))
        key = self.keys[index].tobytes()
        return Sequence(
            self.ids[tokens], self.loss_mask[tokens], self.segment_starts[segments], key
        )

    @property
    def num_positions(self) -> int:
        """Number of counted positions."""
        return int(self.loss_mask.sum())

    @property
    def counted(self) -> NDArray[np.int64]:
        """Index in `ids` of each counted position, [P]."""
        return np.flatnonzero(self.loss_mask)

    @property
    def next_ids(self) -> NDArray[np.int32]:
        """The token that each counted position predicts, [P]."""
        return np.asarray(self.ids)[self.counted + 1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per sequence, [S]."""
        return np.diff(self.offsets)

    @property
    def position_offsets(self) -> NDArray[np.int64]:
        """Where each sequence's counted positions begin among all of the table, [S + 1]."""
        if len(self) == 0:
            return np.zeros(1, dtype=np.int64)
        counts = np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])

    def verify_keys(self, *, source: str, first: int = 0) -> None:
        """Raise ValueError when a sequence does not match its key; `first`: number of sequence 0 in `source`."""
        for index in range(len(self)):
            row = self[index]
            if content_key(row.ids, row.loss_mask, row.segment_starts) != row.key:
                raise ValueError(
                    f"{source}: sequence {first + index} does not match its content key; the file "
                    "was damaged or edited. Delete it and rerun the same command."
                )

    def slice(self, first: int, stop: int) -> "SequenceTable":
        """Return sequences first..stop-1 as a table."""
        tokens = slice(int(self.offsets[first]), int(self.offsets[stop]))
        segments = slice(int(self.segment_offsets[first]), int(self.segment_offsets[stop]))
        return SequenceTable(
            ids=self.ids[tokens],
            loss_mask=self.loss_mask[tokens],
            offsets=self.offsets[first : stop + 1] - self.offsets[first],
            segment_starts=self.segment_starts[segments],
            segment_offsets=self.segment_offsets[first : stop + 1] - self.segment_offsets[first],
            keys=self.keys[first:stop],
            documents=self.documents[first:stop],
            labels=self.labels[first:stop],
            label_names=self.label_names,
        )


TABLE_COLUMNS = tuple(f.name for f in fields(SequenceTable) if f.name != "label_names")


def concatenate_tables(tables: Iterable[SequenceTable]) -> SequenceTable:
    """Return one table of all sequences, in order; label names are merged."""
    tables = [build_table([]), *tables]
    label_names = [table.label_names for table in tables]
    names = merge_names(label_names)
    columns = {
        name: join_columns(name, [getattr(t, name) for t in tables], label_names, names)
        for name in TABLE_COLUMNS
    }
    return SequenceTable(**columns, label_names=names)


def merge_names(label_names: Iterable[Iterable[tuple[str, ...]]]) -> Labels:
    """Return the label names of several tables in their order in a table of all."""
    return tuple(sorted({name for names in label_names for name in names} | {("", "")}))


def join_columns(
    name: str, columns: List[NDArray[Any]], label_names: List[Labels], merged: Labels
) -> NDArray[Any]:
    """Return a column of several tables as one: offsets are shifted, labels numbered by the `merged` names."""
    if name.endswith("offsets"):
        starts = np.cumsum([0, *(column[-1] for column in columns)], dtype=np.int64)
        shifted = (c[1:] + start for c, start in zip(columns, starts, strict=False))
        return np.concatenate([np.zeros(1, np.int64), *shifted])
    if name == "labels":
        numbers = {label: number for number, label in enumerate(merged)}
        own = [np.array([numbers[label] for label in labels], np.int32) for labels in label_names]
        columns = [numbers[column] for numbers, column in zip(own, columns, strict=True)]
    return np.concatenate(columns)


# (ids, loss mask, document, (category, language)) of a sequence with one segment
SequenceRow = tuple[ArrayLike, ArrayLike, int, tuple[str, ...]]


def build_table(rows: Iterable[SequenceRow]) -> SequenceTable:
    """Return a table of rows with one segment each."""
    rows = list(rows)
    names = merge_names([name] for *_, name in rows)
    labels = {name: label for label, name in enumerate(names)}
    ids = [np.array(row[0], dtype=np.int32) for row in rows]
    masks = [np.array(row[1], dtype=np.bool_) for row in rows]
    start = np.zeros(1, dtype=np.int32)
    keys = [
        np.frombuffer(content_key(i, m, start), dtype=np.uint8)
        for i, m in zip(ids, masks, strict=True)
    ]
    return SequenceTable(
        ids=np.concatenate([np.empty(0, np.int32), *ids]),
        loss_mask=np.concatenate([np.empty(0, np.bool_), *masks]),
        offsets=np.concatenate([[0], np.cumsum([len(i) for i in ids], dtype=np.int64)]).astype(
            np.int64
        ),
        segment_starts=np.zeros(len(rows), dtype=np.int32),
        segment_offsets=np.arange(len(rows) + 1, dtype=np.int64),
        keys=np.stack(keys) if keys else np.empty((0, KEY_BYTES), np.uint8),
        documents=np.array([row[2] for row in rows], dtype=np.int64),
        labels=np.array([labels[row[3]] for row in rows], dtype=np.int32),
        label_names=names,
    )
