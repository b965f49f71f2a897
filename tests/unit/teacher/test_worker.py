"""Workers of the teacher's pass: the same bytes whoever did the work, whatever was killed."""

import errno
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retort.cache.codec import build_codec
from retort.cache.merged import merge_parts
from retort.cache.parts import (
    build_header,
    discard_if_merged,
    find_missing_parts,
    part_files,
    part_path,
)
from retort.cache.reader import CacheHeader, LogitCache
from retort.cluster.deadlines import RESUMABLE, Deadline
from retort.io.files import read_json, write_json
from retort.models.load import CausalLM, load_recorded_teacher, load_teacher
from retort.teacher import claims
from retort.teacher import worker as workers
from retort.teacher.claims import Claims, next_part
from retort.teacher.merge import describe_cache
from retort.teacher.scoring import Scorer, batch_by_length, score_part
from retort.teacher.worker import WorkerReport, generate_logits, run_worker
from retort.tokens.index import TokenIndex
from support.tiny import NUM_TOKENS, WIDTH, real_processes, record, section, tokenize
from unit.teacher.test_scoring import Small


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> CausalLM:
    return load_teacher(str(tiny_teacher), section("teacher", device="cpu"))


class Job:
    """The tiny corpus' parts of work, and what a worker needs to do them."""

    def __init__(self, folder: Path, corpus: Path, teacher_path: Path) -> None:
        self.index_path = tokenize(folder / "tokens", corpus, teacher_path)
        self.fingerprint = record(folder, teacher_path)
        self.teacher_path = str(teacher_path)
        self.index = TokenIndex.read(self.index_path)
        self.cache = section("cache", top_k=8)
        self.header = build_header(
            self.index, read_json(self.fingerprint), self.cache, source=self.fingerprint
        )

    def load(self) -> CausalLM:
        return load_recorded_teacher(
            self.teacher_path, section("teacher", device="cpu"), record_path=self.fingerprint
        )

    def work(
        self,
        folder: Path,
        *,
        worker: int = 0,
        num_workers: int = 1,
        load: Callable[[], CausalLM] | None = None,
        deadline: Deadline | None = None,
    ) -> WorkerReport:
        torch.set_num_threads(1)
        return run_worker(
            self.index,
            folder,
            self.header,
            worker=worker,
            num_workers=num_workers,
            batch_size=4,
            load=load or self.load,
            deadline=deadline,
        )

    def part_name(self, place: int) -> str:
        name: str = self.index.parts[place]["name"]
        return name

    def part(self, folder: Path, place: int) -> Path:
        return part_path(folder, self.part_name(place), self.header)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_teacher: Path) -> Job:
    job = Job(tmp_path_factory.mktemp("job"), tiny_corpus, tiny_teacher)
    assert len(job.index.parts) >= 5
    return job


def read_parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes: the parts' bytes by file name."""
    folder = tmp_path_factory.mktemp("parts")
    report = job.work(folder)
    assert sorted(report.parts) == sorted(part["name"] for part in job.index.parts)
    assert report.tokens == job.index.content["train"]["tokens"]
    found = read_parts(folder)
    assert len(found) == len(job.index.parts)  # and neither a claim nor a temporary file
    return found


def test_parts_decode_to_what_scoring_gives(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path, teacher: CausalLM
) -> None:
    part = job.index.parts[1]
    path = part_path(tmp_path, part["name"], job.header)
    path.write_bytes(undisturbed[path.name])
    cache, table = LogitCache(path), job.index.read_part(part)
    codec = job.header.codec
    live = score_part(Scorer(teacher, 4), table, codec, num_tokens=NUM_TOKENS).targets
    bounds = table.position_offsets
    for index in range(len(table)):
        expected = live[int(bounds[index]) : int(bounds[index + 1])]
        found = cache.read_targets(index)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=5e-3)
        np.testing.assert_allclose(found.tail_logprobs, expected.tail_logprobs, atol=1e-5)


class DiedError(Exception):
    """A worker's end."""


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
            job.work(folder, worker=worker, num_workers=num_workers, load=lambda m=mortal: m)
        assert not list(folder.glob("*.claim"))  # others need not wait for it to go stale
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
    places = [[part["name"] for part in job.index.parts].index(name) for name in report.parts]
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
    sick = job.load()
    with torch.no_grad():
        sick.model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(
        ValueError,
        match=r"token 0 is nan at position 0 .* document \d+ .*Nothing of the part was stored.*float32",
    ):
        job.work(tmp_path, load=lambda: sick)
    assert read_parts(tmp_path) == {}


def work_in_a_process(job: Job, folder: Path, worker: int, num_workers: int) -> None:
    job.work(folder, worker=worker, num_workers=num_workers)


def hang_in_a_process(job: Job, folder: Path, refresh_s: float) -> None:
    claims._CLAIM_REFRESH_S = refresh_s

    def load() -> CausalLM:
        time.sleep(600)
        raise AssertionError

    job.work(folder, load=load)


@contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    """Run a real process; kill it at the end at the latest."""
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
        assert time.monotonic() < deadline, "waited in vain"
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
    job: Job,
    undisturbed: dict[str, bytes],
    teacher: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stale_s = 1.5
    monkeypatch.setattr(claims, "_CLAIM_STALE_S", stale_s)
    taken = tmp_path / f"{job.part_name(0)}.claim"
    with running(hang_in_a_process, job, tmp_path, stale_s / 10) as other:
        wait_for(taken.exists)
        mine = threading.Thread(target=job.work, args=(tmp_path,), kwargs={"load": lambda: teacher})
        mine.start()
        wait_for(lambda: len(list(tmp_path.glob("*.h5"))) == len(job.index.parts) - 1)
        time.sleep(1.5 * stale_s)  # the claim has grown old by now, but for its owner's refreshing
        assert mine.is_alive() and taken.exists() and not job.part(tmp_path, 0).exists()
        os.kill(other.pid or 0, signal.SIGKILL)
        mine.join(timeout=60)
        assert not mine.is_alive()
    assert read_parts(tmp_path) == undisturbed


def test_a_worker_that_comes_back_after_its_part_was_taken_over_does_no_harm(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    with Claims(tmp_path).claim(job.part_name(0)) as is_mine:
        assert is_mine
        os.utime(tmp_path / f"{job.part_name(0)}.claim", (0, 0))  # stopped for long
        job.work(tmp_path, load=lambda: teacher)
    assert read_parts(tmp_path) == undisturbed


def test_of_two_workers_one_gets_the_claim(tmp_path: Path) -> None:
    with (
        Claims(tmp_path).claim("part") as first,
        Claims(tmp_path).claim("part") as second,
    ):
        assert first and not second
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# The rule's work, and what it refuses


def run_rule(
    job: Job,
    receipt: Path,
    *,
    worker: int = 0,
    num_workers: int = 1,
) -> None:
    generate_logits(
        receipt,
        index_path=job.index_path,
        teacher_path=job.teacher_path,
        fingerprint_path=job.fingerprint,
        section=section("teacher", device="cpu", generation={"batch_size": 4}),
        cache=job.cache,
        worker=worker,
        num_workers=num_workers,
    )


def test_receipt_says_who_did_what_with_which_gpus(
    job: Job,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    run_rule(job, tmp_path / "metadata_worker1.json", worker=1, num_workers=2)
    assert caplog.messages[0] == "Worker 1/2  CUDA_VISIBLE_DEVICES: 4,5"
    receipt = read_json(tmp_path / "metadata_worker1.json")
    assert (receipt["worker"], receipt["num_workers"]) == (1, 2)
    assert receipt["tokens"] == job.index.content["train"]["tokens"]
    assert len(receipt["parts_done"]) == len(job.index.parts)
    assert receipt["run"]["config"]["top_k"] == 8
    assert read_parts(tmp_path / "parts") == undisturbed
    run_rule(job, tmp_path / "metadata_worker0.json")
    assert caplog.messages[-1].startswith("worker 0: 0 parts")


def test_a_merged_cache_means_nothing_to_do(
    job: Job, undisturbed: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "parts").mkdir()
    for name, content in undisturbed.items():
        (tmp_path / "parts" / name).write_bytes(content)
    merge_parts(job.index, tmp_path / "parts", job.header, tmp_path / "teacher_logits.h5")
    run_rule(job, tmp_path / "metadata_worker0.json")
    assert "nothing to do" in caplog.text


def test_header_names_teacher_tokenizer_tokens_and_codec(job: Job) -> None:
    content = read_json(job.fingerprint)
    expected = CacheHeader(
        content["weights"],
        content["tokenizer"]["fingerprint"],
        job.index.content["content"],
        build_codec(job.cache, vocabulary=WIDTH),
    )
    assert job.header == expected


def test_a_tokenizer_with_ids_beyond_the_output_layer_is_refused_with_both_numbers(
    job: Job, tmp_path: Path
) -> None:
    narrow = read_json(job.fingerprint) | {"vocabulary": NUM_TOKENS - 1}
    with pytest.raises(ValueError, match=r"has 300 tokens.*has only 299.*dataset\.tokenizer"):
        build_header(job.index, narrow, job.cache, source=tmp_path)
    exact = narrow | {"vocabulary": NUM_TOKENS}
    assert build_header(job.index, exact, job.cache, source=tmp_path).codec.vocabulary == NUM_TOKENS


def test_tokens_of_another_tokenizer_are_refused(job: Job, tmp_path: Path) -> None:
    other = read_json(job.fingerprint)
    other["tokenizer"]["fingerprint"] = "0123456789ab"
    write_json(tmp_path / "fingerprint.json", other)
    with pytest.raises(
        ValueError, match=r"teacher's is 0123456789ab.*would belong to other tokens"
    ):
        build_header(job.index, other, job.cache, source=tmp_path / "fingerprint.json")


# ---------------------------------------------------------------------------------------------------------
# Many parts, little memory, stopped workers


def test_of_ten_thousand_parts_the_missing_ones_are_found(job: Job, tmp_path: Path) -> None:
    parts = [{"name": f"{place:012x}"} for place in range(10_000)]
    index = TokenIndex(job.index_path, {"parts": parts})
    files = part_files(index, tmp_path, job.header)
    assert files == [part_path(tmp_path, part["name"], job.header) for part in parts]
    gone = {7, 5000, 9999}
    for place, path in enumerate(files):
        if place not in gone:
            path.touch()
    missing = find_missing_parts(index, tmp_path, job.header)
    assert missing == [(place, parts[place]) for place in sorted(gone)]
    for worker, first in ((0, 5000), (1, 7)):
        found = next_part(missing, tmp_path, worker=worker, num_workers=2)
        assert found == (first, parts[first])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_a_teacher_that_does_not_fit_is_one_sentence(
    error: RuntimeError, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> CausalLM:
        raise error

    monkeypatch.setattr("retort.teacher.worker.load_recorded_teacher", load)
    with pytest.raises(ValueError, match=r"does not fit .*gpus_per_model, now 1.*dtype"):
        run_rule(job, tmp_path / "metadata_worker0.json")


def test_a_worker_that_wakes_leaves_the_claim_of_who_took_over(tmp_path: Path) -> None:
    with Claims(tmp_path).claim("part") as is_mine:
        assert is_mine
        taken_over = tmp_path / "part.claim"
        taken_over.write_text("another-node 17\n")
    assert taken_over.read_text() == "another-node 17\n"


@pytest.mark.slow
def test_parts_of_halved_batches_are_counted_in_the_cache(
    job: Job, teacher: CausalLM, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    longest = max(int(job.index.read_part(part).lengths.max()) for part in job.index.parts)
    job.work(parts, load=lambda: Small.of(teacher, room=2 * longest))
    merged = tmp_path / "teacher_logits.h5"
    merge_parts(job.index, parts, job.header, merged)
    counted = describe_cache(LogitCache(merged), job.index)["halved_parts"]
    assert counted == sum(LogitCache(path).halved_parts for path in parts.glob("*.h5")) > 0


def test_whatever_is_written_behind_is_written_when_the_next_part_fails(
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


class After(Deadline):
    """A deadline that comes after some looks at it."""

    def __init__(self, looks: int) -> None:
        super().__init__(ask=lambda: None)
        self.looks, self.asked = looks, list[float]()

    def forbids(self, seconds: float) -> bool:
        self.asked.append(seconds)
        return len(self.asked) > self.looks


def test_out_of_time_a_worker_ends_between_two_parts_and_the_next_goes_on(
    job: Job, undisturbed: dict[str, bytes], teacher: CausalLM, tmp_path: Path
) -> None:
    deadline = After(1)
    report = job.work(tmp_path, load=lambda: teacher, deadline=deadline)
    found = read_parts(tmp_path)  # and neither a claim nor a temporary file
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


def test_out_of_time_the_rule_leaves_no_receipt_and_says_so(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retort.teacher.worker.Deadline", lambda: After(0))
    with pytest.raises(SystemExit) as ended:
        run_rule(job, tmp_path / "metadata_worker0.json")
    assert ended.value.code == RESUMABLE
    told = caplog.messages[-1]
    assert re.search(r"stopped before the job's time limit: \d+ of \d+ parts .* to resume", told)
    assert not (tmp_path / "metadata_worker0.json").exists()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe torn", b"", b"node 99999999999999999999", "node \u00b2".encode()]
)
def test_a_claim_that_is_no_claim_ages_like_any_other(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part.claim"
    path.write_bytes(content.replace(b"node", platform.node().encode()))
    assert claims.is_claimed(tmp_path, "part")
    os.utime(path, (0, 0))
    with Claims(tmp_path).claim("part") as is_mine:
        assert is_mine


def test_a_dead_nodes_claim_from_the_future_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "part.claim"
    path.write_text("another-node 17\n")
    for hours, is_claimed in ((0, True), (3, False), (-3, False)):
        written = time.time() + 3600 * hours
        os.utime(path, (written, written))
        assert claims.is_claimed(tmp_path, "part") == is_claimed
    with Claims(tmp_path).claim("part") as is_mine:
        assert is_mine


def test_in_a_folder_that_was_merged_and_removed_nothing_is_claimed(tmp_path: Path) -> None:
    gone = tmp_path / "parts"
    assert not claims.is_claimed(gone, "part")
    with Claims(gone).claim("part") as is_mine:
        assert not is_mine


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
    real, calls = workers.write_part, list[Path]()

    def write_part(path: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk failed for a moment")
        real(path, *args, **kwargs)

    monkeypatch.setattr(workers, "write_part", write_part)
    with pytest.raises(OSError, match="for a moment"):
        job.work(tmp_path, load=lambda: teacher)
    assert sorted(tmp_path.iterdir()) == sorted(calls[::2]) and len(calls) == 3
