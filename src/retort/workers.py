"""A worker of the teacher's pass: does parts of the index until every part has a file.

Parts belong to nobody. Worker w of N starts with parts w, w + N, w + 2N, ... and then takes any part that is still
missing and not claimed by a living worker, so that a slow or dead worker's parts are done by the others. Batches are
fixed by a part's content and the config, so its bytes do not depend on who did it, or when.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retort.cache import CACHE_FILE, CacheHeader
from retort.claims import claim, next_part
from retort.codec import TokenOrder
from retort.config import Cache, Teacher
from retort.index import TokenIndex
from retort.models import CausalLM, describe_device, load_recorded_teacher
from retort.parts import (
    build_header,
    find_missing_parts,
    find_order,
    is_merged,
    part_path,
    write_part,
)
from retort.provenance import describe_run, read_json, write_json
from retort.teacher import Scored, Scorer, score_part
from retort.tokens import SequenceTable

_PROGRESS_S = 10.0


@dataclass(frozen=True)
class WorkerReport:
    """What one worker did, for its receipt metadata_worker<w>.json."""

    worker: int
    num_workers: int
    parts: list[str]
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the receipt's content."""
        return {
            "worker": self.worker,
            "num_workers": self.num_workers,
            "parts_done": self.parts,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }


def run_worker(
    index: TokenIndex,
    folder: Path,
    header: CacheHeader,
    *,
    worker: int,
    num_workers: int,
    batch_size: int,
    load: Callable[[], CausalLM],
    say: Callable[[str], None] = print,
) -> WorkerReport:
    """Do parts until every part of the index has a file. `load` is called only when there is work to do."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    scorer: Scorer | None = None
    progress = _Progress(index, say=say)
    num_tokens = int(index.content["tokenizer"]["size"])
    order = find_order(index, header.codec)
    with _Writer(folder, header, order) as writer:
        # A worker that was stopped for long may wake after the others finished, merged and removed all parts.
        while not is_merged(folder.parent / CACHE_FILE, header) and (
            missing := find_missing_parts(index, folder, header)
        ):
            place_part = next_part(missing, folder, worker=worker, num_workers=num_workers)
            if place_part is None and writer.is_busy:
                writer.wait()
                continue
            if place_part is None:
                time.sleep(
                    1.0
                )  # living workers are at every part that is left; take over if one of them dies
                continue
            place, part = place_part
            with ExitStack() as hold:
                is_mine = hold.enter_context(claim(folder, part["name"]))
                if not is_mine or part_path(folder, part["name"], header).exists():
                    continue
                scorer = scorer or Scorer(load(), batch_size, say=say)
                table = index.read_part(part)
                progress.start_part(place, len(writer.done))
                scored = score_part(
                    scorer,
                    table,
                    header.codec,
                    num_tokens=num_tokens,
                    order=order,
                    behind=writer.thread,
                    on_batch=progress.add,
                )
                scorer.teacher.require_unchanged()
                writer.write(part["name"], table, scored, hold.pop_all())
    return WorkerReport(
        worker, num_workers, writer.done, progress.tokens, time.monotonic() - started
    )


class _Writer:
    """Writes one part, in a thread of its own, while the teacher reads the next one.

    The part stays claimed until its file is there. One part is written at a time, so a worker that is killed loses the
    part that it reads, or the one that it writes and what it read meanwhile.
    """

    def __init__(self, folder: Path, header: CacheHeader, order: TokenOrder | None) -> None:
        self.folder, self.header, self.order = folder, header, order
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.done: list[str] = []
        self._writing: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self.wait()  # also when the next part failed, or the worker is told to end: this one is scored
        finally:
            self.thread.shutdown(cancel_futures=True)

    @property
    def is_busy(self) -> bool:
        """Whether a part is being written."""
        return self._writing is not None

    def wait(self) -> None:
        """Wait for the part that is being written; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def write(self, name: str, table: SequenceTable, scored: Scored, claimed: ExitStack) -> None:
        """Begin to write a part, after the one before; `claimed` is closed at its end."""
        with claimed:
            self.wait()
            self._writing = self.thread.submit(self._write, name, table, scored, claimed.pop_all())

    def _write(self, name: str, table: SequenceTable, scored: Scored, claimed: ExitStack) -> None:
        with claimed:
            path = part_path(self.folder, name, self.header)
            write_part(
                path, table, scored.targets, self.header, self.order, halved=scored.halved > 0
            )
            self.done.append(name)


class _Progress:
    """One plain line every few seconds: parts, tokens per second, time left if this worker were alone."""

    def __init__(self, index: TokenIndex, *, say: Callable[[str], None]) -> None:
        self.say = say
        self.tokens = 0
        self._parts = index.parts
        self._started = self._said = time.monotonic()
        self._place = ""

    def start_part(self, place: int, num_done: int) -> None:
        self._place = f"part {place + 1} of {len(self._parts)} ({num_done} done here)"

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            rate = self.tokens / (now - self._started)
            self.say(f"{self._place}  {self.tokens:,} tokens  {rate:,.0f} tokens/s")


def generate_logits(
    receipt: Path,
    *,
    index_path: Path,
    teacher_path: str,
    fingerprint_path: Path,
    section: Teacher,
    cache: Cache,
    worker: int,
    num_workers: int,
    say: Callable[[str], None] = print,
) -> None:
    """Be one worker: do parts into parts/ beside the receipt until none is missing, then write the receipt."""
    torch.set_num_threads(
        section.generation.cpu_threads
    )  # fixed by the config: another number changes bits
    say(
        f"Worker {worker}/{num_workers}  CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}"
    )
    index = TokenIndex.read(index_path)
    header = build_header(index, read_json(fingerprint_path), cache, source=fingerprint_path)
    folder = receipt.parent
    if is_merged(folder / CACHE_FILE, header):
        say("the merged cache is there already: nothing to do")
        report = WorkerReport(worker, num_workers, [], 0, 0.0)
    else:
        report = run_worker(
            index,
            folder / "parts",
            header,
            worker=worker,
            num_workers=num_workers,
            batch_size=section.generation.batch_size,
            load=lambda: load_recorded_teacher(
                teacher_path, section, record_path=fingerprint_path, longest=index.longest
            ),
            say=say,
        )
    device = "cuda" if torch.cuda.is_available() and section.device != "cpu" else "cpu"
    about = describe_run(
        section=asdict(cache),
        seed=None,
        device=describe_device(torch.device(device)),
        seconds=report.seconds,
    )
    write_json(receipt, report.to_json() | {"run": about})
    say(
        f"worker {worker}: {len(report.parts)} parts, {report.tokens:,} tokens in {report.seconds:.1f} s"
    )
