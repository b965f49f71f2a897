"""The time left of a job, and when a worker stops because of it."""

import math
import os
import stat
from pathlib import Path

import pytest

from retort.cluster.deadlines import Deadline, ask_scheduler, read_time_left


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:07", 7.0),
        ("59:59", 3599.0),
        ("1:00:00", 3600.0),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 4 * 60 + 5.0),
        ("UNLIMITED", math.inf),
        ("INVALID", 0.0),  # past its limit
        ("NOT_SET", None),
        ("N/A", None),
        ("", None),
    ],
)
def test_times_in_squeues_format(text: str, seconds: float | None) -> None:
    assert read_time_left(text) == seconds


def test_work_is_forbidden_once_it_does_not_fit_with_the_margin() -> None:
    now = [1000.0]
    answers = [100.0, 61.0]
    deadline = Deadline(ask=lambda: answers.pop(0), clock=lambda: now[0])
    assert deadline.left == 80.0
    assert not deadline.forbids(80.0)
    now[0] += 39.0
    assert not deadline.forbids(41.0) and len(answers) == 1
    assert deadline.forbids(41.5) and answers == []


def test_without_an_answer_nothing_is_forbidden() -> None:
    assert not Deadline(ask=lambda: None).forbids(1e9)


def test_work_is_not_forbidden_after_the_limit_was_raised() -> None:
    answers = [30.0, 1000.0]
    deadline = Deadline(ask=lambda: answers.pop(0))
    assert not deadline.forbids(500.0)
    assert answers == []


def test_a_later_failure_to_answer_changes_nothing() -> None:
    answers = [30.0, None]
    deadline = Deadline(ask=lambda: answers.pop(0), clock=lambda: 0.0)
    assert deadline.forbids(500.0)
    assert deadline.left == 10.0


def test_outside_a_job_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert ask_scheduler() is None


@pytest.mark.parametrize(
    "body", ["exit 1", "echo slurm_load_jobs error: Invalid job id >&2; exit 1"]
)
def test_a_scheduler_that_fails_is_no_answer(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are tested on a cluster (tests/slurm)."""
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{body}\n")
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert ask_scheduler() is None
