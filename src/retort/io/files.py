"""Files that are written whole or not at all, locked, and found; JSON among them."""

import difflib
import errno
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock

logger = logging.getLogger(__name__)

_PIECE_BYTES, _FLUSHED_BYTES = 1 << 17, 1 << 22


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError that names it when it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): delete it and run the same command again."
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader finds the old file or the new one, never half of one."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write bytes: a reader finds the old file or the new one."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        write_pieces(file, memoryview(content))


def write_pieces(file: BinaryIO, content: memoryview) -> None:
    """Write bytes in pieces of 128 KiB, of which every 4 MiB are sent to the disk while the next ones are written.

    A larger write asks the kernel's page cache for larger blocks of memory. Once memory is fragmented, collecting them
    takes longer than the writing: 1.1 GB in pieces of 512 KiB took 0.4 to 1.4 s, in pieces of 128 KiB 0.4 to 0.7
    (Linux 6.18, ext4), fsync included, which has little left to wait for.
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
    """Yield a temporary path to write to; it is flushed to the disk and renamed to `path` when the block ends.

    Where the block fails, nothing is left behind and `path` is as it was.
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
def held(path: Path, *, busy: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file for as long as the block; say `busy` where another process holds it longer than that.

    Raises ValueError where the file system keeps no locks.
    """
    # Not the soft lock that filelock falls back to without flock: it would outlive a killed process.
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience_s)
    except filelock.Timeout:
        logger.info(busy)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise ValueError(
            f"{path} cannot be locked: its file system keeps no locks (flock), so two jobs could write there at once. "
            "Ask for a mount with them (Lustre: -o flock), or set output.results_dir and output.cache_dir to another "
            "disk that all nodes see."
        ) from None
    try:
        yield
    finally:
        lock.release()


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that no other process on any node uses."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def remove_stale_temporaries(folder: Path, *, older_than_s: float = 3600.0) -> None:
    """Remove what killed writers left in `folder`; younger files of others than the dead of this node stay."""
    now = time.time()
    for path in folder.glob(".*.tmp"):
        node, _, process = path.name.removesuffix(".tmp").rpartition(".")
        is_dead = (
            node.endswith(f".{platform.node()}") and process.isdigit() and has_ended(int(process))
        )
        if is_dead or now - path.stat().st_mtime > older_than_s:
            path.unlink(missing_ok=True)


def has_ended(process: int) -> bool:
    """Say whether no process of this node has that number."""
    try:
        os.kill(process, 0)
    except OSError as error:  # PermissionError: it is alive, and somebody else's
        return isinstance(error, ProcessLookupError)
    return False


def is_path(name: str) -> bool:
    """Say whether a model's name can only be a path: a Hub id has one slash at most, and none of these beginnings."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def suggest_path(path: Path) -> str:
    """Return " Did you mean 'x'?" of the nearest name beside a path that does not exist, or nothing."""
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def refuse_file_in_the_way(folder: Path) -> None:
    """Raise ValueError where a file stands at `folder` or above it; nothing is made."""
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not nearest.is_dir():
        raise _not_writable(folder, f"{nearest} is a file")


def require_writable(folder: Path) -> None:
    """Make `folder` and try to write in it. Raises ValueError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, str(error.strerror)) from None


def _not_writable(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"cannot write to {str(folder.resolve())!r} ({reason}): free space or change its rights, or set "
        "output.results_dir and output.cache_dir to folders of yours."
    )
