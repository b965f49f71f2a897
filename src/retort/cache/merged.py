"""One cache out of all parts, in the order of the index, checked by their checksums; damaged parts are named."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from retort.cache.parts import DAMAGED, part_path, write_header
from retort.cache.reader import (
    COLUMN_TYPES,
    LARGE_COLUMNS,
    CacheHeader,
    LogitCache,
)
from retort.io.files import replacing, write_pieces
from retort.io.hdf5 import reserve
from retort.tokens.index import TokenIndex, name_part

_SLACK_BYTES = 1 << 20  # of a merged file's own layout


@dataclass(frozen=True)
class _Part:
    """What merging knows of a part after closing it: files may be more than a process can hold open.

    columns: the small ones; places: where the large ones lie in the file, (first byte, number of bytes).
    """

    path: Path
    columns: dict[str, NDArray[Any]]
    label_names: tuple[tuple[str, str], ...]
    places: dict[str, tuple[int, int]]
    halved_parts: int


def merge_parts(
    index: TokenIndex, folder: Path, header: CacheHeader, out: Path, *, mode: str = "copy"
) -> None:
    """Make one cache of all parts, in the index's order, and verify it by their checksums; the parts stay there.

    mode `copy`: one file that needs no other. `virtual`: one whose records lie in the parts, by paths relative to it.
    Raises ValueError naming every part that is missing, damaged or foreign, or where the disk has not enough room.
    """
    parts = _read_parts(index, [part_path(folder, p["name"], header) for p in index.parts], header)
    copied = tuple(LARGE_COLUMNS) if mode == "copy" else tuple(LARGE_COLUMNS)[:-1]
    names = sorted({n for part in parts for n in part.label_names} | {("", "")})
    columns = {
        name: _join_column(parts, name, names) for name in COLUMN_TYPES if name not in LARGE_COLUMNS
    }
    num_bytes = sum(part.places[name][1] for part in parts for name in copied)
    _require_room(out, num_bytes + sum(c.nbytes for c in columns.values()) + _SLACK_BYTES)
    with replacing(out) as temporary:
        with h5py.File(temporary, "w", libver="earliest") as file:
            offsets = {}
            for name, kind in COLUMN_TYPES.items():
                if name in columns:
                    file.create_dataset(name, data=columns[name])
                elif name in copied:
                    num_rows = sum(p.places[name][1] for p in parts) // np.dtype(kind).itemsize
                    offsets[name] = reserve(file, name, shape=(num_rows,), dtype=kind)
                else:
                    _refer_to_records(file, name, parts, beside=out.parent)
            halved = sum(part.halved_parts for part in parts)
            write_header(file, header, names, columns, halved_parts=halved)
        with temporary.open("r+b") as target:
            for part in parts:
                _copy_part(part, target, offsets)
        # The merged file, and not the parts before: so what went wrong on the way is found too, for the same price.
        _refuse_damaged(LogitCache(temporary), [part.path for part in parts])


def _read_parts(index: TokenIndex, paths: list[Path], header: CacheHeader) -> list[_Part]:
    """Read every part's small columns. Raises one ValueError that names all that cannot be merged, with the reason."""
    parts, faults = [], {}
    for entry, path in zip(index.parts, paths, strict=True):
        try:
            parts.append(_read_part(entry["name"], path, header))
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
    return _Part(path, small, cache.table.label_names, cache.places, cache.halved_parts)


def _find_fault(path: Path) -> str | None:
    """Return what is wrong with a part's bytes, in words."""
    try:
        LogitCache(path).verify_parts()
    except ValueError as error:
        return str(error)
    return None


def _refuse_damaged(merged: LogitCache, paths: list[Path]) -> None:
    """Raise ValueError that names every part whose rows in the merged file are not what its checksum says."""
    faults, whole = {}, []
    for part, path in enumerate(paths):
        try:
            merged.verify_part(part)
        except ValueError:
            fault = _find_fault(path)
            if fault is None:
                whole.append(path)
            faults[path] = (
                fault or f"{path} is whole, but its copy is not: memory or disk is at fault"
            )
    _refuse(faults, num_parts=len(paths), whole=whole)


def _refuse(faults: dict[Path, str], *, num_parts: int, whole: Sequence[Path] = ()) -> None:
    """Raise the one error of a merge, where there are faults; parts not `whole` are put aside, to be made again."""
    for path in faults:
        if path.exists() and path not in whole:
            path.replace(path.with_suffix(DAMAGED))
    if faults:
        raise ValueError(
            f"{len(faults)} of {num_parts} parts cannot be merged. Run the same command again: the teacher makes "
            f"anew what is missing of these, and only that (damaged parts are kept as *{DAMAGED} until then).\n  "
            + "\n  ".join(faults[path] for path in sorted(faults))
        )


def _require_room(path: Path, num_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise ValueError(
            f"{path} takes {num_bytes / 1e6:,.1f} MB, but its disk has only {free / 1e6:,.1f} MB free: free space and "
            "run the same command again; nothing is lost."
        )


def _join_column(parts: list[_Part], name: str, label_names: list[tuple[str, str]]) -> NDArray[Any]:
    """Return one column of the merged file: offsets shifted, labels renumbered, the order of tokens once."""
    if name == "token_order":
        return parts[0].columns[name]
    return np.concatenate(list(_shift_blocks(parts, name, label_names)))


def _shift_blocks(
    parts: list[_Part], name: str, label_names: list[tuple[str, str]]
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
            places = [label_names.index(n) for n in part.label_names]
            yield np.array(places, np.int32)[column]
        else:
            yield column


def _refer_to_records(file: h5py.File, name: str, parts: list[_Part], *, beside: Path) -> None:
    """Create the column of records, whose bytes lie in the parts."""
    folder = beside.resolve()
    places = [(os.path.relpath(p.path.resolve(), folder), *p.places[name]) for p in parts]
    size = sum(length for _, _, length in places)
    file.create_dataset(name, shape=(size,), dtype=COLUMN_TYPES[name], external=places)


def _copy_part(part: _Part, target: BinaryIO, offsets: dict[str, int]) -> None:
    """Copy a part's large columns to `offsets`, which move on to where the next part's go."""
    raw = np.memmap(part.path, np.uint8, mode="r")
    for name in offsets:
        first, size = part.places[name]
        target.seek(offsets[name])
        write_pieces(target, raw[first : first + size].data)
        offsets[name] += size
