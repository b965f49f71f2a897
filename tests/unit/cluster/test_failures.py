"""What is said of failed jobs, by real logs of real scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retort.cli import CONSOLE
from retort.cluster.failures import describe_failures, find_failure

SCRIPT = "from retort.cli import run_script\ndef main():\n    {body}\nrun_script(main)\n"


def fail(log: Path, body: str) -> None:
    """Run a script's body as a rule does: all that it says is added to its log, where there is no terminal."""
    with log.open("a") as file:
        command = [sys.executable, "-c", SCRIPT.format(body=body)]
        environment = os.environ | {CONSOLE: "/closed/3"}
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)


# A shell that starts its jobs in the background lets them ignore SIGINT.
INTERRUPTED = (
    "import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)"
)


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
        ("import os; os.kill(os.getpid(), 15)", "as by a time limit: what is finished is kept"),
        (INTERRUPTED, "It was interrupted"),
        (
            "from retort.cluster.deadlines import OUT_OF_TIME as o; print(o); raise SystemExit(75)",
            "The job's time limit came before the end of its work: what is finished is kept",
        ),
        ("1 / 0", "fault of Retort"),
    ],
)
def test_the_reason_is_one_sentence(body: str, reason: str, tmp_path: Path) -> None:
    fail(tmp_path / "log", f"print('began', flush=True); {body}")
    found = find_failure("generate_logits", tmp_path / "log")
    assert reason in found.reason
    assert found.lines[0] == "began"
    assert not any(line.startswith("error: ") for line in found.lines)


def test_an_earlier_attempt_is_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fail(log, "raise ValueError('the old mistake')")
    fail(log, "print('new', flush=True); import os; os.kill(os.getpid(), 9)")
    said = describe_failures([("train", log)])
    assert "old mistake" not in said and "new" in said and "SIGKILL" in said


def test_ten_lines_are_shown_and_the_sentence_once(tmp_path: Path) -> None:
    fail(tmp_path / "log", "[print('line', i) for i in range(30)]; raise ValueError('say this')")
    said = describe_failures([("train", tmp_path / "log")])
    assert said.count("line ") == 10 and "line 29" in said and "line 20" in said
    assert said.count("say this") == 1


def test_jobs_that_fail_for_one_reason_stand_together(tmp_path: Path) -> None:
    for worker in range(3):
        fail(tmp_path / f"log_{worker}", "raise ValueError('no room')")
    fail(tmp_path / "other", "raise ValueError('something else')")
    logs = [tmp_path / f"log_{worker}" for worker in range(3)]
    said = describe_failures([("generate_logits", log) for log in [*logs, tmp_path / "other"]])
    assert said.count("no room") == 1 and said.count("something else") == 1
    assert all(str(log) in said for log in logs)


def test_a_log_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert "It left no log" in find_failure("train", tmp_path / "log").reason
    (tmp_path / "log").write_text("=== 2026-11-25 18:00:00  train.py\n")
    assert "killed" in find_failure("train", tmp_path / "log").reason


def test_a_job_that_never_began_was_not_killed_for_its_memory(tmp_path: Path) -> None:
    (tmp_path / "log").touch()  # Snakemake leaves it empty where sbatch refused the job
    reason = find_failure("train", tmp_path / "log").reason
    assert "It never began" in reason and "SLURM refused it" in reason and "killed" not in reason


def test_a_librarys_lines_do_not_pass_for_ours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "=== 2026-11-25 18:00:00  train.py\nerror: a library's\n=== a separator\n"
        "Traceback (most recent call last)\nKeyError: 'x'\n" + "\x1b[2J" + "long " * 10_000 + "\n"
    )
    found = find_failure("train", log)
    assert found.reason.startswith("This is a fault of Retort")
    assert "error: a library's" in found.lines
    assert max(map(len, found.lines)) < 600 and not any("\x1b" in line for line in found.lines)
