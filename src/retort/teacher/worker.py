"""A worker of the teacher's pass: does parts of the index until every part has a file.

Worker w of N starts with parts w, w + N, w + 2N, ... and then takes any part that is still missing and not claimed by a
live worker, so parts of a slow or dead worker are done by the others. Batches follow from a part's content and the
config, so the bytes of a part do not depend on which worker did it, or when.
"""

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retort.cache.codec import TokenOrder
from retort.cache.parts import (
    build_header,
    discard_if_merged,
    find_missing_parts,
    is_merged,
    part_files,
    part_path,
    write_part,
)
from retort.cache.reader import CACHE_FILE, CacheHeader
from retort.cli import RESUME, first_line, is_out_of_memory
from retort.cluster.deadlines import OUT_OF_TIME, RESUMABLE, Deadline
from retort.config.handoff import Job
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import describe_run
from retort.models.load import describe_device, load_recorded_teacher, name_dtype
from retort.teacher.claims import Claims
from retort.teacher.progress import Progress
from retort.teacher.records import WorkerRecord
from retort.teacher.scoring import PartTargets, Scorer, score_part
from retort.tokens.index import Part, TokenIndex
from retort.tokens.sequences import SequenceTable

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.25  # listing the folder takes a few milliseconds


@dataclass(frozen=True)
class WorkerReport:
    """What one worker did."""

    parts: list[str]  # names
    tokens: int
    seconds: float
    left: int = 0  # parts without a file when there was no time for another one
    dtype: str | None = None  # of the teacher's weights, if it was loaded


def run_worker(
    index: TokenIndex,
    folder: Path,
    header: CacheHeader,
    *,
    worker: int,
    num_workers: int,
    open_scorer: Callable[[], Scorer],
    deadline: Deadline | None = None,
    claims: Claims | None = None,
) -> WorkerReport:
    """Do parts into `folder` until every part of the index has a file, or the deadline leaves no time for another one.

    `open_scorer` is called only when there is work to do. Raises ValueError for a logit that is NaN or infinite, where
    memory runs out with a single sequence, and where the teacher's files change; the part at work is not saved.
    """
    started = time.monotonic()
    deadline = deadline or Deadline(ask=lambda: None)
    is_late = False
    scorer: Scorer | None = None
    progress = Progress(index.parts, part_files(index, folder, header))
    order = header.codec.order_tokens(index.read_token_counts())
    score = partial(
        score_part,
        codec=header.codec,
        num_tokens=index.record.tokenizer.size,
        order=order,
        on_batch=progress.add,
    )
    writer = _Writer(folder, header, order, on_written=progress.end_part)
    with progress, claims or Claims(folder) as claims, writer:
        while missing := _find_work(index, folder, header):
            folder.mkdir(parents=True, exist_ok=True)
            part = claims.next_part(missing, worker=worker, num_workers=num_workers)
            # One part is tried in any case: else a time limit that is hardly long enough would never allow any.
            is_first = part is not None and writer.longest == 0.0
            if is_late := not is_first and deadline.forbids(writer.longest if part else 0.0):
                break
            if part is None:
                # Every missing part is claimed, by this worker while it writes or by others, of which one may die.
                writer.wait()
                progress.refresh()
                time.sleep(_POLL_INTERVAL_S)
                continue
            with ExitStack() as claim:
                is_claimed = claim.enter_context(claims.claim(part.name))
                if not is_claimed or part_path(folder, part.name, header).exists():
                    continue
                scorer = scorer or open_scorer()
                table = index.read_part(part)
                progress.start_part(part)
                part_started = time.monotonic()
                scored = score(scorer, table, executor=writer.thread)
                scorer.teacher.require_unchanged()
                writer.write(_PartToWrite(part, table, scored, claim.pop_all(), part_started))
    left = len(find_missing_parts(index, folder, header)) if is_late else 0
    seconds = time.monotonic() - started
    dtype = name_dtype(scorer.teacher.model.dtype) if scorer else None
    return WorkerReport(writer.done, progress.tokens, seconds, left, dtype)


def _find_work(index: TokenIndex, folder: Path, header: CacheHeader) -> list[tuple[int, Part]]:
    """Return (index, part) of every missing part, none where all are merged.

    A worker that was suspended for long may resume after the others finished, merged and removed all parts.
    """
    if is_merged(folder.parent / CACHE_FILE, header):
        return []
    return find_missing_parts(index, folder, header)


@dataclass(frozen=True)
class _PartToWrite:
    """A scored part; closing `claim`, once its file exists, releases its claim."""

    part: Part
    table: SequenceTable
    scored: PartTargets
    claim: ExitStack
    started: float  # time.monotonic() before its first batch


