"""How scripts end: one sentence for a user's mistake, a traceback for ours; as real processes see it."""

import os
import subprocess
import sys

import pytest

from retort.commands import run_script, say


def run(body: str) -> subprocess.CompletedProcess[str]:
    source = (
        f"from retort.commands import run_script, say\ndef main():\n    {body}\nrun_script(main)"
    )
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )


def test_a_users_mistake_is_one_line_and_status_1() -> None:
    found = run("raise ValueError('cache.top_k is 0: use 1 or more.')")
    assert found.returncode == 1
    assert found.stderr == "error: cache.top_k is 0: use 1 or more.\n" and found.stdout == ""


def test_any_other_error_keeps_its_traceback() -> None:
    found = run("assert 1 == 2, 'ours'")
    assert found.returncode == 1
    assert "Traceback" in found.stderr and "AssertionError: ours" in found.stderr


def test_an_interrupt_ends_quietly_with_the_shells_status() -> None:
    found = run("raise KeyboardInterrupt")
    assert found.returncode == 130 and found.stderr == ""


def test_progress_goes_to_stderr_at_once() -> None:
    # The process dies without flushing anything.
    found = run("say('half way'); import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert found.stderr == "half way\n" and found.stdout == ""


def test_success_is_silent_and_leaves_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("import os; os.environ['TRANSFORMERS_VERBOSITY'] == 'error' or say('not quiet')")
    assert (found.returncode, found.stderr) == (0, "")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    found = run("import os; say(os.environ['TRANSFORMERS_VERBOSITY'])")
    assert found.stderr == "debug\n"


def test_the_exit_is_an_exit_in_this_process_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))

    def main() -> None:
        say("begun")
        raise ValueError("no such file")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "begun\nerror: no such file\n"
