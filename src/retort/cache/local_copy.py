"""A copy of a cache on a disk of this node, or in its memory, which all jobs of the node share.

The copy is believed only once it is complete: it is written under a temporary name, checked by the cache's checksums
and renamed, and a job that finds it checks it again. Each job that reads it holds a lock (flock), which the kernel
releases when the job dies; the last one removes the copy. What a kill leaves is used, or removed, by the next job.
Of a cache in a store, blocks of its records are kept, as they are read (`stored`).
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retort.cache.reader import LogitCache, cache_digest
from retort.cache.stored import KeptBlocks
from retort.io.files import file_lock, remove_stale_temporaries, replacing, write_pieces

logger = logging.getLogger(__name__)

_KEY = "training.cache_copy"
_PIECE_BYTES = 1 << 26
_BUSY = "another job of this node copies the cache, or checks its copy: waiting"


@contextmanager
def copy_cache(cache: LogitCache, folder: str) -> Iterator[LogitCache]:
    """Yield a cache's copy in `folder`, such as "$TMPDIR" or "/dev/shm"; remove it after the block if nobody reads it.

    Raises ValueError when the folder cannot be used or has too little space, or the cache is damaged or virtual.
    """
    if cache.is_virtual:
        raise ValueError(
            f"{_KEY} is {folder!r}, but {cache.path} is a virtual cache (merge.mode), whose records are in other "
            f"files. Leave {_KEY} out, or merge with merge.mode: copy."
        )
    place = _make_place(folder, cache)
    copy = place / cache.path.name
    with _used(place, lambda: _provide(copy, cache)):
        yield LogitCache(copy)


@contextmanager
def keep_blocks(cache: LogitCache, folder: str, *, most_bytes: int) -> Iterator[LogitCache]:
    """Yield a cache whose records are in a store, and keep up to `most_bytes` of what is read of it in `folder`.

    All jobs of the node read them; they are removed after the block if nobody else does. Raises ValueError when the
    folder cannot be used.
    """
    place = _make_place(folder, cache)
    with _used(place, lambda: None):
        yield LogitCache(cache.path, KeptBlocks(place, most_bytes))


@contextmanager
def _used(place: Path, provide: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of the readers of a place, and remove its files after the block if there are no others.

    `provide` is called while no other job looks at the files.
    """
    lock = place / ".lock"
    users = os.open(place / ".users", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with file_lock(lock, busy=_BUSY):
            fcntl.flock(users, fcntl.LOCK_SH)
            provide()
        yield
    finally:
        os.close(users)
        with file_lock(lock, busy=_BUSY):
            _remove_if_unused(place)


def _make_place(folder: str, cache: LogitCache) -> Path:
    """Create the folder of a cache's copy, named by its content, so that no other cache is taken for it."""
    expanded = str(Path(os.path.expandvars(folder)).expanduser())
    if "$" in expanded:
        raise ValueError(
            f"{_KEY} is {folder!r}, but there is no such environment variable in this job. Name a folder on the node's "
            "own disk, or /dev/shm."
        )
    place = Path(expanded) / f"retort-cache-{os.getuid()}-{cache_digest(cache)[:24]}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.stat().st_uid != os.getuid():
            raise PermissionError(0, "it belongs to another user")
    except OSError as error:
        raise ValueError(
            f"{_KEY} is {folder!r}, but {place} cannot be made ({error.strerror}): name a folder of this node that you "
            "can write to, or leave the key out."
        ) from None
    return place


def _provide(copy: Path, cache: LogitCache) -> None:
    """Make the copy, unless it exists and is intact."""
    remove_stale_temporaries(copy.parent)
    if copy.exists():
        with suppress(ValueError):
            _require_same(LogitCache(copy), cache)
            return
        logger.warning(f"{copy}, left by an earlier job, is damaged: it is made again")
        copy.unlink()
    size, free = cache.path.stat().st_size, shutil.disk_usage(copy.parent).free
    if free < size:
        raise ValueError(
            f"{_KEY} is {str(copy.parent.parent)!r}, which has {free / 1e6:,.1f} MB free, but {cache.path} takes "
            f"{size / 1e6:,.1f} MB. Name a larger folder of this node, or leave the key out: then the cache is read "
            "where it is."
        )
    logger.info(f"copying {cache.path} ({size / 1e6:,.1f} MB) to {copy.parent}")
    with replacing(copy) as temporary:
        with cache.path.open("rb") as source, temporary.open("wb") as target:
            while piece := source.read(_PIECE_BYTES):
                write_pieces(target, memoryview(piece))
        try:
            _require_same(LogitCache(temporary), cache)
        except ValueError as error:
            raise ValueError(f"{cache.path} could not be copied intact: {error}") from None


def _require_same(copy: LogitCache, cache: LogitCache) -> None:
    """Raise ValueError when a copy is damaged, or of another cache."""
    copy.verify_parts()
    if cache_digest(copy) != cache_digest(cache):
        raise ValueError(f"{copy.path} is a copy of another cache than {cache.path}.")


def _remove_if_unused(place: Path) -> None:
    """Remove what is kept unless another job reads it; the small lock files stay: a job may be about to lock them."""
    users = os.open(place / ".users", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        for path in sorted(place.iterdir()):
            if path.name not in (".lock", ".users"):
                path.unlink(missing_ok=True)
    finally:
        os.close(users)