class _Writer:
    """Writes one part, in a thread of its own, while the teacher reads the next one.

    The part stays claimed until its file exists. One part is written at a time, so a worker that is killed loses at
    most the part that it writes and the one that it reads.
    """

    def __init__(
        self,
        folder: Path,
        header: CacheHeader,
        order: TokenOrder,
        *,
        on_written: Callable[[Part, Path], None],
    ) -> None:
        self.folder, self.header, self.order, self.on_written = folder, header, order, on_written
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.done: list[str] = []
        self.longest = 0.0  # seconds from a part's first batch to its file
        self._writing: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self.wait()  # also when the next part failed, or the worker is terminated: this part is scored
        finally:
            self.thread.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Wait for the part that is being written, if any, and raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def write(self, work: _PartToWrite) -> None:
        """Queue a part for writing, then wait for the part before and raise its error; this part is written anyway."""
        self.longest = max(self.longest, time.monotonic() - work.started)
        before = self._writing
        self._writing = self.thread.submit(self._write, work)
        if before is not None:
            before.result()

    def _write(self, work: _PartToWrite) -> None:
        with work.claim:
            path = part_path(self.folder, work.part.name, self.header)
            halved = work.scored.num_halved > 0
            sequences = work.scored.sequences
            write_part(path, work.table, sequences, self.header, self.order, halved=halved)
            self.done.append(work.part.name)
            self.on_written(work.part, path)
            discard_if_merged(path, self.folder.parent / CACHE_FILE, self.header)
        self.longest = max(self.longest, time.monotonic() - work.started)


def _open_scorer(job: Job, record_path: Path, *, longest: int) -> Scorer:
    """Load the teacher. Raises ValueError where there is not enough memory for it."""
    path, section = job.teacher_path, job.config.teacher
    try:
        teacher = load_recorded_teacher(path, section, record_path=record_path, longest=longest)
        return Scorer(teacher, section.generation.batch_size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"teacher {path!r} does not fit into memory ({first_line(error)}): spread it over more GPUs "
            f"(teacher.generation.gpus_per_model, now {section.generation.gpus_per_model}), use a smaller "
            f"teacher.dtype (now {section.dtype}), or fewer workers on this machine (teacher.generation.num_workers)."
        ) from None


def generate_logits(
    receipt: Path,
    job: Job,
    *,
    index_path: Path,
    fingerprint_path: Path,
    worker: int,
    num_workers: int,
) -> None:
    """Run one worker: do parts into parts/ beside the receipt until none is missing, then write the receipt.

    Raises ValueError as `run_worker` does, and when the teacher is not the recorded one, does not fit into memory, or
    cannot read sequences that long. Raises SystemExit(RESUMABLE), without a receipt, when the scheduler's time limit
    comes first.
    """
    section, cache = job.config.teacher, job.config.cache
    # Fixed by the config: another number of threads changes bits.
    torch.set_num_threads(section.generation.cpu_threads)
    logger.info(
        f"Worker {worker}/{num_workers}  CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}"
    )
    index = TokenIndex.read(index_path)
    header = build_header(
        index, TeacherRecord.read(fingerprint_path), cache, source=fingerprint_path
    )
    folder = receipt.parent
    if is_merged(folder / CACHE_FILE, header):
        logger.info("the merged cache already exists: nothing to do")
        report = WorkerReport([], 0, 0.0)
    else:
        report = run_worker(
            index,
            folder / "parts",
            header,
            worker=worker,
            num_workers=num_workers,
            open_scorer=lambda: _open_scorer(job, fingerprint_path, longest=index.longest),
            deadline=Deadline(),
        )
    if report.left:
        logger.info(
            f"{OUT_OF_TIME}: {report.left} of {len(index.parts)} parts are still missing, {len(report.parts)} were "
            f"done here. {RESUME}"
        )
        raise SystemExit(RESUMABLE)
    has_gpu = torch.cuda.is_available() and section.device != "cpu"
    device = describe_device(torch.device("cuda" if has_gpu else "cpu"))
    made = describe_run(
        section={"teacher": section, "cache": cache},
        dtype=report.dtype,
        device=device,
        seconds=report.seconds,
    )
    WorkerRecord(
        worker=worker,
        num_workers=num_workers,
        parts_done=tuple(report.parts),
        tokens=report.tokens,
        made=made,
    ).write(receipt)
    logger.info(
        f"worker {worker}: {len(report.parts)} parts, {report.tokens:,} tokens in {report.seconds:.1f} s"
    )
