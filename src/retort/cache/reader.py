"""The files of the logit cache: their columns and header, and the reader.

A part and a merged cache are the same kind of HDF5 file (docs/cache-format.md): the sequences with their content
keys, one encoded record per sequence, checksums, and a header that names the teacher, tokenizer, tokens and codec. A
virtual cache is such a file too, whose records are stored in its parts; these may be objects in a store (`stored`). The
reader maps the columns into memory: nothing is loaded before it is used, and DataLoader workers may fork.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.cache.codec import Codec, SparseTargets, TokenOrder
from retort.cache.kinds import PartKind
from retort.cache.methods import read_codec
from retort.cache.pieces import cut_pieces, do_pieces
from retort.cache.stored import KeptBlocks, RecordStore, Span, StoredRecords
from retort.io.hdf5 import open_h5, read_text
from retort.tokens.sequences import TABLE_COLUMNS, SequenceTable, content_key

CACHE_FORMAT = "retort-logits"
CACHE_VERSION = 4
CACHE_FILE = "teacher_logits.h5"
# Columns, and the offsets of their sequences, that are checked when a sequence is read (by its content key and its
# record's checksum) and part by part when files are merged. All others are checked as a whole when a file is opened.
LARGE_COLUMNS = {
    "ids": "offsets",
    "loss_mask": "offsets",
    "segment_starts": "segment_offsets",
    "records": "record_offsets",
}
COLUMN_TYPES = {
    "ids": "<i4",
    "loss_mask": "u1",
    "offsets": "<i8",
    "segment_starts": "<i4",
    "segment_offsets": "<i8",
    "keys": "u1",
    "documents": "<i8",
    "labels": "<i4",
    "record_offsets": "<i8",
    "record_checksums": "<u8",
    "records": "u1",
    "part_offsets": "<i8",
    "part_checksums": "u1",
    "table_offsets": "<i8",
    "tables": "u1",
    "token_order": "<u4",
}
CHECKED_COLUMNS = tuple(name for name in COLUMN_TYPES if name not in LARGE_COLUMNS)
_MAX_MAPPED_PARTS = (
    256  # of a virtual cache: each is an open file, of which a process may have 1,024
)
_MAX_OPEN_TABLES = 64  # parts whose tables stay unpacked, 0.9 MB each; unpacking takes 0.14 ms


@dataclass(frozen=True)
class CacheHeader:
    """What a cache was made from; files may be merged only when their headers are equal."""

    teacher: str  # fingerprint of the weights
    tokenizer: str  # fingerprint of the tokenizer's files
    tokens: str  # content digest of the token index
    codec: Codec
    batch_tokens: int | None = (
        None  # found for batch_tokens: auto; not stored, but in the parts' names
    )
    store: str | None = None  # URL of the folder that parts are stored in; likewise

    def to_json(self) -> dict[str, Any]:
        """Return the header as it is stored; part files are named by a digest of it, and of `batch_tokens`."""
        return {
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "tokens": self.tokens,
            "codec": self.codec.to_json(),
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "CacheHeader":
        """Return the header of a stored entry. Raises ValueError for a codec with impossible sizes."""
        return cls(
            entry["teacher"], entry["tokenizer"], entry["tokens"], read_codec(entry["codec"])
        )

    def require(self, expected: "CacheHeader", *, source: Path) -> None:
        """Raise ValueError naming the first entry in which this header is not the expected one."""
        mine, theirs = self.to_json(), expected.to_json()
        for name in mine:
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"{source} was made with another {name}: it holds {mine[name]!r}, expected {theirs[name]!r}. "
                    "It does not belong to this cache: move it away and rerun the same command."
                )


def checksum_record(key: bytes, record: bytes) -> int:
    """Return the xxh3-64 of a sequence's content key and its record: a record of another sequence does not match."""
    state = xxhash.xxh3_64(key)
    state.update(record)
    return state.intdigest()


