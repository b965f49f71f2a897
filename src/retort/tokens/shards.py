"""Token shards: the sequences of one slice of the corpus, as a file that is written and read in pieces.

Documents stream through the tokenizer batch by batch. Sequences wait in files without names, one for each column, until
their number is known; then the shard is laid out and they are copied into it. Memory holds one batch (and the names of
labels), whatever the shard's size; the disk holds a shard twice for a while.
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
from retort.corpus.reading import read_documents, unchanged
from retort.corpus.sharding import Dealt
from retort.corpus.snapshot import read_drawn
from retort.io.files import remove_stale_temporaries
from retort.io.hdf5 import ColumnSource, open_h5, read_text, write_h5, write_text
from retort.tokens.sequences import SPLITS, TABLE_COLUMNS, SequenceTable, build_table
from retort.tokens.tokenize import TokenCounts, tokenize_batches

TOKENS_FORMAT = "retort-tokens"
TOKENS_VERSION = 1
_OFFSETS = ("offsets", "segment_offsets")
_PIECE_BYTES = 1 << 20  # whole values: a multiple of every column's
# What is read and verified at once: 1.3 MB of tokens, 0.5 MB beside them, and at least one sequence.
_BLOCK_TOKENS = 1 << 18
_BLOCK_SEQUENCES = 1 << 13
_BLOCK_KEYS = 1 << 18  # 4 MB


def tokenize_shard(
    out: Path,
    dataset: Dataset,
    tokenizer: Any,
    *,
    fingerprint: dict[str, Any],
    shard: int,
    drawn: Path | None,
    stamp: str | None = None,
) -> str:
    """Tokenize one shard of the corpus (of a drawn one where `drawn` names its folder); return what was counted.

    Raises ValueError when the corpus is no longer what `stamp` (see `digest_file_states`) was taken of.
    """
    started = time.monotonic()
    documents, counts, dealt = Counts(), TokenCounts(), Dealt()
    source = (
        read_drawn(drawn, shard=shard, counts=documents, dealt=dealt)
        if drawn
        else read_documents(
            dataset, shard=shard, num_shards=dataset.num_shards, counts=documents, dealt=dealt
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(out.parent)
    with ExitStack() as stack:
        spools = {split: _Spool(out.parent, stack) for split in SPLITS}
        with unchanged(dataset, None if drawn else stamp):
            for tables in tokenize_batches(source, tokenizer, dataset, counts=counts):
                for split, table in tables.items():
                    spools[split].append(table)
        documents.reconcile()
        counted: dict[str, Any] = {"documents": documents.to_json(), "tokens": asdict(counts)}
        if dealt.number_of_all:  # one reader that draws for all shards deals once, and cannot err
            counted |= {"dealt": dealt.to_json(), "sharding": dataset.sharding}
        _write_shard(
            out,
            {split: spool.columns() for split, spool in spools.items()},
            {split: spool.label_names for split, spool in spools.items()},
            counts=counted,
            tokenizer=fingerprint,
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
    tokenizer: dict[str, Any],
) -> None:
    """Write a shard of sequences that are in memory: a group for each split, counts, the tokenizer's fingerprint."""
    columns = {
        split: {name: _column_of(getattr(table, name)) for name in TABLE_COLUMNS}
        for split, table in tables.items()
    }
    names = {split: table.label_names for split, table in tables.items()}
    _write_shard(path, columns, names, counts=counts, tokenizer=tokenizer)


def _write_shard(
    path: Path,
    columns: Mapping[str, Mapping[str, ColumnSource]],
    label_names: Mapping[str, tuple[tuple[str, str], ...]],
    *,
    counts: dict[str, Any],
    tokenizer: dict[str, Any],
) -> None:
    def fill(file: Any) -> None:
        file.attrs["format"] = np.bytes_(TOKENS_FORMAT)
        file.attrs["version"] = TOKENS_VERSION
        write_text(file, "counts", json.dumps(counts, sort_keys=True))
        write_text(file, "tokenizer", json.dumps(tokenizer, sort_keys=True))
        for split in SPLITS:
            write_text(file, f"{split}/label_names", json.dumps(label_names[split]))

    named = {f"{split}/{name}": columns[split][name] for split in SPLITS for name in TABLE_COLUMNS}
    write_h5(path, fill, columns=named)


def _stored(values: NDArray[Any]) -> NDArray[Any]:
    """Return a column as it lies in the file: truth values as bytes."""
    values = np.ascontiguousarray(values)
    return values.view(np.uint8) if values.dtype == np.bool_ else values


def _column_of(values: NDArray[Any]) -> ColumnSource:
    stored = _stored(values)
    return ColumnSource(stored.shape, stored.dtype, [stored.reshape(-1).view(np.uint8).data])


