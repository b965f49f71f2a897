"""The logit cache: write a part, verify it, merge parts into one file, read either.

A part and a merged cache are the same kind of HDF5 file (docs/cache-format.md): the sequences with their content
keys, one encoded record per sequence, a checksum per record, and a header that says which teacher, tokenizer,
tokens and codec made it. Both are written in one canonical order, so equal content gives equal bytes whatever
happened on the way. A reader maps the columns into memory: nothing is loaded before it is asked for, and
DataLoader workers may fork.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.codec import (
    Codec,
    SparseTargets,
    TokenOrder,
    decode,
    encode,
)
from retort.entropy import Lookup, build_lookup, unpack_tables
from retort.provenance import digest
from retort.shards import (
    TokenIndex,
    name_part,
    open_h5,
    read_text,
    write_h5,
    write_large_h5,
    write_text,
)
from retort.sparse_codec import decode_streams, encode_streams
from retort.sparse_streams import Streams, count_contexts
from retort.tokens import SequenceTable, content_key

CACHE_FORMAT = "retort-logits"
CACHE_VERSION = 3
CACHE_FILE = "teacher_logits.h5"
DAMAGED = ".damaged"
# Columns checked whole when a file is opened; ids, masks and segments are checked by each sequence's content
# key, and records by their own checksums, when they are read.
_CHECKED_COLUMNS = (
    "offsets",
    "segment_offsets",
    "keys",
    "documents",
    "labels",
    "record_offsets",
    "record_checksums",
    "part_offsets",
    "table_offsets",
    "tables",
    "token_order",
)
_TABLE_COLUMNS = tuple(f.name for f in fields(SequenceTable) if f.name != "label_names")
_COLUMN_TYPES = {
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
    "table_offsets": "<i8",
    "tables": "u1",
    "token_order": "<u4",
}
_LOOKUPS_KEPT = 64  # parts whose tables are unpacked at once, 0.9 MB each; unpacking takes 0.14 ms


@dataclass(frozen=True)
class CacheHeader:
    """What made a cache; two files may be merged only when their headers are equal."""

    teacher: str  # fingerprint of the weights
    tokenizer: str  # fingerprint of the tokenizer's files
    tokens: str  # content digest of the token index
    codec: Codec

    def to_json(self) -> dict[str, Any]:
        """Return the header as it is stored."""
        return {
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "tokens": self.tokens,
            "codec": self.codec.to_json(),
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "CacheHeader":
        """Read a stored header."""
        return cls(
            entry["teacher"], entry["tokenizer"], entry["tokens"], Codec.from_json(entry["codec"])
        )

    def require(self, expected: "CacheHeader", *, source: Path) -> None:
        """Raise ValueError naming the first entry in which this header is not the expected one."""
        mine, theirs = self.to_json(), expected.to_json()
        for name in mine:
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"{source} was made with another {name}: it holds {mine[name]!r}, expected {theirs[name]!r}. "
                    "It does not belong to this cache: move it away and run the same command again."
                )


def part_path(folder: Path, part_name: str, header: CacheHeader) -> Path:
    """Return where the part of that name lies: the file name says what is in it and what made it."""
    return folder / f"{digest([part_name, header.to_json(), CACHE_VERSION])}.h5"


def write_part(
    path: Path,
    table: SequenceTable,
    targets: SparseTargets | Sequence[Streams],
    header: CacheHeader,
    order: TokenOrder | None = None,
) -> None:
    """Write one part atomically.

    `targets` holds the table's counted positions in order, [P] rows (method top_k), or every sequence's streams, which
    `order` was used for.
    """
    packed = b""
    if isinstance(targets, SparseTargets):
        assert len(targets) == table.num_positions, (len(targets), table.num_positions)
        bounds = table.position_offsets
        records = [
            encode(targets[int(bounds[i]) : int(bounds[i + 1])], header.codec)
            for i in range(len(table))
        ]
    else:
        assert len(targets) == len(table), (len(targets), len(table))
        records, packed = encode_streams(targets, header.codec)
    columns = {name: getattr(table, name) for name in _TABLE_COLUMNS}
    columns["record_offsets"] = np.cumsum([0, *map(len, records)], dtype=np.int64)
    columns["record_checksums"] = np.array(
        [_record_checksum(table[i].key, record) for i, record in enumerate(records)],
        dtype=np.uint64,
    )
    columns["records"] = np.frombuffer(b"".join(records), dtype=np.uint8)
    columns["part_offsets"] = np.array([0, len(table)], np.int64)
    columns["table_offsets"] = np.array([0, len(packed)], np.int64)
    columns["tables"] = np.frombuffer(packed, np.uint8)
    columns["token_order"] = (order.ids if order else np.empty(0)).astype(np.uint32)

    def fill(file: h5py.File) -> None:
        for name, column in columns.items():
            file.create_dataset(name, data=_plain(column))
        _write_header(
            file, header, table.label_names, {n: _checksum(columns[n]) for n in _CHECKED_COLUMNS}
        )

    write_h5(path, fill)


def _write_header(
    file: h5py.File, header: CacheHeader, label_names: Any, checksums: dict[str, str]
) -> None:
    file.attrs["format"] = np.bytes_(CACHE_FORMAT)
    file.attrs["version"] = CACHE_VERSION
    content = header.to_json() | {"label_names": label_names, "checksums": checksums}
    text = json.dumps(content, sort_keys=True)
    write_text(file, "header", text)
    file.attrs["header_checksum"] = np.uint64(xxhash.xxh3_64_intdigest(text.encode()))


def _record_checksum(key: bytes, record: bytes) -> int:
    """Return the xxh3-64 of a record and the content key of its sequence: a record moved to another one is refused."""
    state = xxhash.xxh3_64(key)
    state.update(record)
    return state.intdigest()


def _plain(column: NDArray[Any]) -> NDArray[Any]:
    return column.astype(np.uint8) if column.dtype == np.bool_ else column


def _checksum(column: NDArray[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(_plain(column)).tobytes())


def _map_columns(path: Path, file: h5py.File) -> dict[str, NDArray[Any]]:
    """Map every column's bytes, through one mapping of the file; 3-5x faster than h5py's reads.

    Raises ValueError for a column of another type or layout than Retort writes.
    """
    raw = np.memmap(path, np.uint8, mode="r")
    columns = {}
    for name, kind in _COLUMN_TYPES.items():
        dataset = file[name]
        expected = (np.dtype(kind), 2 if name == "keys" else 1)
        if (dataset.dtype, dataset.ndim) != expected:
            raise ValueError(
                f"{path}: column {name} has (type, dimensions) {dataset.dtype, dataset.ndim}, expected {expected}."
            )
        if dataset.size == 0:
            columns[name] = np.empty(dataset.shape, dataset.dtype)
            continue
        offset = dataset.id.get_offset()
        if offset is None:
            raise ValueError(
                f"{path}: column {name} is not contiguous; it was not written by Retort."
            )
        stop = offset + dataset.size * dataset.dtype.itemsize
        if stop > len(raw):
            raise ValueError(
                f"{path}: column {name} ends at byte {stop}, the file at {len(raw)}: it was cut short. Delete it and "
                "run the same command again."
            )
        columns[name] = raw[offset:stop].view(dataset.dtype).reshape(dataset.shape)
    return columns


class LogitCache:
    """A part or a merged cache, opened for reading; random access by sequence, safe to fork and to pickle.

    Opening checks the header and the small columns; reading a sequence checks its content key and its record's
    checksum. Every refusal is a ValueError of one sentence.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_h5(path, expected_format=CACHE_FORMAT, version=CACHE_VERSION) as file:
            text = read_text(file, "header")
            if xxhash.xxh3_64_intdigest(text.encode()) != int(file.attrs["header_checksum"]):
                raise ValueError(
                    f"{path}: the header does not match its checksum: the file is damaged."
                )
            entry = json.loads(text)
            columns = _map_columns(path, file)
            for name, expected in entry["checksums"].items():
                found = _checksum(columns[name])
                if found != expected:
                    raise ValueError(
                        f"{path}: column {name} has checksum {found}, expected {expected}: the file is damaged. "
                        "Delete it and run the same command again."
                    )
        self.header = CacheHeader.from_json(entry)
        self.columns = columns
        order_ids = columns["token_order"]
        self._order = TokenOrder.from_ids(order_ids) if self.header.codec.is_coded else None
        if self._order and self._order.digest() != self.header.codec.order:
            raise ValueError(
                f"{path}: the order of tokens is not the one that its header names: the file is damaged. Delete it and "
                "run the same command again."
            )
        # Of each instance its own: a function's cache would keep files open that nobody reads any more.
        self._find_lookup = lru_cache(_LOOKUPS_KEPT)(self._unpack_lookup)
        names = tuple((c, lang) for c, lang in entry["label_names"])
        of_table = {name: columns[name] for name in _TABLE_COLUMNS}
        of_table["loss_mask"] = of_table["loss_mask"].view(np.bool_)
        self.table = SequenceTable(**of_table, label_names=names)

    def __reduce__(self) -> tuple[type["LogitCache"], tuple[Path]]:
        return LogitCache, (self.path,)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return int(self.columns["record_offsets"][-1])

    @property
    def table_bytes(self) -> int:
        """Bytes of what all records need to be decoded: the codec's tables and the order of tokens."""
        return len(self.columns["tables"]) + self.columns["token_order"].nbytes

    @property
    def record_checksums(self) -> NDArray[np.uint64]:
        """One xxh3-64 per record, over its sequence's content key and its bytes, [S]."""
        return self.columns["record_checksums"]

    def read_record(self, index: int) -> bytes:
        """Return one sequence's record as stored, checked against its checksum."""
        start, stop = self.columns["record_offsets"][index : index + 2].tolist()
        record: bytes = self.columns["records"][start:stop].tobytes()
        found = _record_checksum(self.table[index].key, record)
        if found != int(self.columns["record_checksums"][index]):
            raise ValueError(
                f"{self.path}: the record of sequence {index} does not match its checksum: the file is damaged, or "
                "the record is another sequence's. Delete it and run the same command again."
            )
        return record

    def read_targets(self, index: int) -> SparseTargets:
        """Return the teacher's distributions at the counted positions of one sequence, in order."""
        row = self.table[index]
        if content_key(row.ids, row.loss_mask, row.segment_starts) != row.key:
            raise ValueError(
                f"{self.path}: sequence {index} does not hold the tokens that its content key names, so its "
                "distributions may belong to others: the file is damaged. Delete it and run the same command "
                "again."
            )
        record = self.read_record(index)
        if self._order is None:
            return decode(record, self.header.codec, num_positions=row.num_positions)
        part = int(np.searchsorted(self.columns["part_offsets"], index, side="right")) - 1
        return decode_streams(
            record,
            self.header.codec,
            self._order,
            self._find_lookup(part),
            next_ids=row.ids[1:][row.loss_mask[:-1]],
        )

    def _unpack_lookup(self, part: int) -> Lookup:
        """Return a part's tables as a decoder reads them."""
        start, stop = self.columns["table_offsets"][part : part + 2].tolist()
        num_contexts = count_contexts(len(self.header.codec.temperatures))
        packed = self.columns["tables"][start:stop].tobytes()
        return build_lookup(unpack_tables(packed, num_contexts=num_contexts))

    def verify(self) -> None:
        """Read everything once, decode it and check it."""
        for index in range(len(self)):
            self.read_targets(index)

    def verify_records(self) -> None:
        """Check every sequence's content key and every record's checksum, without decoding."""
        self.table.verify_keys(source=str(self.path))
        for index in range(len(self)):
            self.read_record(index)


