"""Digests of values, files and folders: equal content gives an equal name on every machine."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from retort.io.files import read_json, write_json

# Corpora and weights are hashed whole, because an edit may touch one byte, or one layer. Digests of larger files than
# this are cached by the file's size and times. These include the change time, which no program can set back.
_MEMO_BYTES = 16 << 20


def digest(value: Any) -> str:
    """Return 12 hex digits of the SHA-256 of a JSON-like value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_file(path: Path, *, memos: Iterable[Path] = ()) -> str:
    """Return the digest of a file's bytes, as `hash_file` does.

    `memos` are JSON files that cache the digests of large files by size and times: what one of them knows is written to
    the others. One that cannot be read or written is not used.
    """
    status = path.stat()
    if status.st_size < _MEMO_BYTES:
        return hash_file(path)
    key = str(path.resolve())
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    contents = {memo: _read_memo(memo) for memo in memos}
    entries = (content.get(key, []) for content in contents.values())
    found = next((entry for entry in entries if entry[:-1] == state), None)
    found = found or [*state, hash_file(path)]
    for memo, content in contents.items():
        if content.get(key) != found:
            with contextlib.suppress(OSError):
                memo.parent.mkdir(parents=True, exist_ok=True)
                write_json(memo, content | {key: found})
    return str(found[-1])


def _read_memo(memo: Path) -> dict[str, list[Any]]:
    with contextlib.suppress(OSError, ValueError):
        return dict(read_json(memo))
    return {}


def digest_file_states(paths: Iterable[Path]) -> str:
    """Return the digest (12 hex digits) of the files' names, sizes and times, which changes when one is written."""
    states = [(path, path.stat()) for path in paths]
    return digest([[str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in states])


def digest_folder(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def compare_digests(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return a phrase for each recorded file that is missing or differs; other files are ignored."""
    return [
        f"{name} is {'missing' if name not in found else 'not what was written'}"
        for name in recorded
        if recorded[name] != found.get(name)
    ]


def hash_file(path: Path) -> str:
    """Return 32 hex digits (xxh3-128) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
