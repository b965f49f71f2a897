"""Claims on parts: a hint against doing work twice, and never more than a hint.

A claim is a file with node and process, touched every few seconds by the worker that holds it. One that was not
touched for a minute (by the file system's clock, which all nodes share), or whose process is dead on this node, is
nobody's. Two workers that do the same part all the same write the same bytes.
"""

import os
import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from retort.io.files import has_ended

_CLAIM_REFRESH_S = 5.0
_CLAIM_STALE_S = 60.0
_PROCESS = re.compile("[0-9]{1,9}")


def next_part(
    missing: list[tuple[int, dict[str, Any]]], folder: Path, *, worker: int, num_workers: int
) -> tuple[int, dict[str, Any]] | None:
    """Return the first part of the worker's own stripe that nobody is at, else any other, else None."""
    own = (item for item in missing if item[0] % num_workers == worker % num_workers)
    others = (item for item in missing if item[0] % num_workers != worker % num_workers)
    stripe_first = chain(own, others)
    return next((item for item in stripe_first if not is_claimed(folder, item[1]["name"])), None)


def _claim_path(folder: Path, part_name: str) -> Path:
    return folder / f"{part_name}.claim"


def is_claimed(folder: Path, part_name: str) -> bool:
    """Say whether a living worker is at the part; compared by the file system's clock, not by the nodes'."""
    claim = _claim_path(folder, part_name)
    clock = folder / f".clock.{platform.node()}.{os.getpid()}.tmp"
    try:
        # Read first: on a network's file system, opening a file brings its times up to date.
        node, _, process = claim.read_text(errors="replace").strip().partition(" ")
        written = claim.stat().st_mtime
        if node == platform.node() and _PROCESS.fullmatch(process) and has_ended(int(process)):
            return False  # killed here: nobody has to wait for its claim to age
        clock.touch()
        now = clock.stat().st_mtime
    except FileNotFoundError:  # given up, or the whole folder merged and removed
        return False
    clock.unlink(missing_ok=True)
    # A claim from far in the future is nobody's either: where files bear the time of the node that writes them, a dead
    # node whose clock was fast would else be waited for until that time has come.
    return abs(now - written) < _CLAIM_STALE_S


class Claims:
    """The claims that one worker holds, touched by one thread for as long as the block runs.

    One thread for all of them: Python waits for ever for a new thread that dies of want of memory while it starts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def claim(self, part_name: str) -> Iterator[bool]:
        """Claim a part while the block runs; yields False when another worker was faster, or the folder is gone."""
        path = _claim_path(self.folder, part_name)
        if path.exists() and not is_claimed(self.folder, part_name):
            path.unlink(missing_ok=True)
        try:
            with path.open("x") as file:
                file.write(_signature())
        except (FileExistsError, FileNotFoundError):
            yield False
            return
        with self._lock:
            self._held.add(path)
        try:
            yield True
        finally:
            with self._lock:
                self._held.discard(path)
            if _is_mine(path):
                path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._stop.wait(_CLAIM_REFRESH_S):
            with self._lock:
                held = list(self._held)
            for path in held:
                with suppress(OSError):  # a network's file system may fail for a moment
                    if _is_mine(path):
                        os.utime(path)


def _is_mine(claim: Path) -> bool:
    """Say whether a claim is this process's; while it was stopped, another may have taken the part over."""
    try:
        return claim.read_text(errors="replace") == _signature()
    except FileNotFoundError:
        return False


def _signature() -> str:
    return f"{platform.node()} {os.getpid()}\n"
