"""Token shards: HDF5 files with the sequences of one shard of the corpus, written and read in pieces.

Documents stream through the tokenizer in batches. Sequences are spooled to unnamed temporary files, one per column,
until their number is known, and then copied into the shard. Memory holds one batch (and the label names), whatever the
shard's size; the disk holds the shard twice for a while.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from retort.config.sections import Dataset
from retort.corpus.documents import Counts
from retort.corpus.reading import refuse_changed_files
from retort.corpus.sharding import Assignment
from retort.corpus.snapshot import read_documents
from retort.io.files import remove_stale_temporaries
from retort.io.fingerprints import TokenizerIdentity
from retort.io.hdf5 import ColumnSource, open_h5, read_text, write_h5, write_text
from retort.io.records import Entry
from retort.tokens.chat import describe_date
from retort.tokens.sequences import (
    SPLITS,
    TABLE_COLUMNS,
    Labels,
    SequenceTable,
    build_table,
    merge_names,
)
from retort.tokens.tokenize import TokenCounts, tokenize_batches

TOKENS_FORMAT = "retort-tokens"
TOKENS_VERSION = 1
_OFFSETS = ("offsets", "segment_offsets")
_PIECE_BYTES = 1 << 20  # a multiple of every column's item size
# Limits of a block that is read and verified at once: 1.3 MB of tokens, 0.5 MB of other columns; one sequence at least.
_BLOCK_TOKENS = 1 << 18
_BLOCK_SEQUENCES = 1 << 13
_BLOCK_KEYS = 1 << 18  # 4 MB


def tokenize_shard(
    out: Path,
    dataset: Dataset,
    tokenizer: Any,
    *,
    identity: TokenizerIdentity,
    shard: int,
    snapshot: Path | None,
    stamp: str | None = None,
) -> str:
    """Tokenize one shard of the corpus, from its folder `snapshot` if given, to `out`; return a summary line.

    identity: of the tokenizer, stored in the shard. Raises ValueError when the corpus cannot be read, or its
    local files differ from `stamp` (see `digest_file_states`).
    """
    started = time.monotonic()
    documents, counts, assignment = Counts(), TokenCounts(), Assignment()
    source = read_documents(
        dataset, shard=shard, snapshot=snapshot, counts=documents, assignment=assignment
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(out.parent)
    with ExitStack() as stack:
        spools = {split: _Spool(out.parent, stack) for split in SPLITS}
        with refuse_changed_files(dataset, None if snapshot else stamp):
            for tables in tokenize_batches(source, tokenizer, dataset, counts=counts):
                for split, table in tables.items():
                    spools[split].append(table)
        documents.reconcile()
        counted: dict[str, Any] = {"documents": documents.to_json(), "tokens": counts.to_json()}
        counted |= describe_date(tokenizer, dataset.chat_date)
        if (
            assignment.number_of_all
        ):  # 0 if one reader wrote all shards of a snapshot: it cannot lose documents
            counted |= {"dealt": asdict(assignment), "sharding": dataset.sharding}
        _write_shard(
            out,
            {split: spool.columns() for split, spool in spools.items()},
            {split: spool.label_names for split, spool in spools.items()},
            counts=counted,
            tokenizer=identity,
        )
    seconds = time.monotonic() - started
    return (
        f"shard {shard}: {documents.read:,} documents, {counts.stored:,} tokens in "
        f"{sum(spool.num_sequences for spool in spools.values()):,} sequences, "
        f"{counts.read / max(seconds, 1e-9):,.0f} tokens/s"
    )


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_token_shard(
    path: Path,
    tables: Mapping[str, SequenceTable],
    *,
    counts: dict[str, Any],
    tokenizer: TokenizerIdentity,
) -> None:
    """Write a shard from sequences in memory, by split."""
    columns = {
        split: {name: _column_of(getattr(table, name)) for name in TABLE_COLUMNS}
        for split, table in tables.items()
    }
    names = {split: table.label_names for split, table in tables.items()}
    _write_shard(path, columns, names, counts=counts, tokenizer=tokenizer)


def _write_shard(
    path: Path,
    columns: Mapping[str, Mapping[str, ColumnSource]],
    label_names: Mapping[str, Labels],
    *,
    counts: dict[str, Any],
    tokenizer: TokenizerIdentity,
) -> None:
    def fill(file: Any) -> None:
        file.attrs["format"] = np.bytes_(TOKENS_FORMAT)
        file.attrs["version"] = TOKENS_VERSION
        write_text(file, "counts", json.dumps(counts, sort_keys=True))
        write_text(file, "tokenizer", json.dumps(tokenizer.model_dump(), sort_keys=True))
        for split in SPLITS:
            write_text(file, f"{split}/label_names", json.dumps(label_names[split]))

    named = {f"{split}/{name}": columns[split][name] for split in SPLITS for name in TABLE_COLUMNS}
    write_h5(path, fill, columns=named)


def _stored(values: NDArray[Any]) -> NDArray[Any]:
    """Return a column as it is stored: booleans as bytes."""
    values = np.ascontiguousarray(values)
    return values.view(np.uint8) if values.dtype == np.bool_ else values


def _column_of(values: NDArray[Any]) -> ColumnSource:
    stored = _stored(values)
    return ColumnSource(stored.shape, stored.dtype, [stored.reshape(-1).view(np.uint8).data])


class _Spool:
    """One split's sequences until their number is known: one unnamed temporary file per column.

    The system removes unnamed files when the process ends, even if it is killed.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.num_sequences = 0
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context(_open_unnamed(folder)) for name in TABLE_COLUMNS
        }
        self._ends = dict.fromkeys(_OFFSETS, 0)
        self._labels: dict[tuple[str, ...], int] = {}  # number of each label name, as first seen
        for name in _OFFSETS:
            self._files[name].write(np.zeros(1, np.int64).data)

    def append(self, table: SequenceTable) -> None:
        """Append the sequences of a table."""
        self.num_sequences += len(table)
        labels = [self._labels.setdefault(n, len(self._labels)) for n in table.label_names]
        for name, file in self._files.items():
            values = getattr(table, name)
            if name in _OFFSETS:
                values = values[1:] + self._ends[name]
                self._ends[name] += int(getattr(table, name)[-1])
            elif name == "labels":
                values = np.array(labels, np.int32)[values]
            file.write(_stored(values).data)

    @property
    def label_names(self) -> Labels:
        """The label names in their final order."""
        return merge_names([self._labels])

    def columns(self) -> dict[str, ColumnSource]:
        """Return the columns, which can be read once: each file is closed, and its space freed, after reading."""
        empty, columns = build_table([]), {}
        for name, file in self._files.items():
            like = _stored(getattr(empty, name))
            row_bytes = like.itemsize * int(np.prod(like.shape[1:], dtype=np.int64))
            shape = (file.tell() // row_bytes, *like.shape[1:])
            pieces = _read_back(file)
            columns[name] = ColumnSource(
                shape, like.dtype, self._relabel(pieces) if name == "labels" else pieces
            )
        return columns

    def _relabel(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        final = {name: label for label, name in enumerate(self.label_names)}
        relabel = np.array([final[name] for name in self._labels], np.int32)
        for piece in pieces:
            yield relabel[np.frombuffer(piece, np.int32)].view(np.uint8).data


def _open_unnamed(folder: Path) -> AbstractContextManager[BinaryIO]:
    return tempfile.TemporaryFile(dir=folder)


def _read_back(file: BinaryIO) -> Iterator[memoryview]:
    with file:
        file.seek(0)
        while piece := file.read(_PIECE_BYTES):
            yield memoryview(piece)


# ---------------------------------------------------------------------------------------------------------
# Reading


class ShardCounts(Entry):
    """What a shard counts.

    `dealt` and `sharding`: where each shard has a reader of its own, what it was assigned. chat_date: the date that the
    chat template printed, if it prints one.
    """

    documents: Counts = Counts()
    tokens: TokenCounts = TokenCounts()
    dealt: Assignment | None = None
    sharding: str | None = None
    chat_date: str | None = None


def read_shard_metadata(path: Path) -> tuple[TokenizerIdentity, ShardCounts]:
    """Return a shard's tokenizer and counts. Raises ValueError for any other file."""
    with _open_shard(path) as file:
        return (
            TokenizerIdentity.model_validate_json(read_text(file, "tokenizer")),
            ShardCounts.model_validate_json(read_text(file, "counts")),
        )


def read_token_shard(
    path: Path, split: str, *, first: int = 0, stop: int | None = None
) -> SequenceTable:
    """Return sequences first..stop-1 of a split (fewer if it ends before), with verified content keys.

    Reads no other sequences. Raises ValueError for a file that is not a token shard, and for damaged sequences.
    """
    with _open_shard(path) as file:
        size = _count_sequences(file, split)
        stop = size if stop is None else min(stop, size)
        return _read_sequences(file[split], min(first, stop), stop, source=path)


def iterate_token_shard(path: Path, split: str) -> Iterator[SequenceTable]:
    """Yield all sequences of a split in order, verified, in tables of at most 262,144 tokens (or of one sequence).

    Raises ValueError as `read_token_shard` does.
    """
    with _open_shard(path) as file:
        group, size, first = file[split], _count_sequences(file, split), 0
        while first < size:
            offsets = group["offsets"][first : first + _BLOCK_SEQUENCES + 1]
            fitting = int(np.searchsorted(offsets, offsets[0] + _BLOCK_TOKENS, side="right")) - 1
            stop = first + max(1, fitting)
            yield _read_sequences(group, first, stop, source=path)
            first = stop


def iterate_keys(path: Path, split: str) -> Iterator[NDArray[np.uint8]]:
    """Yield the content keys of a split's sequences, uint8 [S, 16] at a time; reads nothing else of the shard."""
    with _open_shard(path) as file:
        keys = file[split]["keys"]
        for first in range(0, len(keys), _BLOCK_KEYS):
            yield keys[first : first + _BLOCK_KEYS]


def _open_shard(path: Path) -> AbstractContextManager[Any]:
    return open_h5(path, expected_format=TOKENS_FORMAT, version=TOKENS_VERSION)


def _count_sequences(file: Any, split: str) -> int:
    return len(file[split]["offsets"]) - 1


def _read_sequences(group: Any, first: int, stop: int, *, source: Path) -> SequenceTable:
    """Return sequences first..stop-1 of an open shard's split, verified."""
    columns = {name: group[name][first : stop + 1] for name in _OFFSETS}
    tokens, segments = (slice(int(o[0]), int(o[-1])) for o in columns.values())
    columns = {name: offsets - offsets[0] for name, offsets in columns.items()}
    columns["ids"] = group["ids"][tokens]
    columns["loss_mask"] = group["loss_mask"][tokens].astype(np.bool_)
    columns["segment_starts"] = group["segment_starts"][segments]
    for name in ("keys", "documents", "labels"):
        columns[name] = group[name][first:stop]
    names = tuple(tuple(map(str, n)) for n in json.loads(read_text(group, "label_names")))
    table = SequenceTable(**columns, label_names=names)
    table.verify_keys(source=str(source), first=first)
    if len(table) and not 0 <= table.labels.min() <= table.labels.max() < len(names):
        raise ValueError(
            f"{source}: a sequence has label {table.labels.max()} of {len(names)}: the file is damaged. Delete it and "
            "rerun the same command."
        )
    return table
