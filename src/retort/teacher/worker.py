"""A worker of the teacher's pass: does parts of the index until every part has a file.

Worker w of N starts with parts w, w + N, w + 2N, ... and then takes any part that is still missing and not claimed by a
live worker, so parts of a slow or dead worker are done by the others. Batches follow from a part's content and the
config, so the bytes of a part do not depend on which worker did it, or when.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

import torch
import transformers

from retort.cache.kinds import PartKind, refuse_unlike_work
from retort.cache.parts import (
    build_header,
    find_missing_parts,
    is_merged,
    part_files,
    read_kinds,
)
from retort.cache.reader import CACHE_FILE, CacheHeader
from retort.cli import RESUME, first_line, is_out_of_memory
from retort.cluster.deadlines import OUT_OF_TIME, RESUMABLE, Deadline
from retort.cluster.gpus import is_scheduled
from retort.config.handoff import Job
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import describe_run
from retort.models.causal_lm import CausalLM
from retort.models.load import (
    describe_device,
    load_recorded_teacher,
    name_dtype,
    read_peak_memory,
)
from retort.teacher.batch_tokens import agree_on_batch_tokens, find_batch_tokens
from retort.teacher.batches import Batch
from retort.teacher.claims import Claims
from retort.teacher.part_queue import ClaimedPart, PartQueue, PartWriter
from retort.teacher.progress import Progress
from retort.teacher.records import BatchTokens, WorkerRecord
from retort.teacher.scoring import Scorer, select_batches
from retort.tokens.index import TokenIndex

logger = logging.getLogger(__name__)

_MAX_COMPARED = 64  # parts that exist, of which a worker reads the headers before it begins
_MOST_CODING_THREADS = 8  # they share the lock of Python


@dataclass(frozen=True)
class WorkerReport:
    """What one worker did."""

    parts: list[str]  # names
    tokens: int
    seconds: float
    left: int = 0  # parts without a file when there was no time for another one
    dtype: str | None = None  # of the teacher's weights, if it was loaded


def count_coding_threads(num_workers: int) -> int:
    """Return how many threads of this process code what the teacher gave; any number makes the same bytes.

    Beside a teacher on the CPU, which takes most of the time, one. Beside GPUs, the cores of this process: those of its
    SLURM job, else its share of the machine's.
    """
    if not torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0))
    share = cores if is_scheduled() else cores // num_workers
    return min(max(1, share), _MOST_CODING_THREADS)


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
    scorer: Scorer | None = None
    progress = Progress(index.parts, part_files(index, folder, header))
    order = header.codec.order_tokens(index.read_token_counts())
    num_threads = count_coding_threads(num_workers)
    writer = PartWriter(
        folder, header, order, num_threads=num_threads, on_written=progress.end_part
    )
    with progress, claims or Claims(folder) as claims, writer:
        queue = PartQueue(index, claims, writer, deadline or Deadline(ask=lambda: None))
        with queue:
            parts = queue.claim_parts(worker, num_workers, on_idle=progress.refresh)
            first = next((part for part in parts if part), None)
            if first:
                scorer = open_scorer()
                writer.kind = find_kind(scorer.teacher)
                _score(scorer, _batch(chain([first], parts), scorer), queue, progress)
    left = len(find_missing_parts(index, folder, header)) if queue.is_late else 0
    seconds = time.monotonic() - started
    dtype = writer.kind.dtype if writer.kind else None
    return WorkerReport(writer.done, progress.tokens, seconds, left, dtype)


def _batch(parts: Iterable[ClaimedPart | None], scorer: Scorer) -> Iterator[Batch | None]:
    for part in parts:
        if part:
            yield from scorer.batches(part.scored.table)
        else:
            yield None


def _score(
    scorer: Scorer, batches: Iterator[Batch | None], queue: PartQueue, progress: Progress
) -> None:
    """Score the batches of the parts in the queue, and write each part that is complete."""
    codec, num_tokens = queue.writer.header.codec, queue.index.record.tokenizer.size
    current: ClaimedPart | None = None
    for batch, selected, is_halved in select_batches(scorer, batches, codec, num_tokens=num_tokens):
        if current is not queue.parts[0]:
            current = queue.parts[0]
            progress.start_part(current.part)
        current.scored.add(batch, selected, is_halved=is_halved)
        progress.add(batch.num_tokens)
        if current.scored.is_complete:
            scorer.teacher.require_unchanged()
            queue.writer.write(queue.parts.popleft())


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


def find_kind(teacher: CausalLM) -> PartKind:
    """Return the kind of the parts that a loaded teacher makes."""
    gpus = {torch.cuda.get_device_name(d) for d in teacher.devices if d.type == "cuda"}
    device = " + ".join(sorted(gpus)) or "cpu"
    dtype = name_dtype(teacher.model.dtype)
    return PartKind(device, dtype, torch.__version__, transformers.__version__)


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

    Raises ValueError as `run_worker` does, and when the teacher is not the recorded one, does not fit into memory,
    cannot read sequences that long, or would make parts of another kind than those that exist. Raises
    SystemExit(RESUMABLE), without a receipt, when the scheduler's time limit comes first.
    """
    # Fixed by the config: another number of threads changes bits.
    torch.set_num_threads(job.config.teacher.generation.cpu_threads)
    logger.info(
        f"Worker {worker}/{num_workers}  CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}"
    )
    index = TokenIndex.read(index_path)
    teacher = TeacherRecord.read(fingerprint_path)
    header = build_header(index, teacher, job.config.cache, source=fingerprint_path)
    folder = receipt.parent
    header = replace(header, store=job.config.output.find_store(folder))
    if is_merged(folder / CACHE_FILE, header):
        logger.info("the merged cache already exists: nothing to do")
        report = WorkerReport([], 0, 0.0)
    else:
        report = _make_parts(
            folder,
            job,
            index,
            header,
            open_scorer=cache(partial(_open_scorer, job, fingerprint_path, longest=index.longest)),
            worker=worker,
            num_workers=num_workers,
        )
    if report.left:
        logger.info(
            f"{OUT_OF_TIME}: {report.left} of {len(index.parts)} parts are still missing, {len(report.parts)} were "
            f"done here. {RESUME}"
        )
        raise SystemExit(RESUMABLE)
    _write_receipt(receipt, job, report, worker=worker, num_workers=num_workers)


