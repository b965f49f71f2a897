"""The parts of a logit cache: written by workers, found missing, merged into one file.

Every file is written in one canonical order, so equal content gives equal bytes whatever happened on the way.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.cache import (
    CACHE_FORMAT,
    CACHE_VERSION,
    CHECKED_COLUMNS,
    COLUMN_TYPES,
    LARGE_COLUMNS,
    TABLE_COLUMNS,
    CacheHeader,
    LogitCache,
    checksum_column,
    checksum_record,
)
from retort.codec import SparseTargets, TokenOrder, encode
from retort.provenance import digest, replacing, write_pieces
from retort.shards import TokenIndex, name_part, write_h5, write_text
from retort.sparse_codec import encode_streams
from retort.sparse_streams import Streams
from retort.tokens import SequenceTable

DAMAGED = ".damaged"
_SLACK_BYTES = 1 << 20  # of a merged file's own layout


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
    """Write one part atomically, and read it back.

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
    columns = {name: getattr(table, name) for name in TABLE_COLUMNS}
    columns["loss_mask"] = columns["loss_mask"].astype(np.uint8)
    columns["record_offsets"] = np.cumsum([0, *map(len, records)], dtype=np.int64)
    columns["record_checksums"] = np.array(
        [checksum_record(table[i].key, record) for i, record in enumerate(records)], np.uint64
    )
    columns["records"] = np.frombuffer(b"".join(records), np.uint8)
    columns["part_offsets"] = np.array([0, len(table)], np.int64)
    checksums = b"".join(checksum_column(columns[name]) for name in LARGE_COLUMNS)
    columns["part_checksums"] = np.frombuffer(checksums, np.uint8)[None]
    columns["table_offsets"] = np.array([0, len(packed)], np.int64)
    columns["tables"] = np.frombuffer(packed, np.uint8)
    columns["token_order"] = (order.ids if order else np.empty(0)).astype(np.uint32)

    def fill(file: h5py.File) -> None:
        for name in COLUMN_TYPES:
            file.create_dataset(name, data=columns[name])
        _write_header(file, header, table.label_names, columns)

    # Whoever merges it relies on its checksums.
    write_h5(path, fill, verify=lambda written: LogitCache(written).verify())


def _write_header(
    file: h5py.File, header: CacheHeader, label_names: Any, columns: dict[str, NDArray[Any]]
) -> None:
    file.attrs["format"] = np.bytes_(CACHE_FORMAT)
    file.attrs["version"] = CACHE_VERSION
    checksums = {name: checksum_column(columns[name]).hex() for name in CHECKED_COLUMNS}
    content = header.to_json() | {"label_names": label_names, "checksums": checksums}
    text = json.dumps(content, sort_keys=True)
    write_text(file, "header", text)
    file.attrs["header_checksum"] = np.uint64(xxhash.xxh3_64_intdigest(text.encode()))


def find_missing_parts(
    index: TokenIndex, folder: Path, header: CacheHeader
) -> list[tuple[int, dict[str, Any]]]:
    """Return (place, part) of the parts that have no file yet. A file that is there is whole: it was renamed."""
    return [
        (place, part)
        for place, part in enumerate(index.parts)
        if not part_path(folder, part["name"], header).exists()
    ]


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


# ---------------------------------------------------------------------------------------------------------
# Merging


def merge_parts(
    index: TokenIndex, folder: Path, header: CacheHeader, out: Path, *, mode: str = "copy"
) -> None:
    """Make one cache of all parts, in the index's order, each verified by its checksums; the parts stay where they are.

    mode `copy`: one file that needs no other. `virtual`: one whose records lie in the parts, by paths relative to it.
    Raises ValueError naming every part that is missing, damaged or foreign, or where the disk has not enough room.
    """
    parts = _open_parts(index, [part_path(folder, p["name"], header) for p in index.parts], header)
    copied = tuple(LARGE_COLUMNS) if mode == "copy" else tuple(LARGE_COLUMNS)[:-1]
    names = sorted({n for part in parts for n in part.table.label_names} | {("", "")})
    columns = {
        name: _join_column(parts, name, names) for name in COLUMN_TYPES if name not in LARGE_COLUMNS
    }
    num_bytes = sum(part.columns[name].nbytes for part in parts for name in copied)
    _require_room(out, num_bytes + sum(c.nbytes for c in columns.values()) + _SLACK_BYTES)
    with replacing(out) as temporary:
        with h5py.File(temporary, "w", libver="earliest") as file:
            offsets = {}
            for name, kind in COLUMN_TYPES.items():
                if name in columns:
                    file.create_dataset(name, data=columns[name])
                elif name in copied:
                    size = sum(len(part.columns[name]) for part in parts)
                    offsets[name] = _reserve(file, name, size=size, kind=kind)
                else:
                    _refer_to_records(file, name, parts, beside=out.parent)
            _write_header(file, header, names, columns)
        with temporary.open("r+b") as target:
            for name, offset in offsets.items():
                _copy_column(parts, name, target, offset=offset)


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
            cache.verify_parts()
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


def _require_room(path: Path, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise ValueError(
            f"{path} takes {num_bytes / 1e6:,.1f} MB, but its disk has only {free / 1e6:,.1f} MB free: free space and "
            "run the same command again; nothing is lost."
        )


def _join_column(
    parts: list[LogitCache], name: str, label_names: list[tuple[str, str]]
) -> NDArray[Any]:
    """Return one column of the merged file: offsets shifted, labels renumbered, the order of tokens once."""
    if name == "token_order":
        return parts[0].columns[name]
    return np.concatenate(list(_shift_blocks(parts, name, label_names)))


def _shift_blocks(
    parts: list[LogitCache], name: str, label_names: list[tuple[str, str]]
) -> Iterator[NDArray[Any]]:
    shift = 0
    if name.endswith("offsets"):
        yield np.zeros(1, np.int64)
    for part in parts:
        column = part.columns[name]
        if name.endswith("offsets"):
            yield column[1:] + shift
            shift += int(column[-1])
        elif name == "labels":
            places = [label_names.index(n) for n in part.table.label_names]
            yield np.array(places, np.int32)[column]
        else:
            yield column


def _reserve(file: h5py.File, name: str, *, size: int, kind: str) -> int:
    """Create a column without writing it; return the byte of the file at which it lies."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)  # equal content, equal bytes
    space, of_kind = h5py.h5s.create_simple((size,)), h5py.h5t.py_create(np.dtype(kind))
    dataset = h5py.h5d.create(file.id, name.encode(), of_kind, space, dcpl=layout)
    return int(dataset.get_offset() or 0)  # None where there are no rows


def _refer_to_records(file: h5py.File, name: str, parts: list[LogitCache], *, beside: Path) -> None:
    """Create the column of records, whose bytes lie in the parts."""
    places = [
        (os.path.relpath(part.path, beside), part.records_at, part.record_bytes) for part in parts
    ]
    size = sum(length for _, _, length in places)
    file.create_dataset(name, shape=(size,), dtype=COLUMN_TYPES[name], external=places)


def _copy_column(parts: list[LogitCache], name: str, target: BinaryIO, *, offset: int) -> None:
    """Copy a column's bytes out of all parts."""
    for part in parts:
        target.seek(offset)
        write_pieces(target, part.columns[name].view(np.uint8).data)
        offset += part.columns[name].nbytes
