"""Digests of values, files and folders: equal content gives an equal name on every machine."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from retort.io.files import read_json, write_json

_BLOCK_BYTES = 1 << 20


# Corpora and weights are hashed whole (an edit may touch one byte, or one layer); above this size the digest is
# remembered by the file's size and times, so that only the first look pays. The change time is among them: it cannot
# be set back.
_MEMO_BYTES = 16 << 20


def digest(value: Any) -> str:
    """Return 12 hex digits that name a JSON-like value; equal values give equal names on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_file(path: Path, *, memo: Path | None = None) -> str:
    """Return 32 hex digits (xxh3-128) of a file's bytes.

    `memo` names a JSON file in which digests of large files are remembered by size and times. It only saves time:
    one that cannot be read or written is done without.
    """
    status = path.stat()
    if memo is None or status.st_size < _MEMO_BYTES:
        return hash_file(path)
    key = str(path.resolve())
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = read_json(memo)
    if known.get(key, [])[:-1] != stamp:
        known[key] = [*stamp, hash_file(path)]
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, known)
    return str(known[key][-1])


def stamp_files(paths: Iterable[Path]) -> str:
    """Return a digest of the files' names, sizes and times: another one says that something was written meanwhile.

    The change time is among them: no program can set it back.
    """
    states = [(path, path.stat()) for path in paths]
    return digest([[str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in states])


def digest_folder(folder: Path) -> dict[str, str]:
    """Return the digest of every file in a folder, by its name within."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def compare_digests(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what differs, in words; nothing for equal digests. Files that nobody recorded do not count."""
    return [
        f"{name} is {'missing' if name not in found else 'not what was written'}"
        for name in recorded
        if recorded[name] != found.get(name)
    ]


def hash_file(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()
