"""Leases, with simulated GPU ids and real locks and processes."""

import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from retort.cluster.leases import lease, lease_teacher, lease_training
from support.gpus import EIGHT, LISTED, make_generation, write_nvidia_smi


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path))
    yield


class WouldWaitError(Exception):
    """Raised instead of the message that a lease waits."""


@pytest.fixture(autouse=True)
def refuse_to_wait() -> Iterator[None]:
    def refuse(_: logging.LogRecord) -> bool:
        raise WouldWaitError

    leases_logger = logging.getLogger("retort.cluster.leases")
    leases_logger.addFilter(refuse)
    yield
    leases_logger.removeFilter(refuse)


def is_free(folder: Path, *gpus: str, count: int | None = None) -> bool:
    """Return whether a lease of these GPUs, or of `count` of them, would not wait."""
    try:
        with lease([gpus], count=count, folder=folder, notify_s=0.0):
            return True
    except WouldWaitError:
        return False


@pytest.mark.parametrize(
    "groups", ["0|1|2|3|4|5|6|7", "0,1|2,3|4,5|6,7", "0,1,2,3|4,5,6,7", "0|1|2,3", "1,3|5,7"]
)
def test_workers_hold_each_group_once_and_one_more_waits_without_locks(
    groups: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [group.split(",") for group in groups.split("|")]
    ids = [gpu for group in candidates for gpu in group]
    with ExitStack() as stack:
        held = [stack.enter_context(lease(candidates, folder=tmp_path)) for _ in candidates]
        assert sorted(gpu for group in held for gpu in group) == sorted(ids)
        assert not is_free(tmp_path, *ids, count=1)
    with lease([ids], folder=tmp_path) as everything:
        assert everything == tuple(ids)


def test_a_group_that_is_partly_taken_is_not_held_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease([["2"]], folder=tmp_path):
        assert not is_free(tmp_path, "0", "1", "2")
        with lease([["0", "1"]], folder=tmp_path) as held:
            assert held == ("0", "1")


def test_training_takes_free_gpus_that_are_not_adjacent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with (
        lease([["1"]], folder=tmp_path),
        lease([["3"]], folder=tmp_path),
        lease_training(2) as held,
    ):
        assert held == ("0", "2")


def test_jobs_on_the_cpu_hold_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lease_teacher(make_generation(), worker=0, device="cpu") as held:
        assert held == ()
    with lease_training(1, device="cpu") as held:
        assert held == ()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_lease_sets_the_visible_gpus_and_restores_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    generation = make_generation(gpus_per_model=2)
    with lease_teacher(generation, worker=1) as held:
        assert held == ("2", "3")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_worker_takes_another_group_if_its_preferred_one_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lease_teacher(make_generation(), worker=0) as first:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with lease_teacher(make_generation(), worker=0) as second:
            assert {first, second} == {("0",), ("1",)}


def test_training_holds_as_many_gpus_as_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with lease_training(2) as held:
        assert held == ("4", "5")
    with pytest.raises(ValueError, match=r"training.gpus is 4, but this machine has 3"):
        lease_training(4).__enter__()


def test_slurms_assignment_is_used_whatever_the_config_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with lease_teacher(make_generation(), worker=0) as held:
        assert held == ()
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    generation = make_generation(gpus="0,1,2,3", gpus_per_model=2)
    with lease_teacher(generation, worker=3) as held:
        assert held == ("6", "7")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,7"
        monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job's "6" is another GPU
        with lease_teacher(generation, worker=3) as other:
            assert other == ("6", "7")


def test_jobs_inside_one_allocation_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with ExitStack() as stack:
        held = []
        for worker in range(3):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # what a new process sees
            lease_of_worker = lease_teacher(make_generation(), worker=worker)
            held.append(stack.enter_context(lease_of_worker))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        held.append(stack.enter_context(lease_training(1)))
    assert held == [("0",), ("1",), ("2",), ("3",)]


def test_a_killed_job_frees_its_gpus_at_once(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, [["0", "1"]], seconds=60)
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("held")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with lease([["1"]], folder=tmp_path):
        assert time.monotonic() - started < 5


def start_holder(folder: Path, candidates: list[list[str]], *, seconds: float) -> Any:
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from retort.cluster.leases import lease
        with lease({candidates!r}, folder=Path({str(folder)!r})) as held:
            print("held", *held, time.monotonic(), flush=True)
            time.sleep({seconds})
            print("freed", time.monotonic(), flush=True)
    """)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_jobs_of_all_sizes_never_share_a_gpu_and_all_finish_despite_kills(tmp_path: Path) -> None:
    """24 processes on 8 ids; 6 of them hang while they hold GPUs and are killed. Each also locks a second file for each
    GPU that it gets, which would fail if another process had the GPU."""
    rng = random.Random(7)
    sizes = [1, 2, 4, 1, 2, 8] * 4
    jobs = [
        start_job(tmp_path, size, hangs=number % 4 == 1, seed=rng.randrange(2**16))
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
    with lease([EIGHT], folder=tmp_path) as held:
        assert held == EIGHT


def start_job(folder: Path, size: int, *, hangs: bool, seed: int) -> "subprocess.Popen[bytes]":
    program = textwrap.dedent(f"""
        import fcntl, os, random, time
        from pathlib import Path
        from retort.cluster.leases import lease
        folder, ids, rng = Path({str(folder)!r}), {list(EIGHT)!r}, random.Random({seed})
        # Opened before the lease: a killed process closes its files in order, and these must be closed first.
        own = {{i: open(folder / f"own-{{i}}", "a") for i in ids}}
        groups = [ids[i : i + {size}] for i in range(0, 8, {size})]
        rng.shuffle(groups)
        any_of = rng.random() < 0.5
        with lease([ids] if any_of else groups, count={size}, folder=folder, poll_s=0.05) as held:
            assert len(held) == {size}
            for i in held:
                fcntl.flock(own[i], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if {hangs}:
                (folder / f"hangs-{{os.getpid()}}").touch()
                time.sleep(600)
            time.sleep(0.02 + 0.05 * rng.random())
            for i in held:
                fcntl.flock(own[i], fcntl.LOCK_UN)
    """)
    return subprocess.Popen([sys.executable, "-c", program])


# --- One GPU, whatever its name and user


def test_a_gpu_has_one_lock_by_index_uuid_and_abbreviated_uuid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_nvidia_smi(tmp_path, LISTED)
    names = {"GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f", "GPU-5c8", "0"}
    for held in names:
        with lease([[held]], folder=tmp_path):
            for other in names:
                assert not is_free(tmp_path, other)
            with lease([["1"]], folder=tmp_path):  # its first slice
                assert is_free(tmp_path, "MIG-b") and not is_free(tmp_path, "MIG-a")


def test_two_names_of_one_gpu_in_a_group_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    write_nvidia_smi(tmp_path, LISTED)
    with (
        pytest.raises(ValueError, match="0 and GPU-5c8 are the same GPU"),
        lease([["0", "GPU-5c8"]], folder=tmp_path),
    ):
        pass


def test_ids_are_in_the_order_of_the_bus_in_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible in (None, "0,1"):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with lease_training(1) as held:
            expected = "PCI_BUS_ID" if held else None
            assert os.environ.get("CUDA_DEVICE_ORDER") == expected
    assert held == ("0",)
    assert "CUDA_DEVICE_ORDER" not in os.environ


@pytest.mark.parametrize("outlives", ["a forked child", "a rank"])
def test_a_gpu_is_held_while_a_process_that_may_use_it_lives(
    outlives: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child (a DataLoader's) cannot use its parent's GPU; a rank that torchrun started can."""
    child = {
        "a forked child": "pid = os.fork()\nif pid == 0: time.sleep(60)",
        "a rank": "code = 'from retort.cluster.leases import hold_parent_gpus; import time; hold_parent_gpus();"
        " print(1, flush=True); time.sleep(60)'\n"
        "rank = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)\n"
        "rank.stdout.read(1)\n"
        "pid = rank.pid",
    }[outlives]
    body = f"{child}\nprint(pid, flush=True)\ntime.sleep(60)"
    program = (
        "import os, subprocess, sys, time\nfrom pathlib import Path\nfrom retort.cluster.leases import lease\n"
        f"with lease([['0']], folder=Path({str(tmp_path)!r})):\n" + textwrap.indent(body, "    ")
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child_id = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        os.kill(child_id, 0)  # it lives
        if outlives == "a rank":
            assert not is_free(tmp_path, "0")
            os.kill(child_id, signal.SIGKILL)  # it ends soon
        with lease([["0"]], folder=tmp_path) as held:
            assert held == ("0",)
    finally:
        os.kill(child_id, signal.SIGKILL)


def test_a_folder_without_locks_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be locked in .*file' .*RETORT_LOCK_DIR"):
        lease_training(1).__enter__()
    (tmp_path / "locks" / "gpu-0.lock").mkdir(parents=True)
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path / "locks"))
    with pytest.raises(ValueError, match=r"cannot be locked in .*locks' .*RETORT_LOCK_DIR"):
        lease_training(1).__enter__()


# --- Fairness


@pytest.mark.slow
def test_a_job_for_all_gpus_is_served_beside_a_stream_of_small_ones(tmp_path: Path) -> None:
    """Ten jobs take one GPU again and again, so eight are never free at once by chance."""
    program = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from retort.cluster.leases import lease
        while not Path({str(tmp_path / "end")!r}).exists():
            with lease([[i] for i in "01234567"], folder=Path({str(tmp_path)!r}), poll_s=0.1):
                time.sleep(0.5)
            print("once", flush=True)
    """)
    with ExitStack() as stack:
        flow = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
            )
            for _ in range(10)
        ]
        for job in flow:
            stack.callback(job.kill)
        for job in flow:
            assert job.stdout is not None and job.stdout.readline() == "once\n"
        large = start_holder(tmp_path, [list(EIGHT)], seconds=0.1)
        assert large.wait(timeout=60) == 0
        (tmp_path / "end").touch()
        assert [job.wait(timeout=60) for job in flow] == [0] * 10, "nor are the small ones starved"


def test_a_job_with_the_gate_reserves_one_group_and_loses_it_when_killed(
    tmp_path: Path,
) -> None:
    with lease([["0"]], folder=tmp_path), lease([["2"]], folder=tmp_path):
        waiting = start_holder(tmp_path, [["0", "1"], ["2", "3"]], seconds=60)
        free = {"1", "3"}
        until = time.monotonic() + 60
        while len(free) != 1 and time.monotonic() < until:
            # The job may hold one for a moment while it looks for a whole group.
            free = {gpu for gpu in ("1", "3") if is_free(tmp_path, gpu)}
        assert len(free) == 1, "one GPU is kept, the other is left to others"
        waiting.kill()
        waiting.wait()
        assert is_free(tmp_path, "1") and is_free(tmp_path, "3")
