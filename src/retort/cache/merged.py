"""Merge all parts into one cache, in the order of the index; damaged and missing parts are all named in one error."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from retort.cache.kinds import PartKind, count_kinds, refuse_unlike
from retort.cache.parts import DAMAGED_SUFFIX, part_path, write_header
from retort.cache.reader import (
    COLUMN_TYPES,
    LARGE_COLUMNS,
    CacheHeader,
    LogitCache,
)
from retort.cache.stored import StoredRecords
from retort.io.files import replacing, write_pieces
from retort.io.hdf5 import reserve
from retort.io.objects import list_sizes
from retort.tokens.index import TokenIndex, name_part
from retort.tokens.sequences import Labels, join_columns, merge_names

_OVERHEAD_BYTES = 1 << 20  # of HDF5's own structures
MOST_VIRTUAL_PARTS = 2700  # HDF5 lists other files in one message of 64 KiB, 24 bytes each


@dataclass(frozen=True)
class _Part:
    """A part that was read and closed again: there may be more parts than a process can hold open.

    columns: the small ones; byte_ranges: of the large ones in the file (first byte, number of bytes).
    """

    path: Path
    columns: dict[str, NDArray[Any]]
    label_names: Labels
    byte_ranges: dict[str, tuple[int, int]]
    halved_parts: int
    kind: PartKind | None
    stored: tuple[StoredRecords, ...]


def merge_parts(
    index: TokenIndex,
    folder: Path,
    header: CacheHeader,
    out: Path,
    *,
    mode: str = "copy",
    accept_unlike: bool = False,
) -> Counter[PartKind | None]:
    """Merge all parts, in the index's order, into `out`, and verify it by the parts' checksums; the parts are kept.

    mode `copy`: one self-contained file. `virtual`: a file that refers to the records in the parts by relative paths.
    Where the parts are in a store (`header.store`), they are receipts, and the file refers to the objects; records are
    not read. Returns the number of parts of each kind. Raises UnlikePartsError, unless `accept_unlike`, when there are
    several. Raises ValueError naming every part that is missing, damaged or foreign, or when the disk has too little
    space.
    """
    parts = _read_parts(index, [part_path(folder, p.name, header) for p in index.parts], header)
    if header.store:
        _refuse_missing_objects(parts)
    if not accept_unlike:
        refuse_unlike([part.path for part in parts], [part.kind for part in parts])
    is_copied = (
        mode == "copy" or header.store
    )  # of receipts, which have no records, the empty column
    copied = tuple(LARGE_COLUMNS) if is_copied else tuple(LARGE_COLUMNS)[:-1]
    label_names = [part.label_names for part in parts]
    names = merge_names(label_names)
    columns = {
        name: join_columns(name, [part.columns[name] for part in parts], label_names, names)
        for name in COLUMN_TYPES
        if name not in (*LARGE_COLUMNS, "token_order")
    }
    columns["token_order"] = parts[0].columns["token_order"]  # the same in all parts
    num_bytes = sum(part.byte_ranges[name][1] for part in parts for name in copied)
    _require_free_space(out, num_bytes + sum(c.nbytes for c in columns.values()) + _OVERHEAD_BYTES)
    with replacing(out) as temporary:
        with h5py.File(temporary, "w", libver="earliest") as file:
            offsets = {}
            for name, kind in COLUMN_TYPES.items():
                if name in columns:
                    file.create_dataset(name, data=columns[name])
                elif name in copied:
                    num_rows = sum(p.byte_ranges[name][1] for p in parts) // np.dtype(kind).itemsize
                    offsets[name] = reserve(file, name, shape=(num_rows,), dtype=kind)
                else:
                    _refer_to_records(file, name, parts, beside=out.parent)
            own: dict[str, Any] = {"halved_parts": sum(part.halved_parts for part in parts)}
            if header.store:
                own["objects"] = [part.stored[0] for part in parts]
            write_header(file, header, names, columns, own)
        with temporary.open("r+b") as target:
            for part in parts:
                _copy_part(part, target, offsets)
        # Checking the merged file instead of the parts finds errors of copying too, at the same cost.
        _refuse_damaged(LogitCache(temporary), [part.path for part in parts])
    return count_kinds(part.kind for part in parts)


def _read_parts(index: TokenIndex, paths: list[Path], header: CacheHeader) -> list[_Part]:
    """Read every part's small columns. Raises one ValueError that names all parts that cannot be merged, and why."""
    parts, faults = [], {}
    for entry, path in zip(index.parts, paths, strict=True):
        try:
            parts.append(_read_part(entry.name, path, header))
        except ValueError as error:
            faults[path] = str(error)
    for part in parts if faults else []:
        if fault := _find_fault(part.path):
            faults[part.path] = fault
    _refuse(faults, num_parts=len(paths))
    return parts


