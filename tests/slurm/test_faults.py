"""Faults of a cluster in the middle of the teacher's pass: nothing hangs, and the cache is the same, bit for bit.

Workers are stopped (SIGSTOP) after some parts, so that what happens to them happens in the middle of their work.
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from retort.cluster.deadlines import OUT_OF_TIME
from support.cluster import Cluster
from support.place import Place, merge
from support.project import CONFIG, Note, Parts, Project

Interrupted = tuple["subprocess.Popen[bytes]", Parts]
_PTRACE_SEIZE, _PTRACE_INTERRUPT, _WALL = 0x4206, 0x4207, 0x40000000  # of Linux
OUTAGE_S = 55  # longer than the SLURM plugin asks a controller in vain, if it is not told to


@contextmanager
def interrupted(project: Project) -> Iterator[Interrupted]:
    """Start the teacher's pass and stop both workers; after the block they go on, and all must end well."""
    with Parts(project) as parts:
        process = project.start(project.merged)
        project.pause(process, 0, 1)
        yield process, parts
        project.wake()
        project.finish(process)


@contextmanager
def hung(worker: int) -> Iterator[None]:
    """Let a process be deaf to every signal but SIGKILL, as in a driver that hangs; the block must end with its death.

    A SIGCONT would end a SIGSTOP. Traced, the main thread, which in Python hears signals, stays where it is.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(_PTRACE_SEIZE, worker, None, None) == 0, os.strerror(ctypes.get_errno())
    assert libc.ptrace(_PTRACE_INTERRUPT, worker, None, None) == 0
    os.waitpid(worker, _WALL)
    yield
    while True:
        _, status = os.waitpid(worker, _WALL)
        if not os.WIFSTOPPED(status):
            break
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_job_that_fails_is_the_only_one_that_runs_again(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    with interrupted(project) as (_, parts):
        os.kill(project.workers()[0], signal.SIGKILL)
    assert project.states(0) == ["FAILED", "COMPLETED"]
    assert project.states(1) == ["COMPLETED"]
    note("a worker is killed (SIGKILL)", "FAILED; only its job ran again", parts, project)


def test_a_cancelled_worker_goes_on_from_its_parts(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    with interrupted(project) as (_, parts):
        job = project.worker_job(0)
        cluster.run("scancel", job.id)
    assert project.states(0) == ["CANCELLED", "COMPLETED"]
    assert "interrupted by SIGTERM" in project.scheduler_log(job)
    note("scancel of a running worker", "CANCELLED; a second job went on", parts, project)


def test_a_job_that_is_cancelled_while_it_waits_is_submitted_again(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    cluster.drain()
    with Parts(project) as parts:
        process = project.start(project.merged)
        cluster.run("scancel", project.worker_job(0, state="PENDING").id)
        cluster.resume()
        project.finish(process)
    assert project.states(0) == ["CANCELLED", "COMPLETED"]
    note("scancel of a waiting worker", "CANCELLED; a second job ran", parts, project)


def test_a_job_that_is_held_is_said_and_goes_on_when_it_is_released(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    cluster.drain()
    with Parts(project) as parts:
        process = project.start(project.merged)
        job = project.worker_job(0, state="PENDING").id
        cluster.run("scontrol", "hold", job)  # as SLURM does after a start that failed on a node
        cluster.resume()
        words = f"type: scontrol release {job}."
        cluster.wait_until(lambda: words in project.said().lower(), "it is said", process=process)
        cluster.run("scontrol", "release", job)
        project.finish(process)
    assert project.states(0) == ["COMPLETED"]
    note("a waiting worker is held", "said, and what to type; released, it ran", parts, project)


def test_at_its_time_limit_a_worker_ends_and_the_next_attempt_goes_on(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    with interrupted(project) as (_, parts):
        job = project.worker_job(0)
        cluster.run("scontrol", "update", f"jobid={job.id}", "EndTime=now+1")
        cluster.wait_for("TIMEOUT", job.id)
    assert project.states(0) == ["TIMEOUT", "COMPLETED"]
    assert "interrupted by SIGTERM" in project.scheduler_log(job)
    note("time limit of a worker", "SIGTERM, TIMEOUT; a second job went on", parts, project)


def test_a_worker_that_cannot_obey_is_killed_at_its_time_limit_and_the_next_attempt_goes_on(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    """SIGTERM is not heard, so SLURM's SIGKILL follows; the worker has no time to end by itself either."""
    project = teacher_left
    with interrupted(project) as (_, parts):
        job = project.worker_job(0)
        with hung(project.workers()[0]):
            cluster.run("scontrol", "update", f"jobid={job.id}", "EndTime=now+1")
            cluster.wait_for("TIMEOUT", job.id)
            done = parts.done
        log = project.log(0)
    assert project.states(0) == ["TIMEOUT", "COMPLETED"]
    assert "DUE TO TIME LIMIT" in project.scheduler_log(job)
    assert "interrupted" not in log and OUT_OF_TIME not in log
    assert 3 <= done < parts.done
    note(
        "a worker hangs at its time limit", "SIGTERM, SIGKILL; a second job went on", parts, project
    )


