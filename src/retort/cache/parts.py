"""The parts of a logit cache: written by workers, found missing, merged into one file.

Every file is written in one canonical order, so equal content gives equal bytes whatever happened on the way.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.cache.codec import Codec, SparseTargets, TokenOrder, build_codec, encode
from retort.cache.reader import (
    CACHE_FORMAT,
    CACHE_VERSION,
    CHECKED_COLUMNS,
    COLUMN_TYPES,
    LARGE_COLUMNS,
    CacheHeader,
    LogitCache,
    checksum_column,
    checksum_record,
)
from retort.cache.sparse_codec import encode_streams
from retort.cache.sparse_streams import Streams
from retort.config.sections import Cache
from retort.io.files import digest, replacing, write_pieces
from retort.io.hdf5 import reserve, write_h5, write_text
from retort.tokens.index import TokenIndex, name_part
from retort.tokens.sequences import TABLE_COLUMNS, SequenceTable

DAMAGED = ".damaged"
_SLACK_BYTES = 1 << 20  # of a merged file's own layout


def find_order(index: TokenIndex, codec: Codec) -> TokenOrder | None:
    """Return the order of tokens that a codec writes their ids in; None where it writes them as they are."""
    if not codec.is_coded:
        return None
    order = TokenOrder.from_counts(index.read_token_counts(), vocabulary=codec.vocabulary)
    assert order.digest() == codec.order, (order.digest(), codec.order)
    return order


def build_header(
    index: TokenIndex, record: dict[str, Any], cache: Cache, *, source: Path
) -> CacheHeader:
    """Return the header of a cache; refuses tokens that another tokenizer made than the teacher's.

    Raises ValueError when the tokenizer has ids beyond the teacher's output layer, or is another one.
    """
    tokenizer = index.content["tokenizer"]
    if tokenizer["size"] > record["vocabulary"]:
        raise ValueError(
            f"the tokenizer has {tokenizer['size']} tokens, but the teacher's output layer has only "
            f"{record['vocabulary']} ({source}): they do not belong together. Leave dataset.tokenizer out to use "
            "the teacher's own."
        )
    if tokenizer["fingerprint"] != record["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"the tokens were made by tokenizer {tokenizer['fingerprint']} ({index.path}), the teacher's is "
            f"{record['tokenizer']['fingerprint']} ({source}): its distributions would belong to other tokens. "
            "Leave dataset.tokenizer out, or delete the tokens' folder if the teacher's tokenizer was changed."
        )
    counts = index.read_token_counts()
    codec = build_codec(cache, vocabulary=record["vocabulary"], token_counts=counts)
    return CacheHeader(record["weights"], tokenizer["fingerprint"], index.content["content"], codec)


def part_path(folder: Path, part_name: str, header: CacheHeader) -> Path:
    """Return where the part of that name lies: the file name says what is in it and what made it."""
    return folder / f"{digest([part_name, header.to_json(), CACHE_VERSION])}.h5"


def write_part(
    path: Path,
    table: SequenceTable,
    targets: SparseTargets | Sequence[Streams],
    header: CacheHeader,
    order: TokenOrder | None = None,
    *,
    halved: bool = False,
) -> None:
    """Write one part atomically, and read it back.

    halved: memory ran out, so it was scored in smaller batches than others would, and rounds otherwise.
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
        _write_header(file, header, table.label_names, columns, halved_parts=int(halved))

    # Whoever merges it relies on its checksums.
    write_h5(path, fill, verify=lambda written: LogitCache(written).verify())


def _write_header(
    file: h5py.File,
    header: CacheHeader,
    label_names: Any,
    columns: dict[str, NDArray[Any]],
    *,
    halved_parts: int,
) -> None:
    file.attrs["format"] = np.bytes_(CACHE_FORMAT)
    file.attrs["version"] = CACHE_VERSION
    checksums = {name: checksum_column(columns[name]).hex() for name in CHECKED_COLUMNS}
    content = header.to_json() | {
        "label_names": label_names,
        "checksums": checksums,
        "halved_parts": halved_parts,
    }
    text = json.dumps(content, sort_keys=True)
    write_text(file, "header", text)
    file.attrs["header_checksum"] = np.uint64(xxhash.xxh3_64_intdigest(text.encode()))


@cache
def _name_files(part_names: tuple[str, ...], header: CacheHeader) -> list[str]:
    return [part_path(Path(), name, header).name for name in part_names]


def part_files(index: TokenIndex, folder: Path, header: CacheHeader) -> list[Path]:
    """Return where every part of the index lies, in the index's order."""
    names = _name_files(tuple(part["name"] for part in index.parts), header)
    return [folder / name for name in names]


def find_missing_parts(
    index: TokenIndex, folder: Path, header: CacheHeader
) -> list[tuple[int, dict[str, Any]]]:
    """Return (place, part) of the parts that have no file yet. A file that is there is whole: it was renamed.

    Workers ask after every part. Of 10,000 parts: 10 ms; 250 ms with a question to the disk for each.
    """
    there = set[str]()
    with suppress(FileNotFoundError):  # merged and removed meanwhile
        there = {path.name for path in os.scandir(folder)}
    names = _name_files(tuple(part["name"] for part in index.parts), header)
    return [
        (place, part)
        for place, (part, name) in enumerate(zip(index.parts, names, strict=True))
        if name not in there
    ]


def is_merged(path: Path, header: CacheHeader) -> bool:
    """Say whether the merged cache is there; refuses one that something else made."""
    if not path.exists():
        return False
    LogitCache(path).header.require(header, source=path)
    return True


def discard_merged(path: Path, merged: Path, header: CacheHeader) -> None:
    """Remove a part that was written after all were merged and removed; a virtual cache keeps its own."""
    if is_merged(merged, header) and not LogitCache(merged).is_virtual:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # others write here too
            path.parent.rmdir()


def remove_parts(folder: Path) -> None:
    """Remove the parts of a merged cache, and the claims of the workers that made them."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.suffix in (".h5", DAMAGED, ".claim", ".tmp"):
            path.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


# ---------------------------------------------------------------------------------------------------------
# Merging


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
            _write_header(file, header, names, columns, halved_parts=halved)
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
