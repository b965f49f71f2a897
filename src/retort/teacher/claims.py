"""Claims on parts: a hint that avoids doing work twice, not a lock.

A claim is a file that holds its worker's node and process, and that the worker touches every few seconds. A claim that
was not touched for a minute (by the clock of the file system, which all nodes share), or whose process on this node has
ended, is void. Two workers that do the same part write the same bytes.
"""

import os
import platform
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from retort.io.files import has_ended
from retort.tokens.index import Part

STALE_S = 60.0
_PROCESS = re.compile("[0-9]{1,9}")


def is_live(claim: Path, *, stale_s: float = STALE_S) -> bool:
    """Say whether a claim is a live worker's: touched in the last `stale_s`, by no process known to have ended."""
    try:
        # Read first: on a network file system, opening a file brings its times up to date.
        node, _, process = claim.read_text(errors="replace").strip().partition(" ")
        written = claim.stat().st_mtime
        if node == platform.node() and _PROCESS.fullmatch(process) and has_ended(int(process)):
            return False  # killed on this node: no need to wait until its claim is stale
        # The file system's own clock. The file has no name, so that a stop at any moment leaves nothing behind.
        with tempfile.TemporaryFile(dir=claim.parent) as clock:
            now = os.fstat(clock.fileno()).st_mtime
    except FileNotFoundError:  # released, or the whole folder merged and removed
        return False
    # Absolute, because a file may carry the time of the node that wrote it: a claim of a dead node whose clock was
    # fast must not block its part until that time.
    return abs(now - written) < stale_s


class Claims:
    """The claims of one worker on parts in `folder`, refreshed by one thread while the block runs.

    One thread for all of them: Python waits forever for a new thread that dies for lack of memory while it starts.
    """

    def __init__(self, folder: Path, *, refresh_s: float = 5.0, stale_s: float = STALE_S) -> None:
        self.folder, self.refresh_s, self.stale_s = folder, refresh_s, stale_s
        self._claimed: set[Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def next_part(
        self, missing: list[tuple[int, Part]], *, worker: int, num_workers: int
    ) -> Part | None:
        """Return the first unclaimed part of the worker's own stripe, else any unclaimed part, else None.

        missing: (index, part) as of `find_missing_parts`; part i belongs to the stripe of worker i mod num_workers.
        """
        own = (part for i, part in missing if i % num_workers == worker % num_workers)
        others = (part for i, part in missing if i % num_workers != worker % num_workers)
        return next((p for p in chain(own, others) if not self.is_claimed(p.name)), None)

    def is_claimed(self, part_name: str) -> bool:
        """Say whether a live worker has claimed the part."""
        return is_live(self._path(part_name), stale_s=self.stale_s)

    @contextmanager
    def claim(self, part_name: str) -> Iterator[bool]:
        """Claim a part while the block runs; yield False when another worker was faster, or the folder is gone."""
        path = self._path(part_name)
        if path.exists() and not self.is_claimed(part_name):
            path.unlink(missing_ok=True)
        try:
            with path.open("x") as file:
                file.write(_signature())
        except (FileExistsError, FileNotFoundError):
            yield False
            return
        with self._lock:
            self._claimed.add(path)
        try:
            yield True
        finally:
            with self._lock:
                self._claimed.discard(path)
            if _is_own(path):
                path.unlink(missing_ok=True)

    def _path(self, part_name: str) -> Path:
        return self.folder / f"{part_name}.claim"

    def _refresh(self) -> None:
        while not self._stop.wait(self.refresh_s):
            with self._lock:
                claimed = list(self._claimed)
            for path in claimed:
                with suppress(OSError):  # a network file system may fail for a moment
                    if _is_own(path):
                        os.utime(path)


def _is_own(claim: Path) -> bool:
    """Say whether a claim is this process's: another worker takes a part over if this one was stopped for long."""
    try:
        return claim.read_text(errors="replace") == _signature()
    except FileNotFoundError:
        return False


def _signature() -> str:
    return f"{platform.node()} {os.getpid()}\n"