def test_after_the_crash_of_a_node_its_worker_goes_on_elsewhere(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    three_gpus = {"teacher": {"generation": {"gpus_per_model": 3}}}  # no node has room for two such
    project.write_config(merge(CONFIG, three_gpus))
    with interrupted(project) as (_, parts):
        job = project.worker_job(0)
        assert job.node != project.worker_job(1).node
        assert cluster.crash(job.node) > 4, "the node's daemon, and all that ran"
        project.worker_job(0, state="PENDING")
        cluster.hurry(job.id)
    elsewhere = project.worker_job(0, state="COMPLETED")
    assert elsewhere.id == job.id, "SLURM put the same job into the queue again"
    assert elsewhere.node != job.node
    note("crash of a node", "requeued by SLURM, went on elsewhere", parts, project)


def test_preempted_workers_are_queued_again_and_go_on(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    project.fill_in(gpu_partition="scavenge")
    with interrupted(project) as (_, parts):
        job = project.worker_job(0)
        others = f"sbatch -p gpu -w {job.node} -N1 --gpus=4 -o /dev/null --wrap".split()
        cluster.run(*others, "sleep 5")
        assert project.worker_job(0, state="PENDING").id == job.id
        for waiting in project.jobs("generate_logits", "PENDING"):
            cluster.hurry(waiting.id)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job.id)
    note("preemption", "requeued by SLURM, went on", parts, project)


def test_after_a_sigkill_of_snakemake_two_jobs_may_be_one_worker(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    with Parts(project) as parts:
        target = project.merged
        process = project.start(target)
        project.pause(process, 0, 1)
        old = [project.worker_job(worker) for worker in (0, 1)]
        first_line = project.log(0).splitlines()[0]
        process.kill()
        process.wait()
        refused = project.try_snakemake(target)
        assert refused.returncode != 0 and "--unlock" in refused.output
        project.snakemake("--unlock")
        process = project.start(target)

        def is_at_work_too() -> bool:
            log = project.log(0)
            return bool(log) and first_line not in log and " done: " in log

        cluster.wait_until(is_at_work_too, "a second job is worker 0 as well", process=process)
        assert {cluster.state(job.id) for job in old} == {"RUNNING"}
        project.wake()
        project.finish(process)
        cluster.wait_for("COMPLETED", *(job.id for job in old))
    assert project.plan(target) == {}
    note("SIGKILL of Snakemake, same command", "two jobs of each worker at once", parts, project)


def test_an_orphan_that_is_cancelled_late_takes_nothing_away(
    project: Project, undisturbed: Place, cluster: Cluster
) -> None:
    """It is a job of its own, with a Snakemake in it that would remove the output of a failed job."""
    for name in ("checks", "teachers", "tokens"):
        shutil.copytree(undisturbed.results / name, project.results / name)
    process = project.start("--until", "score_validation")
    cluster.wait_until(
        lambda: project.processes("score_validation"), "the teacher reads", process=process
    )
    for scoring in project.processes("score_validation"):
        os.kill(scoring, signal.SIGSTOP)
    process.kill()
    process.wait()
    (orphan,) = project.jobs("score_validation")
    project.snakemake("--unlock")
    project.snakemake("--until", "score_validation")
    (scored,) = project.results.glob("validation/*/*.safetensors")
    cluster.run("scancel", orphan.id)
    cluster.wait_for("CANCELLED", orphan.id)
    cluster.wait_until(lambda: "did not complete" in project.scheduler_log(orphan), "it has ended")
    assert scored.exists()


def test_ctrl_c_cancels_the_jobs_and_the_same_command_goes_on(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    with Parts(project) as parts:
        target = project.merged
        process = project.start(target)
        project.pause(process, 0, 1)
        jobs = [project.worker_job(worker) for worker in (0, 1)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) != 0
        cluster.wait_for("CANCELLED", *(job.id for job in jobs))
        project.snakemake(target)
    note("Ctrl-C, same command", "jobs CANCELLED; two others went on", parts, project)


def test_jobs_are_not_forgotten_while_the_controller_is_away(
    teacher_left: Project, cluster: Cluster, note: Note
) -> None:
    project = teacher_left
    with interrupted(project) as (process, parts):
        cluster.kill_controller()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=OUTAGE_S)
        cluster.start_controller()
    assert project.states(0) == project.states(1) == ["COMPLETED"]
    note("the controller is away for a minute", "jobs ran on, Snakemake waited", parts, project)
