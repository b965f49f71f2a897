"""The parts that a worker has claimed, and the threads that code and write those that are complete."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.cache.codec import TokenOrder
from retort.cache.kinds import PartKind
from retort.cache.parts import (
    adopt_part,
    discard_if_merged,
    find_missing_parts,
    is_merged,
    part_files,
    part_path,
    read_kinds,
    store_part,
    write_part,
)
from retort.cache.reader import CACHE_FILE, CacheHeader
from retort.cluster.deadlines import Deadline
from retort.io.files import temporary_name
from retort.io.objects import list_sizes
from retort.teacher.claims import Claims
from retort.teacher.scoring import PartTargets
from retort.tokens.index import Part, TokenIndex

logger = logging.getLogger(__name__)

# The claim of the one worker that stays when all parts that are left are at work elsewhere.
_WAITING = "waiting"
# A worker without work lists the folder and reads the claims. 32 of them, 4 times a second, would ask a cluster's file
# system for 25,000 things a second: the pauses grow.
_FIRST_PAUSE_S, _PAUSE_GROWTH, _LONGEST_PAUSE_S = 0.25, 1.25, 5.0


def _find_work(index: TokenIndex, folder: Path, header: CacheHeader) -> list[tuple[int, Part]]:
    """Return (index, part) of every missing part, none where all are merged.

    A worker that was suspended for long may resume after the others finished, merged and removed all parts.
    """
    if is_merged(folder.parent / CACHE_FILE, header):
        return []
    return find_missing_parts(index, folder, header)


@dataclass(frozen=True)
class ClaimedPart:
    """A part at work; closing `claim`, once its file exists, releases its claim."""

    part: Part
    scored: PartTargets
    claim: ExitStack
    started: float  # time.monotonic() before its first batch


class PartWriter:
    """Writes one part, in a thread of its own, while the teacher reads the next one.

    The part stays claimed until its file exists. One part is written at a time, so a worker that is killed loses at
    most the part that it writes and the one that it reads. The threads of `pool` do what takes time: they prepare,
    code and verify the sequences of both.
    """

    def __init__(
        self,
        folder: Path,
        header: CacheHeader,
        order: TokenOrder,
        *,
        num_threads: int,
        on_written: Callable[[Part, Path], None],
    ) -> None:
        self.folder, self.header, self.order, self.on_written = folder, header, order, on_written
        self.pool = ThreadPoolExecutor(num_threads)
        self._thread = ThreadPoolExecutor(1)  # waits for the pool, so it is not one of its threads
        self.kind: PartKind | None = None  # of its parts; known once the teacher is loaded
        self.done: list[str] = []
        self.longest = 0.0  # seconds from a part's first batch to its file
        self._writing: Future[None] | None = None

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self.wait()  # also when the next part failed, or the worker is terminated: this part is scored
        finally:
            for threads in (self._thread, self.pool):
                threads.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Wait for the part that is being written, if any, and raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def write(self, work: ClaimedPart) -> None:
        """Queue a part for writing, then wait for the part before and raise its error; this part is written anyway."""
        self.longest = max(self.longest, time.monotonic() - work.started)
        before = self._writing
        self._writing = self._thread.submit(self._write, work)
        if before is not None:
            before.result()

    def _write(self, work: ClaimedPart) -> None:
        with work.claim:
            path = part_path(self.folder, work.part.name, self.header)
            if self.header.store:
                written = temporary_name(path.with_suffix(".whole"))
                try:
                    self._write_file(written, work)
                    store_part(written, path, self.header.store)
                finally:
                    written.unlink(missing_ok=True)
            else:
                self._write_file(path, work)
            self.done.append(work.part.name)
            self.on_written(work.part, path)
            discard_if_merged(path, self.folder.parent / CACHE_FILE, self.header)
        self.longest = max(self.longest, time.monotonic() - work.started)

    def _write_file(self, path: Path, work: ClaimedPart) -> None:
        write_part(
            path,
            work.scored.table,
            work.scored.sequences,
            self.header,
            self.order,
            halved=work.scored.is_halved,
            kind=self.kind,
            pool=self.pool,
        )


class PartQueue:
    """The claimed parts that are not complete, oldest first; the block releases those that are left.

    Batches of the next part are read before those of the one before are complete.
    """

    def __init__(
        self, index: TokenIndex, claims: Claims, writer: PartWriter, deadline: Deadline
    ) -> None:
        self.index, self.claims, self.writer, self.deadline = index, claims, writer, deadline
        self.parts: deque[ClaimedPart] = deque()
        self.is_late = False  # there was no time for another part
        self._has_started = False
        self._waiting: ExitStack | None = None  # the claim that this worker waits by
        self._stored: tuple[str, ...] | None = (
            None  # objects that are in the store before this worker begins
        )

    def __enter__(self) -> "PartQueue":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop_waiting()
        for part in self.parts:
            part.claim.close()

    def claim_parts(
        self, worker: int, num_workers: int, *, on_idle: Callable[[], None]
    ) -> Iterator[ClaimedPart | None]:
        """Claim and yield parts until none is missing, or the deadline leaves no time for another one.

        None: every missing part is claimed, by this worker or by others. Of the workers without work one waits, to take
        over the parts of one that dies; the others end, so that their GPUs are free.
        """
        folder, header = self.writer.folder, self.writer.header
        pause_s = _FIRST_PAUSE_S
        while missing := _find_work(self.index, folder, header):
            folder.mkdir(parents=True, exist_ok=True)
            part = self.claims.next_part(missing, worker=worker, num_workers=num_workers)
            if self._forbids(part):
                self.is_late = True
                return
            if part is None:
                yield None
                self.writer.wait()
                if not self.parts and not self._waits():
                    logger.info(
                        "what is left is at work elsewhere, and another worker waits for it: this one ends"
                    )
                    return
                on_idle()
                time.sleep(pause_s)
                pause_s = min(pause_s * _PAUSE_GROWTH, _LONGEST_PAUSE_S)
            elif claimed := self._claim(part):
                self._stop_waiting()
                pause_s = _FIRST_PAUSE_S
                self.parts.append(claimed)
                yield claimed

    def _waits(self) -> bool:
        """Return whether this worker is the one that waits, or becomes it now."""
        if self._waiting is None:
            with ExitStack() as stack:
                if not stack.enter_context(self.claims.claim(_WAITING)):
                    return False
                self._waiting = stack.pop_all()
        return True

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _forbids(self, part: Part | None) -> bool:
        """Say whether there is no time for a part, or without one to wait for others."""
        if part is None:
            return self.deadline.forbids(0.0)
        # One part is tried in any case: else a time limit that is hardly long enough would never allow any.
        if not self._has_started:
            return False
        at_work = [time.monotonic() - part.started for part in self.parts]
        return self.deadline.forbids(max([self.writer.longest, *at_work]))

    def _claim(self, part: Part) -> ClaimedPart | None:
        """Return None when another worker was faster."""
        writer = self.writer
        with ExitStack() as claim:
            is_own = claim.enter_context(self.claims.claim(part.name))
            if not is_own or part_path(writer.folder, part.name, writer.header).exists():
                return None
            if self._is_stored(part):
                return None
            table = self.index.read_part(part)
            assert len(table) > 0
            self._has_started = True
            scored = PartTargets(table, writer.header.codec, writer.order, writer.pool)
            return ClaimedPart(part, scored, claim.pop_all(), time.monotonic())

    def _is_stored(self, part: Part) -> bool:
        """Say whether a part without a receipt is in the store, and write its receipt."""
        header = self.writer.header
        if header.store is None:
            return False
        if self._stored is None:
            self._stored = tuple(list_sizes(header.store))
        receipt = part_path(self.writer.folder, part.name, header)
        kinds = read_kinds(part_files(self.index, self.writer.folder, header), most=1)
        like = list(kinds.values())
        is_stored = adopt_part(receipt, header.store, self._stored, like=like)
        if is_stored:
            logger.info(f"a part of {part.sequences:,} samples is in the store already")
        return is_stored
