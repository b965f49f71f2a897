"""What the display makes of Snakemake's log records."""

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from retort.pipeline.run_display import RunDisplay, describe_plan


def record(
    message: str = "", *, path: str = "dag.py", level: int = logging.INFO, **extra: Any
) -> Any:
    """Return a record as Snakemake's logger makes it."""
    made = logging.LogRecord("snakemake", level, path, 1, message, None, None)
    made.__dict__.update(extra)
    return made


def start(jobid: int, rule: str, log: Path | str = "", **wildcards: str) -> Any:
    """Return the record of a job that starts."""
    return record(
        event="job_info",
        jobid=jobid,
        rule_name=rule,
        output=["made"],
        log=[str(log)] if log else [],
        wildcards=wildcards,
    )


def plan(**counts: int) -> Any:
    """Return the record of the plan; `all` and the total as Snakemake adds them."""
    return record(event="run_info", stats={**counts, "all": 1, "total": sum(counts.values()) + 1})


def test_messages_of_the_workflow_and_warnings_are_shown_and_snakemakes_are_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    display = RunDisplay()
    display.take(record("Building DAG of jobs..."))
    display.take(record("Teacher workers: 2.", path="/x/workflow/rules/messages.smk"))
    display.take(record("Teacher workers: 2.", path="/x/workflow/rules/messages.smk"))
    display.take(record("no driver", level=logging.WARNING))
    display.take(record("At least one job did not complete successfully.", event="error"))
    wrong = 'WorkflowError in file "/x/common.smk", line 20:\nNothing was started. Why.'
    display.take(record(wrong, event="error", level=logging.ERROR))
    display.close()
    display.close()
    assert capfd.readouterr().err == "Teacher workers: 2.\nno driver\nNothing was started. Why.\n"


def test_jobs_do_not_write_to_the_terminal_while_it_is_open(
    capfd: pytest.CaptureFixture[str],
) -> None:
    display = RunDisplay()
    os.write(2, b"of a job\n")
    display.close()
    os.write(2, b"after it\n")
    assert capfd.readouterr().err == "after it\n"


def test_progress_says_what_the_job_that_wrote_last_is_at(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.pipeline.run_display._LINE_S", 0.0)
    old, new = tmp_path / "old.log", tmp_path / "new.log"
    old.write_text("long ago\n")
    head = "2026-01-01 00:00:07 train[4711] "
    new.write_text(f"=== 2026-01-01 00:00:00  train.py\n{head}train b  step 3/9\n\n")
    os.utime(old, (1, 1))
    display = RunDisplay()
    display.take(plan(train=2, evaluate=1))
    display.take(start(1, "train", old, run="a", id="0123456789ab"))
    display.take(start(2, "train", new, run="b", id="0123456789ab"))
    display.take(start(3, "evaluate"))
    display.take(record(event="job_finished", job_id=3))
    display.close()
    said = capfd.readouterr().err
    assert said.splitlines()[:2] == [
        "Plan, 3 jobs: 2 train, evaluate",
        "1 of 3 jobs done, 0:00  |  train b: step 3/9",
    ]
    assert said.splitlines()[2:] == ["1 of 3 jobs done, 0:00"]


def test_a_failed_job_is_named_at_once_and_the_table_is_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "summary.txt"
    table.write_text("the table\n")
    display = RunDisplay(summary=table)
    display.take(plan(train=1))
    display.take(start(1, "train", run="a"))
    failed: dict[str, Any] = {"rule_name": "train", "jobid": 1, "wildcards": {"run": "a"}}
    refused = record(event="job_error", level=logging.ERROR, rule_msg="sbatch refused", **failed)
    display.take(refused)
    display.close()
    said = capfd.readouterr().err
    assert "Failed: train a: sbatch refused. Jobs that do not need it go on." in said
    assert "the table" not in said


def test_jobs_that_an_interrupt_ended_have_not_failed(capfd: pytest.CaptureFixture[str]) -> None:
    display = RunDisplay()
    display.take(plan(train=1))
    display.take(start(1, "train", run="a"))
    display.take(record("Terminating processes on user request, this might take some time."))
    status = "RuleException:\nCalledProcessError in file x, line 1:\nCommand 'x' died"
    display.take(record(status, event="error", level=logging.ERROR))
    failed: dict[str, Any] = {"rule_name": "train", "jobid": 1, "wildcards": {"run": "a"}}
    display.take(record(event="job_error", level=logging.ERROR, **failed))
    display.take(record("Complete log(s): x"))
    display.close()
    assert capfd.readouterr().err.splitlines() == [
        "Plan, 1 job: train",
        "Interrupted: waiting for running jobs to end.",
        "0 of 1 job done, 0:00. Rerun the command to resume.",
    ]


def test_the_table_ends_a_run_that_went_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.pipeline.run_display._LINE_S", 0.0)
    table = tmp_path / "summary.txt"
    display = RunDisplay(summary=table)
    display.take(plan(report=1))
    display.take(start(1, "report"))
    table.write_text("the table\n")
    display.take(record(event="job_finished", job_id=1))
    display.close()
    said = capfd.readouterr().err
    assert said.endswith("\n1 job done, 0:00\n\nthe table\n") and said.count("1 job done") == 1


def test_on_a_terminal_progress_is_one_line_that_is_written_over() -> None:
    ours, theirs = os.openpty()
    kept = os.dup(2)
    os.dup2(theirs, 2)
    try:
        display = RunDisplay()
        display.take(plan(train=9))
        time.sleep(1.3)
        display.take(record("a message", path="x.smk"))
        display.close()
    finally:
        os.dup2(kept, 2)
    os.close(theirs)
    said = ""
    with contextlib.suppress(OSError):  # how a terminal that is closed at the other end says so
        while read := os.read(ours, 10000):
            said += read.decode()
    assert said.count("\r0 of 9 jobs done") >= 2
    assert "\r\x1b[Ka message\r\n" in said, "a message takes the line's place"


def test_a_long_plan_takes_few_lines() -> None:
    counts = {f"some_rule_{n}": n + 1 for n in range(16)}
    lines = describe_plan(counts).splitlines()
    assert len(lines) == 3 and all(len(line) <= 100 for line in lines)
    assert lines[0].startswith("Plan, 136 jobs: some_rule_0, 2 some_rule_1")