def checksum_column(column: NDArray[Any]) -> bytes:
    """Return the xxh3-128 of a column's bytes, 16 bytes."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(column).view(np.uint8).data)


def _read_header(path: Path, file: h5py.File) -> dict[str, Any]:
    """Return the header's JSON. Raises ValueError when it is damaged."""
    text = read_text(file, "header")
    if xxhash.xxh3_64_intdigest(text.encode()) != int(file.attrs["header_checksum"]):
        raise ValueError(f"{path}: the header does not match its checksum: the file is damaged.")
    entry: dict[str, Any] = json.loads(text)
    return entry


def _find_kind(entry: dict[str, Any]) -> PartKind | None:
    made_by = entry.get("made_by")
    return None if made_by is None else PartKind(**made_by)


def read_kind(path: Path) -> PartKind | None:
    """Return the kind of a part without reading its columns. Raises ValueError when it is damaged or foreign."""
    with open_h5(path, expected_format=CACHE_FORMAT, version=CACHE_VERSION) as file:
        return _find_kind(_read_header(path, file))


def _map_columns(
    path: Path, file: h5py.File
) -> tuple[dict[str, NDArray[Any]], dict[str, tuple[int, int]]]:
    """Map every column but a virtual cache's records into memory; 3-5x faster than h5py's reads.

    Returns the columns, and of each the byte range in the file (first byte, number of bytes). Raises ValueError for a
    column of another type or layout than Retort writes.
    """
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))  # slicing a memmap takes 3 us
    columns, byte_ranges = {}, {}
    for name, kind in COLUMN_TYPES.items():
        dataset = h5py.h5d.open(file.id, name.encode())  # 3x as fast as file[name]
        dtype, shape = dataset.dtype, dataset.shape
        expected = (np.dtype(kind), 2 if name in ("keys", "part_checksums") else 1)
        if (dtype, len(shape)) != expected:
            raise ValueError(
                f"{path}: column {name} has (type, dimensions) {dtype, len(shape)}, expected {expected}."
            )
        if name == "records" and dataset.get_create_plist().get_external_count():
            continue
        if 0 in shape:
            columns[name], byte_ranges[name] = np.empty(shape, dtype), (0, 0)
            continue
        offset = dataset.get_offset()
        if offset is None:
            raise ValueError(
                f"{path}: column {name} is not contiguous; it was not written by Retort."
            )
        stop = offset + math.prod(shape) * dtype.itemsize
        if stop > len(raw):
            raise ValueError(
                f"{path}: column {name} ends at byte {stop}, but the file at {len(raw)}: it was cut short. Delete it "
                "and rerun the same command."
            )
        columns[name] = raw[offset:stop].view(dtype).reshape(shape)
        byte_ranges[name] = (offset, stop - offset)
    return columns, byte_ranges


def _open_records(
    source: Path, columns: dict[str, NDArray[Any]], externals: list[Any], part: int
) -> tuple[int, NDArray[np.uint8]]:
    """Return the offset of a part's records among all records, and these records, uint8 [bytes]."""
    bounds = columns["part_offsets"][part : part + 2]
    first, stop = columns["record_offsets"][bounds].tolist()
    if not externals:
        return first, columns["records"][first:stop]
    name, offset, size = externals[part]
    path = source.parent / name
    try:
        records = np.asarray(np.memmap(path, np.uint8, mode="r", offset=offset, shape=size))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), but {source} is a virtual cache (merge.mode), whose records are stored "
            f"there: restore it, or delete {source.parent} and rerun the same command."
        ) from None
    return first, records


def _open_tables(
    columns: dict[str, NDArray[Any]], codec: Codec, read_order: Callable[[], TokenOrder], part: int
) -> Any:
    """Return the codec's tables of one part."""
    start, stop = columns["table_offsets"][part : part + 2].tolist()
    return codec.open_tables(columns["tables"][start:stop].tobytes(), read_order())


