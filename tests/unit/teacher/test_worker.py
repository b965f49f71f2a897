"""Workers of the teacher's pass write the same bytes, whichever worker does a part and whatever is killed."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retort.cache.merged import merge_parts
from retort.cache.parts import (
    discard_if_merged,
    find_missing_parts,
    part_files,
    part_path,
    write_part,
)
from retort.cache.pieces import cut_pieces
from retort.cache.reader import LogitCache
from retort.cache.top_k_codec import TopKCodec
from retort.cluster.deadlines import Deadline
from retort.models.causal_lm import CausalLM
from retort.teacher.batches import batch_by_length
from retort.teacher.claims import Claims
from retort.teacher.merge import build_manifest
from retort.teacher.scoring import Scorer
from retort.teacher.worker import count_coding_threads
from retort.tokens.index import Part, TokenIndex
from support.scoring import Small, score_top_k
from support.teacher_job import After, Job, read_parts
from support.tiny import real_processes


def test_parts_decode_to_what_scoring_gives(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path, teacher: CausalLM
) -> None:
    part = job.index.parts[1]
    path = part_path(tmp_path, part.name, job.header)
    path.write_bytes(undisturbed[path.name])
    cache, table = LogitCache(path), job.index.read_part(part)
    codec = job.header.codec
    live = score_top_k(Scorer(teacher, 4), table, codec)
    bounds = table.position_offsets
    for index in range(len(table)):
        expected = live[int(bounds[index]) : int(bounds[index + 1])]
        found = cache.read_targets(index)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=5e-3)
        np.testing.assert_allclose(found.tail_logprobs, expected.tail_logprobs, atol=1e-5)


def _identity(teacher: CausalLM) -> CausalLM:
    return teacher


class DiedError(Exception):
    """The end of a worker."""


class Mortal(CausalLM):
    """A teacher whose worker dies at its (n + 1)-th batch."""

    @classmethod
    def dying_after(cls, teacher: CausalLM, batches: int) -> "Mortal":
        mortal = cls(teacher.model, teacher.head, teacher.vocabulary, is_split=teacher.is_split)
        mortal.__dict__["left"] = batches
        return mortal

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.__dict__["left"] == 0:
            raise DiedError
        self.__dict__["left"] -= 1
        return super().features(*args, **kwargs)


@pytest.mark.slow
@settings(deadline=None, max_examples=8)
@given(
    lives=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(0, 14)), max_size=4)
)
def test_any_history_of_dying_workers_leaves_the_bytes_of_one(
    lives: list[tuple[int, int, int]],
    job: Job,
    undisturbed: dict[str, bytes],
    teacher: CausalLM,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    for worker, num_workers, batches in lives:
        mortal = Mortal.dying_after(teacher, batches)
        with suppress(DiedError):
            job.work(
                folder, worker=worker, num_workers=num_workers, load=partial(_identity, mortal)
            )
        assert not list(folder.glob("*.claim"))  # no other worker has to wait until it is stale
        found = read_parts(folder)
        assert found.items() <= undisturbed.items()
    job.work(folder, worker=1, num_workers=2, load=lambda: teacher)
    assert read_parts(folder) == undisturbed


def test_a_worker_does_its_own_stripe_first_and_then_all_others(
    job: Job, teacher: CausalLM, tmp_path: Path
) -> None:
    loaded: list[CausalLM] = []

    def load() -> CausalLM:
        loaded.append(teacher)
        return teacher

    report = job.work(tmp_path, worker=4, num_workers=3, load=load)
    assert len(loaded) == 1  # once for all parts
    places = [[part.name for part in job.index.parts].index(name) for name in report.parts]
    number = len(job.index.parts)
    own = [p for p in range(number) if p % 3 == 1]
    assert places == own + [p for p in range(number) if p % 3 != 1]


def test_a_worker_that_finds_nothing_missing_does_not_load_the_teacher(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)

    def load() -> CausalLM:
        raise AssertionError("loaded")

    report = job.work(tmp_path, load=load)
    assert report.parts == [] and report.tokens == 0


def test_only_the_missing_part_is_done_again(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    for name, content in undisturbed.items():
        (tmp_path / name).write_bytes(content)
    job.part(tmp_path, 2).unlink()
    assert job.work(tmp_path, load=lambda: teacher).parts == [job.part_name(2)]
    assert read_parts(tmp_path) == undisturbed


def test_a_teacher_of_nans_stores_nothing_and_releases_its_claim(job: Job, tmp_path: Path) -> None:
    broken = job.load()
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"token 0 is nan at position 0 .* document \d+ .*The part was not saved.*float32",
    ):
        job.work(tmp_path, load=lambda: broken)
    assert read_parts(tmp_path) == {}


def work_in_a_process(job: Job, folder: Path, worker: int, num_workers: int) -> None:
    job.work(folder, worker=worker, num_workers=num_workers)


def hang_in_a_process(job: Job, folder: Path, refresh_s: float) -> None:
    def load() -> CausalLM:
        time.sleep(600)
        raise AssertionError

    job.work(folder, load=load, claims=Claims(folder, refresh_s=refresh_s))


@contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    """Run a real process, and kill it at the end of the block."""
    process = real_processes().Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.mark.slow
def test_three_processes_at_once_leave_the_bytes_of_one(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    workers = [
        real_processes().Process(target=work_in_a_process, args=(job, tmp_path, w, 3))
        for w in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert read_parts(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_living_workers_part_is_left_to_it_and_a_killed_ones_is_taken_over(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    stale_s = 1.5
    options = {"load": lambda: teacher, "claims": Claims(tmp_path, stale_s=stale_s)}
    taken = tmp_path / f"{job.part_name(0)}.claim"
    with running(hang_in_a_process, job, tmp_path, stale_s / 10) as other:
        wait_for(taken.exists)
        thread = threading.Thread(target=job.work, args=(tmp_path,), kwargs=options)
        thread.start()
        wait_for(lambda: len(list(tmp_path.glob("*.h5"))) == len(job.index.parts) - 1)
        time.sleep(1.5 * stale_s)  # the claim is stale by now, unless its owner refreshes it
        assert thread.is_alive() and taken.exists() and not job.part(tmp_path, 0).exists()
        os.kill(other.pid or 0, signal.SIGKILL)
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert read_parts(tmp_path) == undisturbed


def test_a_worker_that_comes_back_after_its_part_was_taken_over_does_no_harm(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    with Claims(tmp_path).claim(job.part_name(0)) as is_own:
        assert is_own
        os.utime(tmp_path / f"{job.part_name(0)}.claim", (0, 0))  # as if suspended for long
        job.work(tmp_path, load=lambda: teacher)
    assert read_parts(tmp_path) == undisturbed


# ---------------------------------------------------------------------------------------------------------
# Many parts, little memory, suspended workers


def test_of_ten_thousand_parts_the_missing_ones_are_found(job: Job, tmp_path: Path) -> None:
    sizes = {"shard": 0, "first": 0, "sequences": 1, "tokens": 2, "positions": 1}
    parts = tuple(Part(name=f"{place:012x}", **sizes) for place in range(10_000))
    index = TokenIndex(job.index_path, job.index.record.model_copy(update={"parts": parts}))
    files = part_files(index, tmp_path, job.header)
    assert files == [part_path(tmp_path, part.name, job.header) for part in parts]
    gone = {7, 5000, 9999}
    for place, path in enumerate(files):
        if place not in gone:
            path.touch()
    missing = find_missing_parts(index, tmp_path, job.header)
    assert missing == [(place, parts[place]) for place in sorted(gone)]
    for worker, first in ((0, 5000), (1, 7)):
        found = Claims(tmp_path).next_part(missing, worker=worker, num_workers=2)
        assert found == parts[first]


@pytest.mark.slow
def test_parts_of_halved_batches_are_counted_in_the_cache(
    job: Job, teacher: CausalLM, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    longest = max(int(job.index.read_part(part).lengths.max()) for part in job.index.parts)
    job.work(parts, load=lambda: Small.of(teacher, max_tokens=2 * longest))
    merged = tmp_path / "teacher_logits.h5"
    merge_parts(job.index, parts, job.header, merged)
    counted = build_manifest(LogitCache(merged), job.index).halved_parts
    assert counted == sum(LogitCache(path).halved_parts for path in parts.glob("*.h5")) > 0


def test_a_part_being_written_is_completed_when_the_next_part_fails(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    first = len(list(batch_by_length(job.index.read_part(job.index.parts[0]), 4)))
    with pytest.raises(DiedError):
        job.work(tmp_path, load=lambda: Mortal.dying_after(teacher, first))
    found = read_parts(tmp_path)
    assert found == {job.part(tmp_path, 0).name: undisturbed[job.part(tmp_path, 0).name]}


def test_out_of_time_from_the_start_a_worker_tries_one_part(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    report = job.work(tmp_path, load=lambda: teacher, deadline=Deadline(ask=lambda: 0.0))
    assert len(report.parts) == 1 and read_parts(tmp_path).items() <= undisturbed.items()


def test_out_of_time_a_worker_ends_between_two_parts_and_the_next_goes_on(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    deadline = After(1)
    report = job.work(tmp_path, load=lambda: teacher, deadline=deadline)
    found = read_parts(tmp_path)  # no claim and no temporary file
    assert len(found) == len(report.parts) == 2 and found.items() <= undisturbed.items()
    assert report.left == len(job.index.parts) - 2
    assert min(deadline.asked) > 0.0, "the longest part so far"
    assert job.work(tmp_path, load=lambda: teacher, deadline=After(99)).left == 0
    assert read_parts(tmp_path) == undisturbed


def test_a_deadline_that_comes_with_the_last_part_is_no_failure(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    more = len(job.index.parts) - 1
    assert job.work(tmp_path, load=lambda: teacher, deadline=After(more)).left == 0
    assert read_parts(tmp_path) == undisturbed


def test_a_part_written_after_all_were_merged_and_removed_does_not_stay(
    job: Job, teacher: CausalLM, tmp_path: Path
) -> None:
    parts, merged = tmp_path / "parts", tmp_path / "teacher_logits.h5"
    job.work(parts, load=lambda: teacher)
    part = next(parts.glob("*.h5"))
    discard_if_merged(part, merged, job.header)
    assert part.exists(), "it is not merged yet"
    merge_parts(job.index, parts, job.header, merged)
    discard_if_merged(part, merged, job.header)
    assert not part.exists()


def test_a_write_that_fails_costs_no_part_but_its_own(
    job: Job, teacher: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = write_part, list[Path]()

    def write_or_fail(path: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk failed for a moment")
        real(path, *args, **kwargs)

    monkeypatch.setattr("retort.teacher.part_queue.write_part", write_or_fail)
    with pytest.raises(OSError, match="for a moment"):
        job.work(tmp_path, load=lambda: teacher)
    assert sorted(tmp_path.iterdir()) == sorted(calls[::2]) and len(calls) == 3


def test_any_number_of_coding_threads_leaves_the_same_bytes(
    job: Job,
    undisturbed: dict[str, bytes],
    teacher: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert count_coding_threads(num_workers=1) == 1  # beside a teacher on the CPU
    names, prepare = set[str](), TopKCodec.prepare

    def watched(*args: Any, **kwargs: Any) -> Any:
        names.add(threading.current_thread().name)
        time.sleep(0.002)  # so that each of the threads gets some
        return prepare(*args, **kwargs)

    monkeypatch.setattr(TopKCodec, "prepare", watched)
    monkeypatch.setattr(cut_pieces, "__kwdefaults__", {"least": 8})
    monkeypatch.setattr("retort.teacher.worker.count_coding_threads", lambda _: 4)
    job.work(tmp_path, load=lambda: teacher)
    assert len(names) == 4 and read_parts(tmp_path) == undisturbed


def test_coding_threads_are_the_cores_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [count_coding_threads(n) for n in (1, 2, 5, 99)] == [8, 6, 2, 1]
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # its cores are its own
    assert count_coding_threads(99) == 8


def test_the_error_of_a_coding_thread_ends_the_worker_and_keeps_the_parts_before(
    job: Job,
    undisturbed: dict[str, bytes],
    teacher: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = set(map(bytes, job.index.read_part(job.index.parts[1]).keys))
    prepare = TopKCodec.prepare

    def fail(self: TopKCodec, *args: Any, key: bytes, **kwargs: Any) -> Any:
        if key in keys:
            raise RuntimeError("no memory for a part")
        return prepare(self, *args, key=key, **kwargs)

    monkeypatch.setattr(TopKCodec, "prepare", fail)
    monkeypatch.setattr("retort.teacher.worker.count_coding_threads", lambda _: 3)
    with pytest.raises(RuntimeError, match="no memory for a part"):
        job.work(tmp_path, load=lambda: teacher)
    found = read_parts(tmp_path)  # no claim and no temporary file
    assert job.part(tmp_path, 0).name in found and found.items() <= undisturbed.items()
    assert job.part(tmp_path, 1).name not in found


def test_a_worker_without_work_looks_at_claims_less_and_less_often(
    job: Job, teacher: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = list[float]()
    with Claims(tmp_path).claim(job.part_name(0)):

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 40:
                (tmp_path / f"{job.part_name(0)}.claim").unlink()  # as if its owner were gone

        monkeypatch.setattr("retort.teacher.part_queue.time.sleep", pause)
        job.work(tmp_path, load=lambda: teacher)
    assert job.part(tmp_path, 0).exists()
    idle = pauses[:40]  # then it waits for its own last part to be written
    assert idle[0] < 0.5 and idle == sorted(idle) and max(idle) == 5.0 and sum(idle) > 100


# ---------------------------------------------------------------------------------------------------------
# Workers without work


def leave_one(job: Job, undisturbed: dict[str, bytes], folder: Path) -> str:
    """Let all parts but one exist; return the name of that one."""
    for name, content in undisturbed.items():
        (folder / name).write_bytes(content)
    job.part(folder, 2).unlink()
    return job.part_name(2)


def refuse_to_load() -> CausalLM:
    raise AssertionError("loaded")


@pytest.mark.parametrize("of_a_dead_one", [False, True])
def test_one_worker_waits_for_the_last_parts_and_the_others_end(
    of_a_dead_one: bool,
    job: Job,
    undisturbed: dict[str, bytes],
    teacher: CausalLM,
    tmp_path: Path,
) -> None:
    last, waiting = leave_one(job, undisturbed, tmp_path), tmp_path / "waiting.claim"
    if of_a_dead_one:
        waiting.write_text(f"{os.uname().nodename} 999999999\n")
    reports = []
    with Claims(tmp_path) as elsewhere, elsewhere.claim(last) as is_own:
        assert is_own
        waiter = threading.Thread(
            target=lambda: reports.append(job.work(tmp_path, load=lambda: teacher))
        )
        waiter.start()
        mine = f"{os.uname().nodename} {os.getpid()}\n"
        while not waiting.exists() or waiting.read_text() != mine:
            time.sleep(0.02)
        for worker in (1, 2):
            report = job.work(tmp_path, worker=worker, num_workers=3, load=refuse_to_load)
            assert (report.parts, report.left) == ([], 0)
        assert waiter.is_alive() and not reports
    waiter.join()  # the one that had the part has gone without it
    assert reports[0].parts == [last]
    assert read_parts(tmp_path) == undisturbed, "and no claim is left"


def test_a_worker_ends_its_own_parts_before_it_leaves_the_rest_to_another(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    claims = Claims(tmp_path)
    with claims, claims.claim(job.part_name(2)), claims.claim("waiting"):
        report = job.work(tmp_path, load=lambda: teacher)
    assert sorted(report.parts) == sorted(
        part.name for part in job.index.parts if part.name != job.part_name(2)
    )
    assert read_parts(tmp_path).items() < undisturbed.items()
