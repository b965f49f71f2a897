"""GPU groups and leases, with pretend ids: no GPU is needed, the locks and processes are real."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.config import Generation, load_runs
from retort.gpus import (
    count_workers,
    describe_machine,
    detect_gpus,
    lease,
    lease_teacher,
    lease_training,
    parse_groups,
)

EIGHT = tuple("01234567")


def make_generation(**keys: Any) -> Generation:
    raw = {
        "student": {"config": "student.json"},
        "teacher": {"model_path": "models/teacher"},
        "dataset": {"name": "json", "data_files": "corpus.jsonl"},
    }
    generation = next(iter(load_runs(raw).values())).teacher.generation
    return replace(generation, **keys)


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path))
    yield


# --- Groups


@pytest.mark.parametrize(("per_model", "groups"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_eight_gpus_make_whole_groups(per_model: int, groups: int) -> None:
    found = parse_groups(None, gpus_per_model=per_model, detected=EIGHT)
    assert len(found.groups) == groups
    assert [g for group in found.groups for g in group] == list(EIGHT)
    assert found.left_over == ()


def test_only_the_listed_gpus_are_used() -> None:
    found = parse_groups("1,3,5,7", gpus_per_model=2, detected=EIGHT)
    assert found.groups == (("1", "3"), ("5", "7"))


def test_uneven_groups_are_taken_as_written() -> None:
    found = parse_groups(("0", "1", "2,3"), gpus_per_model=1, detected=EIGHT)
    assert found.groups == (("0",), ("1",), ("2", "3"))


def test_a_remainder_is_kept_apart_and_said() -> None:
    seven = EIGHT[:7]
    assert parse_groups(None, gpus_per_model=2, detected=seven).left_over == ("6",)
    table = describe_machine(make_generation(gpus_per_model=2), detected=seven)
    assert "In no group" in table
    assert "6" in table


@given(count=st.integers(1, 16), per_model=st.integers(1, 16))
def test_groups_are_disjoint_and_full(count: int, per_model: int) -> None:
    ids = tuple(str(i) for i in range(count))
    if count < per_model:
        with pytest.raises(ValueError, match=f"gpus_per_model is {per_model}, but .* {count} GPUs"):
            parse_groups(None, gpus_per_model=per_model, detected=ids)
        return
    found = parse_groups(None, gpus_per_model=per_model, detected=ids)
    used = [g for group in found.groups for g in group]
    assert len(set(used)) == len(used)
    assert {len(group) for group in found.groups} == {per_model}
    assert sorted([*used, *found.left_over]) == sorted(ids)


def test_without_gpus_there_is_no_group_even_when_some_are_listed() -> None:
    assert parse_groups("0,1", gpus_per_model=1, detected=()).groups == ()
    assert "CPU" in describe_machine(make_generation(), detected=())


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"lists GPU 9, but this machine has 0, 1"):
        parse_groups("0,9", gpus_per_model=1, detected=("0", "1"))


def test_a_gpu_in_two_groups_is_named() -> None:
    with pytest.raises(ValueError, match="lists GPU 1 twice"):
        parse_groups(("0,1", "1"), gpus_per_model=1, detected=EIGHT)


def test_the_number_of_workers_is_the_config_s_then_the_groups_then_one() -> None:
    assert count_workers(make_generation(num_workers=5), detected=EIGHT) == 5
    assert count_workers(make_generation(gpus_per_model=2), detected=EIGHT) == 4
    assert count_workers(make_generation(), detected=()) == 1
    # Listed groups count as listed on any machine: a login node plans what the compute node runs.
    for detected in ((), ("0",), EIGHT):
        assert (
            count_workers(make_generation(gpus="0,1,2,3", gpus_per_model=2), detected=detected) == 2
        )


# --- Detection


def write_nvidia_smi(folder: Path, body: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)


def test_visible_devices_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert detect_gpus() == ("2", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_gpus() == ()


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_gpus() == ()
    write_nvidia_smi(tmp_path, "printf '0\\n1\\n'")
    assert detect_gpus() == ("0", "1")


def test_a_broken_driver_is_an_error_not_a_cpu_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'Failed to initialize NVML: version mismatch'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="version mismatch"):
        detect_gpus()


# --- Leases


def test_a_lease_shows_its_gpus_and_restores_what_was_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    generation = make_generation(gpus_per_model=2)
    with lease_teacher(generation, worker=1, say=print) as held:
        assert held == ("2", "3")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_worker_takes_another_group_when_its_own_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lease_teacher(make_generation(), worker=0, say=print) as first:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with lease_teacher(make_generation(), worker=0, say=print) as second:
            assert {first, second} == {("0",), ("1",)}


def test_training_holds_as_many_as_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with lease_training(2, say=print) as held:
        assert held == ("4", "5")
    with pytest.raises(ValueError, match=r"training.gpus is 4, but this machine has 3"):
        lease_training(4, say=print).__enter__()


def test_a_scheduler_s_assignment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    with lease_teacher(make_generation(), worker=0, say=print) as held:
        assert held == ()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_whoever_is_killed_frees_its_gpus_at_once(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, [["0", "1"]], seconds=60)
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("held")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with lease([["1"]], folder=tmp_path, say=print):
        assert time.monotonic() - started < 5


def start_holder(folder: Path, candidates: list[list[str]], *, seconds: float) -> Any:
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from retort.gpus import lease
        with lease({candidates!r}, folder=Path({str(folder)!r}), say=lambda _: None) as held:
            print("held", *held, time.monotonic(), flush=True)
            time.sleep({seconds})
            print("freed", time.monotonic(), flush=True)
    """)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_jobs_of_all_sizes_never_share_a_gpu_and_all_finish_despite_kills(tmp_path: Path) -> None:
    chance = random.Random(7)
    jobs = []
    for number in range(24):
        size = chance.choice([1, 1, 2, 4, 8])
        groups = [list(EIGHT[i : i + size]) for i in range(0, 8, size)]
        chance.shuffle(groups)
        jobs.append(start_holder(tmp_path, groups, seconds=0.05 + 0.1 * chance.random()))
        if number % 6 == 5:
            jobs[number - 2].kill()
    held: list[tuple[float, float, set[str]]] = []
    for job in jobs:
        said, _ = job.communicate(timeout=60)
        lines = [line.split() for line in said.splitlines()]
        if len(lines) == 2:
            (_, *gpus, since), (_, until) = lines
            held.append((float(since), float(until), set(gpus)))
    assert len(held) >= 20
    for index, (since, until, gpus) in enumerate(held):
        for other_since, other_until, other in held[index + 1 :]:
            overlap = since < other_until and other_since < until
            assert not (overlap and gpus & other)