class _Spool:
    """One split's sequences before their number is known: each column a file without a name in `folder`.

    Files without names go with the process, however it ends.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.num_sequences = 0
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context(_open_nameless(folder)) for name in TABLE_COLUMNS
        }
        self._ends = dict.fromkeys(_OFFSETS, 0)
        self._places: dict[tuple[str, str], int] = {}  # of labels, in the order in which they came
        for name in _OFFSETS:
            self._files[name].write(np.zeros(1, np.int64).data)

    def append(self, table: SequenceTable) -> None:
        """Add the sequences of a table after those that are there."""
        self.num_sequences += len(table)
        places = [self._places.setdefault(n, len(self._places)) for n in table.label_names]
        for name, file in self._files.items():
            values = getattr(table, name)
            if name in _OFFSETS:
                values = values[1:] + self._ends[name]
                self._ends[name] += int(getattr(table, name)[-1])
            elif name == "labels":
                values = np.array(places, np.int32)[values]
            file.write(_stored(values).data)

    @property
    def label_names(self) -> tuple[tuple[str, str], ...]:
        """The labels in their final order."""
        return tuple(sorted({*self._places, ("", "")}))

    def columns(self) -> dict[str, ColumnSource]:
        """Return the columns, to be copied once: each file is closed, and its room free, when it was read."""
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
        final = {name: place for place, name in enumerate(self.label_names)}
        place_of = np.array([final[name] for name in self._places], np.int32)
        for piece in pieces:
            yield place_of[np.frombuffer(piece, np.int32)].view(np.uint8).data


def _open_nameless(folder: Path) -> AbstractContextManager[BinaryIO]:
    return tempfile.TemporaryFile(dir=folder)


def _read_back(file: BinaryIO) -> Iterator[memoryview]:
    with file:
        file.seek(0)
        while piece := file.read(_PIECE_BYTES):
            yield memoryview(piece)


# ---------------------------------------------------------------------------------------------------------
# Reading


def read_about(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (the tokenizer's fingerprint and size, counts) of a shard. Raises ValueError on any other file."""
    with _open_shard(path) as file:
        return json.loads(read_text(file, "tokenizer")), json.loads(read_text(file, "counts"))


def read_token_shard(
    path: Path, split: str, *, first: int = 0, stop: int | None = None
) -> SequenceTable:
    """Read sequences first..stop-1 of a split (fewer where it ends before), and verify their content keys.

    The cost is that of these sequences alone. Raises ValueError on any other file, and on damage among them.
    """
    with _open_shard(path) as file:
        size = _count_sequences(file, split)
        stop = size if stop is None else min(stop, size)
        return _read_sequences(file[split], min(first, stop), stop, source=path)


def iterate_token_shard(path: Path, split: str) -> Iterator[SequenceTable]:
    """Yield all sequences of a split in order, verified, in tables of at most 262,144 tokens or one sequence.

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
    """Yield the content keys of a split's sequences, [S, 16] at a time; nothing else of the shard is read."""
    with _open_shard(path) as file:
        keys = file[split]["keys"]
        for first in range(0, len(keys), _BLOCK_KEYS):
            yield keys[first : first + _BLOCK_KEYS]


def _open_shard(path: Path) -> AbstractContextManager[Any]:
    return open_h5(path, expected_format=TOKENS_FORMAT, version=TOKENS_VERSION)


def _count_sequences(file: Any, split: str) -> int:
    return len(file[split]["offsets"]) - 1


def _read_sequences(group: Any, first: int, stop: int, *, source: Path) -> SequenceTable:
    """Read sequences first..stop-1 of an open shard's split, and verify them."""
    columns = {name: group[name][first : stop + 1] for name in _OFFSETS}
    tokens, segments = (slice(int(o[0]), int(o[-1])) for o in columns.values())
    columns = {name: offsets - offsets[0] for name, offsets in columns.items()}
    columns["ids"] = group["ids"][tokens]
    columns["loss_mask"] = group["loss_mask"][tokens].astype(np.bool_)
    columns["segment_starts"] = group["segment_starts"][segments]
    for name in ("keys", "documents", "labels"):
        columns[name] = group[name][first:stop]
    names = tuple((str(c), str(lang)) for c, lang in json.loads(read_text(group, "label_names")))
    table = SequenceTable(**columns, label_names=names)
    table.verify_keys(source=str(source), first=first)
    if len(table) and not 0 <= table.labels.min() <= table.labels.max() < len(names):
        raise ValueError(
            f"{source}: a sequence has label {table.labels.max()} of {len(names)}: the file is damaged. Delete it and "
            "run the same command again."
        )
    return table