def find_missing_parts(
    index: TokenIndex, folder: Path, header: CacheHeader
) -> list[tuple[int, dict[str, Any]]]:
    """Return (place, part) of the parts that have no file yet. A file that is there is whole: it was renamed."""
    return [
        (place, part)
        for place, part in enumerate(index.parts)
        if not part_path(folder, part["name"], header).exists()
    ]


def merge_parts(index: TokenIndex, folder: Path, header: CacheHeader, out: Path) -> None:
    """Copy all parts into one file, in the index's order, each checked while it is copied.

    Raises ValueError naming every part that is missing, damaged or foreign. The parts stay where they are.
    """
    paths = [part_path(folder, part["name"], header) for part in index.parts]
    parts = _open_parts(index, paths, header)
    names = sorted({n for part in parts for n in part.table.label_names} | {("", "")})

    def fill(file: h5py.File) -> None:
        checksums = {}
        for name, kind in _COLUMN_TYPES.items():
            blocks = parts[:1] if name == "token_order" else parts
            rows = sum(len(p.columns[name]) - name.endswith("offsets") for p in blocks)
            shape = (rows + name.endswith("offsets"), *parts[0].columns[name].shape[1:])
            dataset = file.create_dataset(name, shape=shape, dtype=kind)
            state = xxhash.xxh3_128()
            start = 0
            for block in _merged_blocks(blocks, name, tuple(names)):
                dataset[start : start + len(block)] = block
                if name in _CHECKED_COLUMNS:
                    state.update(np.ascontiguousarray(block).tobytes())
                start += len(block)
            assert start == len(dataset), (name, start, len(dataset))
            if name in _CHECKED_COLUMNS:
                checksums[name] = state.hexdigest()
        _write_header(file, header, names, checksums)

    num_bytes = sum(path.stat().st_size for path in paths) + (1 << 20)
    write_large_h5(
        out, fill, num_bytes=num_bytes, verify=lambda path: LogitCache(path).verify_records()
    )