def _make_parts(
    folder: Path,
    job: Job,
    index: TokenIndex,
    header: CacheHeader,
    *,
    open_scorer: Callable[[], Scorer],
    worker: int,
    num_workers: int,
) -> WorkerReport:
    """Run the worker; with `batch_tokens: auto`, first agree with the others on the tokens of a batch."""
    batch_tokens = job.config.teacher.generation.batch_tokens
    if batch_tokens == "auto":
        num_tokens = index.record.tokenizer.size

        def find() -> BatchTokens:
            options = {"longest": index.record.train.longest, "num_tokens": num_tokens}
            return find_batch_tokens(open_scorer().teacher, header.codec, **options)

        batch_tokens = agree_on_batch_tokens(folder, find)
        header = replace(header, batch_tokens=batch_tokens)

    parts = folder / "parts"

    def open_batched() -> Scorer:
        scorer = replace(open_scorer(), batch_tokens=batch_tokens)
        if not job.config.merge.accept_unlike_parts:
            others = read_kinds(part_files(index, parts, header), most=_MAX_COMPARED)
            refuse_unlike_work(find_kind(scorer.teacher), others, store=header.store)
        return scorer

    return run_worker(
        index,
        parts,
        header,
        worker=worker,
        num_workers=num_workers,
        open_scorer=open_batched,
        deadline=Deadline(),
    )


def _write_receipt(
    path: Path, job: Job, report: WorkerReport, *, worker: int, num_workers: int
) -> None:
    section = job.config.teacher
    has_gpu = torch.cuda.is_available() and section.device != "cpu"
    device = torch.device("cuda" if has_gpu else "cpu")
    made = describe_run(
        section={"teacher": section, "cache": job.config.cache},
        dtype=report.dtype,
        device=describe_device(device),
        seconds=report.seconds,
    )
    WorkerRecord(
        worker=worker,
        num_workers=num_workers,
        parts_done=tuple(report.parts),
        tokens=report.tokens,
        made=made,
        peak_memory=read_peak_memory(device),
    ).write(path)
    logger.info(
        f"worker {worker}: {len(report.parts)} parts, {report.tokens:,} tokens in {report.seconds:.1f} s"
    )
