"""GPU groups and leases, with pretend ids: no GPU is needed, the locks and processes are real."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
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


def test_a_uuid_is_an_id_and_is_not_compared_with_an_index() -> None:
    assert parse_groups("GPU-89f", gpus_per_model=1, detected=("0", "1")).groups == (("GPU-89f",),)
    assert parse_groups("GPU-89f", gpus_per_model=1, detected=("GPU-89f932",)).groups
    with pytest.raises(ValueError, match="lists GPU GPU-71"):
        parse_groups("GPU-71", gpus_per_model=1, detected=("GPU-89f932",))


def test_gpus_are_counted_only_when_their_number_matters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'driver not loaded'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert count_workers(make_generation(num_workers=4)) == 4
    assert count_workers(make_generation(gpus="0,1,2,3")) == 4
    with pytest.raises(
        ValueError, match=r"driver not loaded.*set teacher\.generation\.num_workers"
    ):
        count_workers(make_generation())


def test_a_scheduler_s_assignment_is_described_whatever_the_config_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")
    table = describe_machine(make_generation(gpus="0,1,2,3"), detected=detect_gpus())
    assert "GPU groups          [6]" in table


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


def test_a_driver_without_a_gpu_is_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_nvidia_smi(tmp_path, "echo 'No devices were found'; exit 6")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert detect_gpus() == ()


def test_an_answer_that_is_no_list_of_gpus_is_a_broken_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "echo 'Unable to determine the device handle: Unknown Error'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="Unable to determine the device handle"):
        detect_gpus()


def test_a_slurm_job_that_was_given_no_gpu_does_not_take_those_of_its_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvidia_smi(tmp_path, "printf '0\\n1\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert detect_gpus() == ("0", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert detect_gpus() == ()


@pytest.mark.parametrize(("text", "ids"), [("0,-1,1", ("0",)), ("-1", ()), ("NoDevFiles", ())])
def test_visible_devices_end_where_cuda_ends_them(
    monkeypatch: pytest.MonkeyPatch, text: str, ids: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert detect_gpus() == ids


# --- Leases


class WouldWaitError(Exception):
    """Raised by a lease's `say`: the lease would wait."""


def refuse_to_wait(_: str) -> None:
    raise WouldWaitError


@pytest.mark.parametrize(
    "groups", ["0|1|2|3|4|5|6|7", "0,1|2,3|4,5|6,7", "0,1,2,3|4,5,6,7", "0|1|2,3", "1,3|5,7"]
)
def test_workers_hold_all_groups_once_and_one_more_waits_and_leaves_nothing_held(
    groups: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.gpus._SAY_WAITING_S", 0.0)
    candidates = [group.split(",") for group in groups.split("|")]
    ids = [gpu for group in candidates for gpu in group]
    with ExitStack() as stack:
        held = [
            stack.enter_context(lease(candidates, folder=tmp_path, say=refuse_to_wait))
            for _ in candidates
        ]
        assert sorted(gpu for group in held for gpu in group) == sorted(ids)
        with (
            pytest.raises(WouldWaitError),
            lease([ids], count=1, folder=tmp_path, say=refuse_to_wait),
        ):
            pass
    with lease([ids], folder=tmp_path, say=refuse_to_wait) as everything:
        assert everything == tuple(ids)


def test_a_group_that_is_partly_taken_is_not_held_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.gpus._SAY_WAITING_S", 0.0)
    with lease([["2"]], folder=tmp_path, say=refuse_to_wait):
        with (
            pytest.raises(WouldWaitError),
            lease([["0", "1", "2"]], folder=tmp_path, say=refuse_to_wait),
        ):
            pass
        with lease([["0", "1"]], folder=tmp_path, say=refuse_to_wait) as held:
            assert held == ("0", "1")


def test_training_takes_free_gpus_that_do_not_stand_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("retort.gpus._SAY_WAITING_S", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with (
        lease([["1"]], folder=tmp_path, say=refuse_to_wait),
        lease([["3"]], folder=tmp_path, say=refuse_to_wait),
        lease_training(2, say=refuse_to_wait) as held,
    ):
        assert held == ("0", "2")


def test_what_runs_on_the_cpu_holds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lease_teacher(make_generation(), worker=0, device="cpu", say=print) as held:
        assert held == ()
    with lease_training(1, device="cpu", say=print) as held:
        assert held == ()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


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


def test_a_scheduler_s_assignment_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with lease_teacher(make_generation(), worker=0, say=print) as held:
        assert held == ()
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    generation = make_generation(gpus="0,1,2,3", gpus_per_model=2)
    with lease_teacher(generation, worker=3, say=print) as held:
        assert held == ("6", "7")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
        monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job's "6" is another GPU
        with lease_teacher(generation, worker=3, say=print) as other:
            assert other == ("6", "7")


def test_a_workflow_inside_one_allocation_shares_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with ExitStack() as stack:
        held = []
        for worker in range(3):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # what a new process sees
            lease_of_worker = lease_teacher(make_generation(), worker=worker, say=print)
            held.append(stack.enter_context(lease_of_worker))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        held.append(stack.enter_context(lease_training(1, say=print)))
    assert held == [("0",), ("1",), ("2",), ("3",)]


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
    """24 processes on 8 ids; 6 of them hang while they hold and are killed. Each also takes a lock of its own on
    every GPU that it was given: were one given twice, that would fail."""
    chance = random.Random(7)
    sizes = [1, 2, 4, 1, 2, 8] * 4
    jobs = [
        start_job(tmp_path, size, hangs=number % 4 == 1, seed=chance.randrange(2**16))
        for number, size in enumerate(sizes)
    ]
    killed: set[int] = set()
    deadline = time.monotonic() + 40  # about 6 s alone
    while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        for number, job in enumerate(jobs):
            if (
                number % 4 == 1
                and number not in killed
                and (tmp_path / f"hangs-{job.pid}").exists()
            ):
                job.kill()
                killed.add(number)
        time.sleep(0.02)
    unfinished = [job.pid for job in jobs if job.poll() is None]
    for job in jobs:
        job.kill()
        job.wait()
    assert not unfinished
    assert len(killed) == 6
    assert [job.returncode for n, job in enumerate(jobs) if n not in killed] == [0] * 18
    with lease([EIGHT], folder=tmp_path, say=refuse_to_wait) as held:
        assert held == EIGHT


def start_job(folder: Path, size: int, *, hangs: bool, seed: int) -> "subprocess.Popen[bytes]":
    program = textwrap.dedent(f"""
        import fcntl, os, random, time
        from pathlib import Path
        from retort import gpus
        gpus._POLL_S = 0.05
        folder, ids, chance = Path({str(folder)!r}), {list(EIGHT)!r}, random.Random({seed})
        # Opened before the lease: a killed process closes its files in order, and this one must go first.
        own = {{i: open(folder / f"own-{{i}}", "a") for i in ids}}
        groups = [ids[i : i + {size}] for i in range(0, 8, {size})]
        chance.shuffle(groups)
        any_of = chance.random() < 0.5
        with gpus.lease([ids] if any_of else groups, count={size}, folder=folder, say=lambda _: None) as held:
            assert len(held) == {size}
            for i in held:
                fcntl.flock(own[i], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if {hangs}:
                (folder / f"hangs-{{os.getpid()}}").touch()
                time.sleep(600)
            time.sleep(0.02 + 0.05 * chance.random())
            for i in held:
                fcntl.flock(own[i], fcntl.LOCK_UN)
    """)
    return subprocess.Popen([sys.executable, "-c", program])
