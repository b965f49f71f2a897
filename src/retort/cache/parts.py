"""The parts of a logit cache: named, written by workers, listed where missing, removed after merging.

Every file is written in one canonical order, so equal content gives equal bytes.
"""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.cache.codec import NO_ORDER, TokenOrder
from retort.cache.kinds import PartKind, is_list
from retort.cache.methods import build_codec
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
    read_kind,
)
from retort.cache.stored import name_object
from retort.config.sections import Cache
from retort.io.digests import digest
from retort.io.files import temporary_name
from retort.io.fingerprints import TeacherRecord
from retort.io.hdf5 import write_h5, write_text
from retort.io.objects import download, upload
from retort.tokens.index import Part, TokenIndex
from retort.tokens.sequences import TABLE_COLUMNS, SequenceTable

DAMAGED_SUFFIX = ".damaged"
RECEIPT_SUFFIX = ".stored.h5"  # of a part in a store; the same part, whole, has another name and is not taken for it


def build_header(
    index: TokenIndex, record: TeacherRecord, cache: Cache, *, source: Path
) -> CacheHeader:
    """Return the header of a cache; `record`: the teacher's fingerprint.json, read from `source`.

    Raises ValueError when the tokens' tokenizer is not the teacher's, or has ids beyond the teacher's output layer.
    """
    tokenizer = index.record.tokenizer
    if tokenizer.size > record.vocabulary:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, but the teacher's output layer has only "
            f"{record.vocabulary} ({source}): they do not fit together. Leave dataset.tokenizer out to use the "
            "teacher's own."
        )
    if tokenizer.fingerprint != record.tokenizer.fingerprint:
        raise ValueError(
            f"the tokens were made by tokenizer {tokenizer.fingerprint} ({index.path}), the teacher's is "
            f"{record.tokenizer.fingerprint} ({source}): its distributions would belong to other tokens. "
            "Leave dataset.tokenizer out, or delete the tokens' folder if the teacher's tokenizer has changed."
        )
    counts = index.read_token_counts()
    codec = build_codec(cache, vocabulary=record.vocabulary, token_counts=counts)
    return CacheHeader(record.weights, tokenizer.fingerprint, index.record.content, codec)


def part_path(folder: Path, part_name: str, header: CacheHeader) -> Path:
    """Return the path of a part, whose file name is a digest of its content's name and of what it was made from.

    Of a part in a store it is the path of its receipt.
    """
    content: list[Any] = [part_name, header.to_json(), CACHE_VERSION]
    if header.batch_tokens is not None:  # other batches round differently
        content.append({"batch_tokens": header.batch_tokens})
    suffix = RECEIPT_SUFFIX if header.store else ".h5"
    return folder / f"{digest(content)}{suffix}"


def write_part(
    path: Path,
    table: SequenceTable,
    sequences: Sequence[Any],
    header: CacheHeader,
    order: TokenOrder = NO_ORDER,
    *,
    halved: bool = False,
    kind: PartKind | None = None,
    pool: Executor | None = None,
) -> None:
    """Write one part atomically, and verify what was written.

    sequences: what `header.codec.prepare` made, with `order`, of each sequence of the table. halved: memory ran out, so
    it was scored in smaller batches, which round differently. kind: what computed it, None if it is not known. pool:
    threads that code and verify; any number makes the same bytes. Raises ValueError when what was written is damaged.
    """
    assert len(sequences) == len(table), (len(sequences), len(table))
    records, packed = header.codec.encode(sequences, pool)
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
    columns["token_order"] = order.ids.astype(np.uint32)

    def fill(file: h5py.File) -> None:
        for name in COLUMN_TYPES:
            file.create_dataset(name, data=columns[name])
        own = {"halved_parts": int(halved)} | ({"made_by": kind.to_json()} if kind else {})
        write_header(file, header, table.label_names, columns, own)

    # Verified here, since merging relies on its checksums.
    write_h5(path, fill, verify=lambda written: LogitCache(written).verify(pool))


def store_part(written: Path, receipt: Path, store: str) -> None:
    """Store a part that was written here in the folder `store`, then write its receipt.

    Raises ValueError when the part is damaged, or the store does not take it.
    """
    url = f"{store}/{name_object(receipt, written)}"
    upload(written, url)
    write_receipt(receipt, written, url)