def _read_part(name: str, path: Path, header: CacheHeader) -> _Part:
    if not path.exists():
        raise ValueError(f"{path} is missing (part {name})")
    cache = LogitCache(path)
    cache.header.require(header, source=path)
    if name_part(cache.table) != name:
        raise ValueError(f"{path} holds other sequences than part {name} of the index")
    small = {
        column: np.array(values)
        for column, values in cache.columns.items()
        if column not in LARGE_COLUMNS
    }
    names = cache.table.label_names
    return _Part(
        path, small, names, cache.byte_ranges, cache.halved_parts, cache.kind, cache.stored
    )


def _refuse_missing_objects(parts: list[_Part]) -> None:
    """Raise ValueError that names every part whose object is not in the store, or is shorter than its records end."""
    places = {part.path: part.stored[0] for part in parts}
    folders = {place.url.rpartition("/")[0] for place in places.values()}
    sizes = {f"{folder}/{name}": n for folder in folders for name, n in list_sizes(folder).items()}
    faults = {
        path: f"{place.url} is missing, or was cut short ({path} is its receipt)"
        for path, place in places.items()
        if sizes.get(place.url, -1) < place.offset + place.size
    }
    _refuse(faults, num_parts=len(parts))


def _find_fault(path: Path) -> str | None:
    """Return the error message of a part whose bytes are damaged, else None."""
    try:
        LogitCache(path).verify_parts()
    except ValueError as error:
        return str(error)
    return None


def _refuse_damaged(merged: LogitCache, paths: list[Path]) -> None:
    """Raise ValueError that names every part whose rows in the merged file do not match its checksum."""
    faults, intact = {}, []
    for part, path in enumerate(paths):
        try:
            merged.verify_part(part)
        except ValueError:
            fault = _find_fault(path)
            if fault is None:
                intact.append(path)
            faults[path] = fault or f"{path} is intact, but its copy is not: memory or disk failed"
    _refuse(faults, num_parts=len(paths), intact=intact)


def _refuse(faults: dict[Path, str], *, num_parts: int, intact: Sequence[Path] = ()) -> None:
    """Raise one ValueError if there are faults; parts that are not `intact` are renamed, to be made again."""
    for path in faults:
        if path.exists() and path not in intact:
            path.replace(path.with_suffix(DAMAGED_SUFFIX))
    if faults:
        raise ValueError(
            f"{len(faults)} of {num_parts} parts cannot be merged. Rerun the same command: it regenerates only the "
            f"missing parts (damaged ones are kept as *{DAMAGED_SUFFIX} until then).\n  "
            + "\n  ".join(faults[path] for path in sorted(faults))
        )


def _require_free_space(path: Path, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise ValueError(
            f"{path} takes {num_bytes / 1e6:,.1f} MB, but its disk has only {free / 1e6:,.1f} MB free: free space and "
            "rerun the same command; nothing is lost."
        )


def require_few_parts(num_parts: int) -> None:
    """Raise ValueError when a virtual cache cannot name so many parts."""
    if num_parts > MOST_VIRTUAL_PARTS:
        raise ValueError(
            f"merge.mode is virtual, but the cache will have {num_parts:,} parts, and HDF5 has room for the names of "
            f"{MOST_VIRTUAL_PARTS:,}. Set merge.mode: copy, or a larger dataset.streaming_chunk_size."
        )


def _refer_to_records(file: h5py.File, name: str, parts: list[_Part], *, beside: Path) -> None:
    """Create the column of records, whose bytes are stored in the parts; paths are relative to `beside`."""
    folder = beside.resolve()
    stored = [(os.path.relpath(p.path.resolve(), folder), *p.byte_ranges[name]) for p in parts]
    size = sum(length for _, _, length in stored)
    file.create_dataset(name, shape=(size,), dtype=COLUMN_TYPES[name], external=stored)


def _copy_part(part: _Part, target: BinaryIO, offsets: dict[str, int]) -> None:
    """Copy a part's large columns to `offsets` (by column, in bytes), and advance these for the next part."""
    raw = np.memmap(part.path, np.uint8, mode="r")
    for name in offsets:
        first, size = part.byte_ranges[name]
        target.seek(offsets[name])
        write_pieces(target, raw[first : first + size].data)
        offsets[name] += size