def _open_parts(index: TokenIndex, paths: list[Path], header: CacheHeader) -> list[LogitCache]:
    """Open and verify every part. Raises one ValueError that names all that cannot be merged, with the reason.

    Damaged ones are put aside, so that workers find them missing and make them again.
    """
    faults, parts = [], []
    for part, path in zip(index.parts, paths, strict=True):
        try:
            if not path.exists():
                raise ValueError(f"{path} is missing (part {part['name']})")
            cache = LogitCache(path)
            cache.header.require(header, source=path)
            if name_part(cache.table) != part["name"]:
                raise ValueError(
                    f"{path} holds other sequences than part {part['name']} of the index"
                )
            cache.verify_records()
            parts.append(cache)
        except ValueError as error:
            faults.append(str(error))
            if path.exists():
                path.replace(path.with_suffix(DAMAGED))
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(paths)} parts cannot be merged. Run the same command again: the teacher makes "
            f"these parts anew, and only these (what was damaged is kept as *{DAMAGED} until then).\n  "
            + "\n  ".join(faults)
        )
    return parts


def _merged_blocks(
    parts: list[LogitCache], name: str, label_names: tuple[tuple[str, str], ...]
) -> Iterator[NDArray[Any]]:
    """Yield one column of the merged file, part by part: offsets shifted, labels renumbered."""
    shift = 0
    if name.endswith("offsets"):
        yield np.zeros(1, dtype=np.int64)
    for part in parts:
        column = part.columns[name]
        if name.endswith("offsets"):
            yield column[1:] + shift
            shift += int(column[-1])
        elif name == "labels":
            places = [label_names.index(n) for n in part.table.label_names]
            yield np.array(places, dtype=np.int32)[column]
        else:
            yield np.asarray(column)


def is_merged(path: Path, header: CacheHeader) -> bool:
    """Say whether the merged cache is there; refuses one that something else made."""
    if not path.exists():
        return False
    LogitCache(path).header.require(header, source=path)
    return True


def remove_parts(folder: Path) -> None:
    """Remove the parts of a merged cache, and the claims of the workers that made them."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.suffix in (".h5", DAMAGED, ".claim", ".tmp"):
            path.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def cache_digest(cache: LogitCache) -> str:
    """Return 64 hex digits (sha256) that name a cache's whole content, over its checksums and keys."""
    state = hashlib.sha256(json.dumps(cache.header.to_json(), sort_keys=True).encode())
    state.update(np.ascontiguousarray(cache.record_checksums).tobytes())
    state.update(np.ascontiguousarray(cache.table.keys).tobytes())
    return state.hexdigest()