def write_receipt(receipt: Path, written: Path, url: str) -> None:
    """Write the receipt of a part, a copy of which is here, atomically. Raises ValueError when the part is damaged."""
    part = LogitCache(written)
    part.verify_parts()
    columns = part.columns | {"records": np.empty(0, np.uint8)}
    own: dict[str, Any] = {"halved_parts": part.halved_parts}
    own |= {"made_by": part.kind.to_json()} if part.kind else {}
    own |= {"objects": [[url, *part.byte_ranges["records"]]]}

    def fill(file: h5py.File) -> None:
        for name in COLUMN_TYPES:
            file.create_dataset(name, data=columns[name])
        write_header(file, part.header, part.table.label_names, columns, own)

    write_h5(receipt, fill)


def adopt_part(
    receipt: Path, store: str, names: Iterable[str], *, like: Sequence[PartKind | None]
) -> bool:
    """Write the receipt of a part that is in the store already, among objects of these names; say whether it is.

    It was stored before a kill, or from another folder of results. An object is read once, and compared with the
    checksum in its name. like: kinds of parts, of one of which it must be; any will do where there are none.
    """
    stem = receipt.name.removesuffix(RECEIPT_SUFFIX)
    copy = temporary_name(receipt.with_suffix(".copy"))
    copy.parent.mkdir(parents=True, exist_ok=True)
    for name in sorted(name for name in names if name.startswith(f"{stem}-")):
        try:
            download(f"{store}/{name}", copy)
            is_same = name_object(receipt, copy) == name
            if is_same and (not like or read_kind(copy) in like):
                write_receipt(receipt, copy, f"{store}/{name}")
                return True
        finally:
            copy.unlink(missing_ok=True)
    return False


def write_header(
    file: h5py.File,
    header: CacheHeader,
    label_names: Any,
    columns: dict[str, NDArray[Any]],
    own: dict[str, Any],
) -> None:
    """Write a file's header and attributes; `columns`: at least those of CHECKED_COLUMNS, `own`: of this file alone."""
    file.attrs["format"] = np.bytes_(CACHE_FORMAT)
    file.attrs["version"] = CACHE_VERSION
    checksums = {name: checksum_column(columns[name]).hex() for name in CHECKED_COLUMNS}
    content = header.to_json() | {
        "label_names": label_names,
        "checksums": checksums,
        **own,
    }
    text = json.dumps(content, sort_keys=True)
    write_text(file, "header", text)
    file.attrs["header_checksum"] = np.uint64(xxhash.xxh3_64_intdigest(text.encode()))


@cache
def _name_files(part_names: tuple[str, ...], header: CacheHeader) -> list[str]:
    return [part_path(Path(), name, header).name for name in part_names]


def part_files(index: TokenIndex, folder: Path, header: CacheHeader) -> list[Path]:
    """Return the path of every part of the index, in the index's order."""
    names = _name_files(tuple(part.name for part in index.parts), header)
    return [folder / name for name in names]


def _list_names(folder: Path) -> set[str]:
    """Return the names of a folder's files: none if it is not made yet, or already merged and removed."""
    with suppress(FileNotFoundError):
        return {path.name for path in os.scandir(folder)}
    return set()


def find_missing_parts(
    index: TokenIndex, folder: Path, header: CacheHeader
) -> list[tuple[int, Part]]:
    """Return (index, part) of every part that has no file yet. A file that exists is complete: it was renamed.

    Workers call this after every part. It takes 10 ms for 10,000 parts; 250 ms with a system call for each.
    """
    existing = _list_names(folder)
    names = _name_files(tuple(part.name for part in index.parts), header)
    return [
        (i, part)
        for i, (part, name) in enumerate(zip(index.parts, names, strict=True))
        if name not in existing
    ]


def read_kinds(paths: Sequence[Path], *, most: int) -> dict[Path, PartKind | None]:
    """Return the kinds of parts that exist and can be read: of all, or of about `most` that are evenly spaced."""
    existing = _list_names(paths[0].parent)
    found = [path for path in paths if path.name in existing]
    kinds = {}
    for path in found[:: max(1, len(found) // most)]:
        with suppress(ValueError):  # damaged, as the merge will say; or merged and removed
            kinds[path] = read_kind(path)
    return kinds


def is_merged(path: Path, header: CacheHeader) -> bool:
    """Say whether the merged cache exists. Raises ValueError when it is damaged or has another header."""
    if not path.exists():
        return False
    LogitCache(path).header.require(header, source=path)
    return True


def discard_if_merged(path: Path, merged: Path, header: CacheHeader) -> None:
    """Remove a part that was written after all parts were merged and removed; a virtual cache needs its parts."""
    if is_merged(merged, header) and not LogitCache(merged).needs_parts:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: other workers write here too
            path.parent.rmdir()


def remove_parts(folder: Path) -> None:
    """Remove the parts of a merged cache, their claims and temporary files; the folder too, if it is then empty."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.suffix in (".h5", DAMAGED_SUFFIX, ".claim", ".tmp") or is_list(path):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()