class LogitCache:
    """A part or a merged cache, opened for reading; random access by sequence, safe to fork and to pickle.

    Opening checks the header and the small columns; reading a sequence checks its content key and its record's
    checksum. Both raise ValueError, naming the file, when it is damaged, foreign or newer.

    header, table (all sequences), columns (by name, [see COLUMN_TYPES]), byte_ranges (of each column in the file: first
    byte, number of bytes), halved_parts (number of parts scored in halved batches, because memory ran out), kind (of a
    part; None of a merged cache and of an older part), stored (objects that hold the records, one a part; none where
    they are not in a store), kept (what this machine keeps of them).
    """

    def __init__(self, path: Path, kept: KeptBlocks | None = None) -> None:
        self.path, self.kept = path, kept
        with open_h5(path, expected_format=CACHE_FORMAT, version=CACHE_VERSION) as file:
            entry = _read_header(path, file)
            self.columns, self.byte_ranges = _map_columns(path, file)
            self._externals = file["records"].external or []
            for name, expected in entry["checksums"].items():
                found = checksum_column(self.columns[name]).hex()
                if found != expected:
                    raise ValueError(
                        f"{path}: column {name} has checksum {found}, expected {expected}: the file is damaged. "
                        "Delete it and rerun the same command."
                    )
        self.header = CacheHeader.from_json(entry)
        self.halved_parts = int(entry.get("halved_parts", 0))
        self.kind = _find_kind(entry)
        self.stored = tuple(StoredRecords(*place) for place in entry.get("objects", ()))
        self._store = RecordStore(self.stored, kept) if self.stored else None
        order = checksum_column(self.columns["token_order"]).hex()
        if self.header.codec.order not in (None, order):
            raise ValueError(
                f"{path}: the order of tokens is not the one that its header names: the file is damaged. Delete it and "
                "rerun the same command."
            )
        # Caches of this instance that do not refer to it: its files are closed as soon as it is no longer used.
        read_order = lru_cache(1)(partial(TokenOrder.from_ids, self.columns["token_order"]))
        self._find_tables = lru_cache(_MAX_OPEN_TABLES)(
            partial(_open_tables, self.columns, self.header.codec, read_order)
        )
        self._map_records = lru_cache(_MAX_MAPPED_PARTS)(
            partial(_open_records, path, self.columns, self._externals)
        )
        names = tuple(tuple(n) for n in entry["label_names"])
        columns = {name: self.columns[name] for name in TABLE_COLUMNS}
        columns["loss_mask"] = columns["loss_mask"].view(np.bool_)
        self.table = SequenceTable(**columns, label_names=names)

    def __reduce__(self) -> tuple[type["LogitCache"], tuple[Path, KeptBlocks | None]]:
        return LogitCache, (self.path, self.kept)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def is_virtual(self) -> bool:
        """Whether the records are stored in other files, or in objects."""
        return bool(self._externals or self.stored)

    @property
    def needs_parts(self) -> bool:
        """Whether the records are stored in the files of the parts."""
        return bool(self._externals)

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return int(self.columns["record_offsets"][-1])

    @property
    def table_bytes(self) -> int:
        """Bytes of what decoding needs beside the records: the codec's tables and the order of tokens."""
        return len(self.columns["tables"]) + self.columns["token_order"].nbytes

    @property
    def record_checksums(self) -> NDArray[np.uint64]:
        """The checksum of each sequence's record (see `checksum_record`), [S]."""
        return self.columns["record_checksums"]

    def read_record(self, index: int) -> bytes:
        """Return one sequence's record as stored. Raises ValueError when it does not match its checksum."""
        key, expected = self.table[index].key, int(self.columns["record_checksums"][index])
        if self._store:
            span = self._find_span(index)
            record = self._store.read(span)
            if checksum_record(key, record) != expected:
                record = self._store.read_again(span)
        else:
            start, stop = self.columns["record_offsets"][index : index + 2].tolist()
            first, records = self._map_records(self._find_part(index))
            record = records[start - first : stop - first].tobytes()
        if checksum_record(key, record) != expected:
            raise ValueError(
                f"{self.path}: the record of sequence {index} does not match its checksum: the file is damaged, or "
                "the record is another sequence's. Delete it and rerun the same command."
            )
        return record

    def _find_span(self, index: int) -> Span:
        part = self._find_part(index)
        start, stop = self.columns["record_offsets"][index : index + 2].tolist()
        first = int(self.columns["record_offsets"][self._part_offsets[part]])
        return Span(part, start - first, stop - first)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Ask the store, if the records are in one, for those of several sequences at the same time.

        They are held until the next call. Raises ValueError when the store does not give them.
        """
        if self._store:
            self._store.prefetch([self._find_span(index) for index in indices])

    def read_targets(self, index: int) -> SparseTargets:
        """Return the teacher's distributions at the P counted positions of one sequence, in order.

        Raises ValueError when the sequence does not match its content key, or the record is damaged.
        """
        row = self.table[index]
        if content_key(row.ids, row.loss_mask, row.segment_starts) != row.key:
            raise ValueError(
                f"{self.path}: sequence {index} does not hold the tokens that its content key names, so its "
                "distributions may belong to others: the file is damaged. Delete it and rerun the same command."
            )
        record, tables = self.read_record(index), self._find_tables(self._find_part(index))
        return self.header.codec.decode(record, tables, next_ids=row.next_ids)

    @cached_property
    def _part_offsets(self) -> list[int]:
        return [int(first) for first in self.columns["part_offsets"]]

    def _find_part(self, index: int) -> int:
        """Return the index of the part that a sequence came from."""
        return bisect_right(self._part_offsets, index) - 1

    def verify(self, pool: Executor | None = None) -> None:
        """Read and decode every sequence, in the threads of a pool. Raises ValueError when anything is damaged."""

        def verify(piece: slice) -> None:
            for index in range(piece.start, piece.stop):
                self.read_targets(index)

        do_pieces(verify, cut_pieces(np.diff(self.table.position_offsets)), pool)

    def verify_parts(self) -> None:
        """Check the large columns of all parts without decoding. Raises ValueError for the first one damaged."""
        for part in range(len(self.columns["part_checksums"])):
            self.verify_part(part)

    def verify_part(self, part: int) -> None:
        """Check one part's rows of the large columns, without records in a store.

        Raises ValueError when they do not match their checksum.
        """
        found = self._checksum_part(part)
        expected = self.columns["part_checksums"][part].tobytes()[: len(found)]
        if found != expected:
            raise ValueError(
                f"{self.path}: part {part} has checksum {found.hex()}, expected {expected.hex()}: the file is damaged. "
                "Delete it and rerun the same command."
            )

    def _checksum_part(self, part: int) -> bytes:
        """Return the concatenated xxh3-128 of one part's rows of each of the large columns."""
        first, stop = self.columns["part_offsets"][part : part + 2].tolist()
        pieces = []
        for name, offsets in LARGE_COLUMNS.items():
            if name == "records" and self.stored:
                continue  # the last one; each record is checked when it is read
            if name == "records":
                rows = self._map_records(part)[1]
            else:
                start, end = self.columns[offsets][[first, stop]].tolist()
                rows = self.columns[name][start:end]
            pieces.append(checksum_column(rows))
        return b"".join(pieces)


def cache_digest(cache: LogitCache) -> str:
    """Return the sha256, 64 hex digits, of a cache's header, record checksums and content keys."""
    state = hashlib.sha256(json.dumps(cache.header.to_json(), sort_keys=True).encode())
    state.update(np.ascontiguousarray(cache.record_checksums).tobytes())
    state.update(np.ascontiguousarray(cache.table.keys).tobytes())
    return state.hexdigest()
