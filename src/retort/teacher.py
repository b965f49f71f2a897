"""The teacher's pass: sequences become distributions, part by part, by any number of workers.

Legend: B sequences in a batch, T positions, P counted positions, D width, V vocabulary, K kept tokens.

Parts belong to nobody. Worker w of N starts with parts w, w + N, w + 2N, ... and then takes any part that is still
missing and not claimed by a living worker, so that a slow or dead worker's parts are done by the others. A claim
is only a hint against doing work twice: a part done twice is the same part. Batches are fixed by the part's
content and the config, so its bytes do not depend on who did it, or when.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.cache import (
    CACHE_FILE,
    CacheHeader,
)
from retort.codec import (
    Codec,
    SparseTargets,
    TokenOrder,
    build_codec,
)
from retort.config import Cache, Teacher
from retort.models import CausalLM, describe_device, load_recorded_teacher
from retort.parts import (
    find_missing_parts,
    is_merged,
    part_path,
    write_part,
)
from retort.provenance import describe_run, read_json, write_json
from retort.selection import select_probable, select_top_k
from retort.shards import TokenIndex
from retort.sparse_codec import to_streams
from retort.sparse_streams import Streams
from retort.tokens import Sequence, SequenceTable

# Rows of logits held at once: [_HEAD_ROWS, V] float32 is 128 MiB at V = 32k; below 128 rows the matmul slows.
_HEAD_ROWS = 1024
_CLAIM_REFRESH_S = 5.0
_CLAIM_STALE_S = 60.0
_PROGRESS_S = 10.0


def batch_by_length(table: SequenceTable, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices of sequences in batches of like length, longest first (padding about 5 %, not 60 %)."""
    order = np.argsort(-table.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def pad_batch(rows: Rows[Sequence], *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids, attention mask and loss mask, each [B, T], padded on the right to the longest row."""
    width = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros((len(rows), width), dtype=torch.long)
    attention_BT = torch.zeros((len(rows), width), dtype=torch.long)
    loss_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.from_numpy(np.array(row.ids, dtype=np.int64))
        attention_BT[b, : len(row.ids)] = 1
        loss_BT[b, : len(row.ids)] = torch.from_numpy(np.array(row.loss_mask))
    return ids_BT.to(device), attention_BT.to(device), loss_BT.to(device)


@torch.inference_mode()
def score_features(
    teacher: CausalLM,
    table: SequenceTable,
    *,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (sequence index, features [P, D] at its counted positions), batch by batch in length order."""
    for indices in batch_by_length(table, batch_size):
        rows = [table[int(i)] for i in indices]
        ids_BT, attention_BT, loss_BT = pad_batch(rows, device=teacher.device)
        features_BTD = teacher.features(ids_BT, attention_BT)
        for b, index in enumerate(indices):
            yield int(index), features_BTD[b][loss_BT[b].to(features_BTD.device)]
        on_batch(sum(len(row.ids) for row in rows))


def score_part(
    teacher: CausalLM,
    table: SequenceTable,
    codec: Codec,
    *,
    batch_size: int,
    num_tokens: int,
    order: TokenOrder | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> SparseTargets | list[Streams]:
    """Return the teacher's distributions at every counted position of the table, in the table's order.

    Of a codec that codes (which needs `order`), every sequence's streams: what was selected is not kept longer than
    that.
    """
    found: list[Any] = [None] * len(table)
    for index, features_PD in score_features(
        teacher, table, batch_size=batch_size, on_batch=on_batch
    ):
        row = table[index]
        pieces: list[Any] = []
        for start in range(0, len(features_PD), _HEAD_ROWS):
            logits_PV = teacher.head.logits(features_PD[start : start + _HEAD_ROWS])
            if order is None:
                pieces.append(select_top_k(logits_PV, codec, num_tokens=num_tokens))
            else:
                pieces.append(
                    select_probable(
                        logits_PV, codec, num_tokens=num_tokens, key=row.key, first_position=start
                    )
                )
        piece = pieces[0] if len(pieces) == 1 else type(pieces[0]).concatenate(pieces)
        if order is not None:
            next_ids = row.ids[1:][row.loss_mask[:-1]]
            piece = to_streams(piece, codec, order, next_ids=next_ids, key=row.key)
        found[index] = piece
    return found if order is not None else SparseTargets.concatenate(found)


# ---------------------------------------------------------------------------------------------------------
# The worker


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
    done: list[str] = []
    teacher: CausalLM | None = None
    progress = _Progress(index, say=say)
    num_tokens = int(index.content["tokenizer"]["size"])
    order = find_order(index, header.codec)
    # A worker that was stopped for long may wake after the others finished, merged and removed all parts.
    while not is_merged(folder.parent / CACHE_FILE, header) and (
        missing := find_missing_parts(index, folder, header)
    ):
        place_part = _next_part(missing, folder, worker=worker, num_workers=num_workers)
        if place_part is None:
            time.sleep(
                1.0
            )  # living workers are at every part that is left; take over if one of them dies
            continue
        place, part = place_part
        with _claim(folder, part["name"]) as is_mine:
            if not is_mine or part_path(folder, part["name"], header).exists():
                continue
            teacher = teacher or load()
            table = index.read_part(part)
            progress.start_part(place, len(done))
            targets = score_part(
                teacher,
                table,
                header.codec,
                batch_size=batch_size,
                num_tokens=num_tokens,
                order=order,
                on_batch=progress.add,
            )
            teacher.require_unchanged()
            write_part(part_path(folder, part["name"], header), table, targets, header, order)
            done.append(part["name"])
    return WorkerReport(worker, num_workers, done, progress.tokens, time.monotonic() - started)


def _next_part(
    missing: list[tuple[int, dict[str, Any]]], folder: Path, *, worker: int, num_workers: int
) -> tuple[int, dict[str, Any]] | None:
    """Return the first part of the worker's own stripe that nobody is at, else any other, else None."""
    stripe_first = sorted(
        missing, key=lambda item: (item[0] % num_workers != worker % num_workers, item[0])
    )
    return next((item for item in stripe_first if not _is_claimed(folder, item[1]["name"])), None)


def _claim_path(folder: Path, part_name: str) -> Path:
    return folder / f"{part_name}.claim"


def _is_claimed(folder: Path, part_name: str) -> bool:
    """Say whether a living worker is at the part; compared by the file system's clock, not by the nodes'."""
    claim = _claim_path(folder, part_name)
    try:
        written = claim.stat().st_mtime
        node, _, process = claim.read_text().strip().partition(" ")
    except FileNotFoundError:
        return False
    if node == platform.node() and process.isdigit() and _has_ended(int(process)):
        return False  # killed here: nobody has to wait for its claim to age
    clock = folder / f".clock.{platform.node()}.{os.getpid()}.tmp"
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink(missing_ok=True)
    return now - written < _CLAIM_STALE_S


def _has_ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:  # PermissionError: it is alive, and somebody else's
        return isinstance(error, ProcessLookupError)
    return False


@contextmanager
def _claim(folder: Path, part_name: str) -> Iterator[bool]:
    """Claim a part while the block runs; yields False when another worker was faster.

    The claim is refreshed every few seconds by a thread, so that a worker killed in any way loses it.
    """
    path = _claim_path(folder, part_name)
    if path.exists() and not _is_claimed(folder, part_name):
        path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:
            file.write(f"{platform.node()} {os.getpid()}\n")
    except FileExistsError:
        yield False
        return
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(_CLAIM_REFRESH_S):
            with suppress(FileNotFoundError):  # taken over while this worker was stopped
                os.utime(path)

    thread = threading.Thread(target=refresh, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


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
            load=lambda: load_recorded_teacher(teacher_path, section, record_path=fingerprint_path),
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


def find_order(index: TokenIndex, codec: Codec) -> TokenOrder | None:
    """Return the order of tokens that a codec writes their ids in; None where it writes them as they are."""
    if not codec.is_coded:
        return None
    order = TokenOrder.from_counts(index.read_token_counts(), vocabulary=codec.vocabulary)
    assert order.digest() == codec.order, (order.digest(), codec.order)
    return order


def build_header(
    index: TokenIndex, record: dict[str, Any], cache: Cache, *, source: Path
) -> CacheHeader:
    """Return the header of a cache; refuses tokens that another tokenizer made than the teacher's.

    Raises ValueError when the tokenizer has ids beyond the teacher's output layer, or is another one.
    """
    tokenizer = index.content["tokenizer"]
    if tokenizer["size"] > record["vocabulary"]:
        raise ValueError(
            f"the tokenizer has {tokenizer['size']} tokens, but the teacher's output layer has only "
            f"{record['vocabulary']} ({source}): they do not belong together. Leave dataset.tokenizer out to use "
            "the teacher's own."
        )
    if tokenizer["fingerprint"] != record["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"the tokens were made by tokenizer {tokenizer['fingerprint']} ({index.path}), the teacher's is "
            f"{record['tokenizer']['fingerprint']} ({source}): its distributions would belong to other tokens. "
            "Leave dataset.tokenizer out, or delete the tokens' folder if the teacher's tokenizer was changed."
        )
    counts = index.read_token_counts()
    codec = build_codec(cache, vocabulary=record["vocabulary"], token_counts=counts)
    return CacheHeader(record["weights"], tokenizer["fingerprint"], index.content["content"], codec)
