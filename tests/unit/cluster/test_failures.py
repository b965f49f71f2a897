"""Messages about failed jobs, from real logs of real scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retort.cli import CONSOLE
from retort.cluster.failures import describe_failures, find_failure

SCRIPT = "from retort.cli import run_script\ndef main():\n    {body}\nrun_script(main)\n"


def fail(log: Path, body: str) -> None:
    """Run a script's body as a rule does, without a terminal: all its output is appended to the log."""
    with log.open("a") as file:
        command = [sys.executable, "-c", SCRIPT.format(body=body)]
        environment = os.environ | {CONSOLE: "/closed/3"}
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "raise ValueError('cache.top_k is 0: use 1 or more.')",
            "cache.top_k is 0: use 1 or more.",
        ),
        ("raise OSError(28, 'No space left on device')", "the disk is full"),
        ("raise MemoryError", "Memory ran out: lower teacher.generation.batch_size"),
        (
            'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")',
            "teacher.generation.gpus_per_model",
        ),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried ...')",
            "smaller teacher.dtype",
        ),
        ("import os; os.kill(os.getpid(), 9)", "killed (SIGKILL)"),
        (
            "import os; os.kill(os.getpid(), 15)",
            "ended by SIGTERM, as a time limit does: finished work is kept",
        ),
        ("import os; os.kill(os.getpid(), 2)", "It was interrupted"),
        (
            "from retort.cluster.deadlines import OUT_OF_TIME as o; print(o); raise SystemExit(75)",
            "The job reached its time limit before it was done: finished work is kept",
        ),
        ("1 / 0", "bug in Retort"),
        (
            "import subprocess; subprocess.run(['bash', '-c', 'x=$(printf %0200000d 0); env $x'])",
            "longer than this system allows",
        ),
    ],
)
def test_the_reason_is_one_sentence(body: str, reason: str, tmp_path: Path) -> None:
    fail(tmp_path / "log", f"print('began', flush=True); {body}")
    found = find_failure("generate_logits", tmp_path / "log")
    assert reason in found.reason
    assert found.lines[0] == "began"
    assert not any(line.startswith("error: ") for line in found.lines)


def test_a_list_of_mistakes_is_shown_whole_after_its_heading(tmp_path: Path) -> None:
    mistakes = [f"{n}. the key number {n} is wrong." for n in range(1, 16)]
    text = "\\n".join(["the config has 15 mistakes:", *mistakes])
    fail(tmp_path / "log", f"raise ValueError('{text}')")
    said = describe_failures([("check_inputs", tmp_path / "log")]).splitlines()
    assert said[-16:] == [f"    {line}" for line in ("the config has 15 mistakes:", *mistakes)]
    assert not any("is wrong" in line for line in said[:-16])


def test_an_earlier_attempt_is_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fail(log, "raise ValueError('the old mistake')")
    fail(log, "print('new', flush=True); import os; os.kill(os.getpid(), 9)")
    message = describe_failures([("train", log)])
    assert "old mistake" not in message and "new" in message and "SIGKILL" in message


def test_ten_lines_are_shown_and_the_reason_once(tmp_path: Path) -> None:
    fail(tmp_path / "log", "[print('line', i) for i in range(30)]; raise ValueError('too small')")
    message = describe_failures([("train", tmp_path / "log")])
    assert message.count("line ") == 10 and "line 29" in message and "line 20" in message
    assert message.count("too small") == 1


def test_jobs_that_fail_for_the_same_reason_are_grouped(tmp_path: Path) -> None:
    for worker in range(3):
        fail(tmp_path / f"log_{worker}", "raise ValueError('too large')")
    fail(tmp_path / "other", "raise ValueError('something else')")
    logs = [tmp_path / f"log_{worker}" for worker in range(3)]
    message = describe_failures([("generate_logits", log) for log in [*logs, tmp_path / "other"]])
    assert message.count("too large") == 1 and message.count("something else") == 1
    assert all(str(log) in message for log in logs)


def test_a_missing_log_is_no_error(tmp_path: Path) -> None:
    assert "It left no log" in find_failure("train", tmp_path / "log").reason
    (tmp_path / "log").write_text("=== 2026-11-25 18:00:00  train.py\n")
    assert "killed" in find_failure("train", tmp_path / "log").reason


def test_a_job_that_never_began_was_killed_or_refused_by_slurm(tmp_path: Path) -> None:
    (
        tmp_path / "log"
    ).touch()  # so it is after a kill while Python starts, and when sbatch refuses the job
    reason = find_failure("train", tmp_path / "log").reason
    assert reason.startswith("It never began. Without SLURM: it was killed (SIGKILL)")
    assert "With SLURM: SLURM refused it" in reason


def test_a_librarys_error_line_before_a_traceback_is_not_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "=== 2026-11-25 18:00:00  train.py\nerror: a library's\n=== a separator\n"
        "Traceback (most recent call last)\nKeyError: 'x'\n" + "\x1b[2J" + "long " * 10_000 + "\n"
    )
    found = find_failure("train", log)
    assert found.reason.startswith("This is a bug in Retort")
    assert "error: a library's" in found.lines
    assert max(map(len, found.lines)) < 600 and not any("\x1b" in line for line in found.lines)
