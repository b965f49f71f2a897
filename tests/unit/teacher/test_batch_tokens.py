"""batch_tokens: batches of at most so many tokens; `auto` is found once for a cache, and is in its parts' names."""

import json
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retort.cache.parts import find_missing_parts, part_path
from retort.cache.reader import LogitCache
from retort.config.load import identity
from retort.models.causal_lm import CausalLM
from retort.teacher import batch_tokens, worker
from retort.teacher.batch_tokens import agree_on_batch_tokens, find_batch_tokens
from retort.teacher.batches import batch_by_length
from retort.teacher.merge import merge_h5
from retort.teacher.records import BATCH_FILE, BatchTokens
from retort.teacher.worker import generate_logits
from support.jobs import make_job
from support.scoring import Small, make_codec, random_table
from support.sections import section
from support.teacher_job import Job, read_parts
from support.tiny import NUM_TOKENS, WIDTH, real_processes


@pytest.mark.parametrize("most", [1, 40, 90, 100_000])
def test_batches_have_at_most_so_many_tokens_and_every_sequence_once(most: int) -> None:
    table = random_table([40, 2, 17, 40, 39, 3, 17, 2, 36] * 3)
    batches = list(batch_by_length(table, 1, batch_tokens=most))
    indices = np.concatenate([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == list(range(len(table)))
    assert (np.diff(table.lengths[indices]) <= 0).all()
    assert all(b.padded_size <= most or len(b.indices) == 1 for b in batches)
    widths = [int(table.lengths[b.indices].max()) for b in batches]
    for batch, after, width in zip(batches, batches[1:], widths, strict=False):
        is_full = batch.padded_size + width > most
        assert is_full or table.lengths[after.indices].max() < 0.875 * width


def test_another_number_is_another_cache() -> None:
    default = identity(section("teacher.generation"))
    ids = [identity(section("teacher.generation", batch_tokens=n)) for n in (None, 8, 9, "auto")]
    assert ids[0] == default and len({json.dumps(found) for found in ids}) == 4


@pytest.mark.parametrize(
    ("memory", "expected"), [(10**6, 2048), (700, 512), (2 * 30, 64), (30, 32)]
)
def test_an_estimate_is_halved_until_memory_suffices(
    memory: int, expected: int, teacher: CausalLM
) -> None:
    small = Small.of(teacher, max_tokens=memory)
    found = find_batch_tokens(small, make_codec(6, WIDTH), longest=30, num_tokens=NUM_TOKENS)
    assert found.batch_tokens == expected and found.device.startswith("cpu")
    assert ("memory ran out" in found.reason) == (expected < 2048)
    assert max(small.__dict__["tried"]) == 2048 // 30 * 30
    assert found.batch_tokens // 30 * 30 <= memory


def test_one_sequence_is_read_however_long(teacher: CausalLM) -> None:
    found = find_batch_tokens(teacher, make_codec(6, WIDTH), longest=5000, num_tokens=NUM_TOKENS)
    assert found.batch_tokens == 5000


def test_on_a_gpu_the_estimate_follows_from_its_free_memory(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = Small.of(teacher, max_tokens=10**9)
    monkeypatch.setattr(Small, "device", torch.device("cuda"))
    monkeypatch.setattr(
        Small, "devices", {torch.device("cuda:0"), torch.device("cuda:1")}, raising=True
    )
    taken, found = batch_tokens._count_bytes(on_gpu), []
    for tokens in (100, 20_000, 10**6):
        free = tokens * taken  # on the fullest; of it 80 % are used
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu, f=free: (f + gpu.index, f))
        found.append(batch_tokens._estimate(on_gpu, 16))
    assert [number for number, _ in found] == [64, 8192, 1 << 16]
    assert all(reason.endswith("GB were free on the fullest GPU") for _, reason in found)


def _record(number: int) -> BatchTokens:
    return BatchTokens(batch_tokens=number, device="cpu", reason="a test")


def _agree(folder: Path, barrier: Barrier, number: int, found: Any) -> None:
    def find() -> BatchTokens:
        barrier.wait()
        return _record(number)

    found.put(agree_on_batch_tokens(folder, find))


@pytest.mark.slow
def test_workers_that_start_together_agree(tmp_path: Path) -> None:
    processes = real_processes()
    barrier, found = processes.Barrier(3), processes.Queue()
    workers = [
        processes.Process(target=_agree, args=(tmp_path, barrier, number, found))
        for number in (100, 200, 300)
    ]
    for process in workers:
        process.start()
    numbers = {found.get(timeout=60) for _ in workers}
    for process in workers:
        process.join()
    assert len(numbers) == 1 and numbers < {100, 200, 300}
    assert [path.name for path in tmp_path.iterdir()] == [BATCH_FILE]


def test_what_is_recorded_stays_and_an_edit_is_refused(tmp_path: Path) -> None:
    assert agree_on_batch_tokens(tmp_path, lambda: _record(64)) == 64
    assert agree_on_batch_tokens(tmp_path, lambda: _record(128)) == 64
    path = tmp_path / BATCH_FILE
    path.write_text(path.read_text().replace("64", "65"))
    with pytest.raises(ValueError, match="was edited"):
        agree_on_batch_tokens(tmp_path, lambda: _record(128))


def test_a_file_system_without_links_is_an_error_that_says_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    with pytest.raises(ValueError, match=r"no hard links.*batch_tokens: 64"):
        agree_on_batch_tokens(tmp_path, lambda: _record(64))
    assert list(tmp_path.iterdir()) == []


def _job(job: Job, number: int | str) -> Any:
    teacher = section(
        "teacher",
        model_path=job.teacher_path,
        device="cpu",
        generation={"batch_tokens": number},
    )
    return make_job(teacher=teacher, cache=job.cache)


def _generate(job: Job, folder: Path, number: int | str) -> None:
    generate_logits(
        folder / "metadata_worker0.json",
        _job(job, number),
        index_path=job.index_path,
        fingerprint_path=job.fingerprint,
        worker=0,
        num_workers=1,
    )


class KilledError(BaseException):
    """The end of a worker."""


@pytest.mark.slow
def test_a_worker_killed_after_recording_leaves_the_cache_of_that_number(
    job: Job, teacher: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = job.index.record.train.longest

    def load(*_: Any, **__: Any) -> CausalLM:
        return Small.of(teacher, max_tokens=3 * longest)

    def die(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as first:
        first.setattr(worker, "load_recorded_teacher", load)
        first.setattr(worker, "run_worker", die)
        with pytest.raises(KilledError):
            _generate(job, tmp_path, "auto")
    assert [path.name for path in tmp_path.iterdir()] == [BATCH_FILE]
    recorded = BatchTokens.read(tmp_path / BATCH_FILE).batch_tokens
    assert longest < recorded <= 3 * longest + longest
    # The device has memory for more now, but the record stays.
    monkeypatch.setattr(worker, "find_batch_tokens", die)
    _generate(job, tmp_path, "auto")
    header = replace(job.header, batch_tokens=recorded)
    parts = tmp_path / "parts"
    assert find_missing_parts(job.index, parts, header) == []
    assert len(find_missing_parts(job.index, parts, job.header)) == len(job.index.parts)
    _generate(job, tmp_path / "given", recorded)
    given = read_parts(tmp_path / "given" / "parts")
    for part in job.index.parts:
        mine = part_path(parts, part.name, header).read_bytes()
        assert mine == given[part_path(parts, part.name, job.header).name]
    _merge(job, tmp_path)
    assert len(LogitCache(tmp_path / "teacher_logits.h5")) > 0 and not parts.exists()


def test_parts_of_another_number_are_never_merged(job: Job, tmp_path: Path) -> None:
    _record(64).write_once(tmp_path / BATCH_FILE)
    _generate(job, tmp_path, "auto")
    (tmp_path / BATCH_FILE).unlink()
    _record(128).write_once(tmp_path / BATCH_FILE)
    with pytest.raises(ValueError, match="parts cannot be merged"):
        _merge(job, tmp_path)
    _generate(job, tmp_path, "auto")
    _merge(job, tmp_path)


def _merge(job: Job, folder: Path) -> None:
    merge_h5(
        folder / "manifest.json",
        _job(job, "auto"),
        index_path=job.index_path,
        fingerprint_path=job.fingerprint,
        features_path=None,
    )
