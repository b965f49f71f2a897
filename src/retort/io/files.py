"""Atomic writing, file locks, JSON, and checks of paths."""

import difflib
import errno
import fcntl
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock

logger = logging.getLogger(__name__)

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_PIECE_BYTES, _FLUSHED_BYTES = 1 << 17, 1 << 22


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError when its content is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): delete it and rerun the same command."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ValueError when a number is NaN or infinite."""
    write_atomically(path, format_json(value))


def format_json(value: Any) -> bytes:
    """Return the content of a JSON file. Raises ValueError when a number is NaN or infinite."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode()


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that readers find the old content or the new, never a part of it."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_pieces(file, memoryview(content))


def write_once(path: Path, content: bytes) -> None:
    """Write a file unless it exists; of several writers at once, on any nodes, the first one wins.

    Raises OSError where the file system has no hard links.
    """
    temporary = temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def apply_umask(files: Iterable[Path]) -> None:
    """Let whom the umask lets read a new file read these: the library of safetensors lets their owner alone."""
    for path in files:
        probe = temporary_name(path)
        probe.touch()
        path.chmod(probe.stat().st_mode & 0o777)
        probe.unlink()


def write_pieces(file: BinaryIO, content: memoryview) -> None:
    """Write bytes in pieces of 128 KiB; every 4 MiB, start to send them to the disk while the next are written.

    For a larger write, the kernel's page cache allocates larger blocks of memory. Once memory is fragmented, finding
    them takes longer than the write: 1.1 GB in pieces of 512 KiB took 0.4 to 1.4 s, in pieces of 128 KiB 0.4 to 0.7 s
    (Linux 6.18, ext4), including fsync, which then has little left to do.
    """
    for first in range(0, len(content), _FLUSHED_BYTES):
        block, place = content[first : first + _FLUSHED_BYTES], file.tell()
        for at in range(0, len(block), _PIECE_BYTES):
            file.write(block[at : at + _PIECE_BYTES])
        if hasattr(os, "posix_fadvise"):  # not on macOS
            file.flush()
            os.posix_fadvise(file.fileno(), place, len(block), os.POSIX_FADV_DONTNEED)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, flush it to the disk and rename it to `path`.

    If the block fails, the temporary file is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, *, busy: str, notify_after_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file during the block; log `busy` if another process holds it longer than `notify_after_s`.

    Raises ValueError when the file system does not support locks.
    """
    # Not filelock's fallback for file systems without flock, a soft lock: it would outlive a killed process.
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=notify_after_s)
    except filelock.Timeout:
        logger.info(busy)
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        raise _no_flock(path) from None
    try:
        yield
    finally:
        lock.release()


def _no_flock(path: Path) -> ValueError:
    return ValueError(
        f"{path} cannot be locked: its file system does not support flock, so two jobs could write there at once. Ask "
        "for a mount that does (Lustre: -o flock; NFS: version 4, or with its lock service), or set output.results_dir "
        "and output.cache_dir to another disk that all nodes share."
    )


def temporary_name(path: Path) -> Path:
    """Return a path beside `path` that no other process on any node uses."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def remove_stale_temporaries(folder: Path, *, older_than_s: float = 3600.0) -> None:
    """Remove the temporary files of killed writers: those of this node's dead processes, and all that are old."""
    now = time.time()
    for path in folder.glob(".*.tmp"):
        node, _, process = path.name.removesuffix(".tmp").rpartition(".")
        is_dead = (
            node.endswith(f".{platform.node()}") and process.isdigit() and has_ended(int(process))
        )
        with suppress(FileNotFoundError):  # its writer has finished it meanwhile
            if is_dead or now - path.lstat().st_mtime > older_than_s:
                path.unlink()


def has_ended(process: int) -> bool:
    """Return whether no process of this node has this id."""
    try:
        os.kill(process, 0)
    except OSError as error:  # PermissionError: it is alive and another user's
        return isinstance(error, ProcessLookupError)
    return False


def is_path(name: str) -> bool:
    """Return whether a model's name must be a path: a Hub id has at most one slash, and none of these prefixes."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def suggest_path(path: Path) -> str:
    """Return " Did you mean 'x'?" with the path most like a missing one, of which one name is misspelt, or ""."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    names = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = difflib.get_close_matches(missing.name, names, n=1)
    found = [missing.parent / name / path.relative_to(missing) for name in close]
    return f" Did you mean {str(found[0])!r}?" if found and found[0].exists() else ""


def require_no_file_at(folder: Path) -> None:
    """Raise ValueError when `folder` or one of its parents is a file; create nothing."""
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not nearest.is_dir():
        raise _not_writable(folder, f"{nearest} is a file")


def require_writable(folder: Path) -> None:
    """Create `folder` and try to write and to lock a file in it. Raises ValueError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            raise _no_flock(folder) from None
        raise _not_writable(folder, str(error.strerror)) from None


def _not_writable(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"cannot write to {str(folder.resolve())!r} ({reason}): free space or change its permissions, or set "
        "output.results_dir and output.cache_dir to other folders."
    )
