"""Where scripts' messages go and how scripts end, tried with real processes: one message for a user's mistake, a
traceback for a bug."""

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retort.cli import ATTEMPT, logger, run_script

SCRIPT = "from retort.cli import logger, run_script\ndef main():\n    {body}\nrun_script(main)"
PREFIX = "exec 3>&2; export RETORT_CONSOLE=/proc/$$/fd/3; "  # workflow/rules/messages.smk
LINE_HEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d -c\[\d+\] ")


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Run a script's body as from a shell."""
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_as_a_rule(body: str, log: Path, *, launcher: str = "") -> tuple[str, list[str]]:
    """Run a script's body as a rule does; return the terminal's text, and the log's lines without their heads."""
    script = shlex.join([sys.executable, "-c", SCRIPT.format(body=body)])
    command = f"{PREFIX}{launcher}{script} >> {shlex.quote(str(log))} 2>&1"
    shown = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    return shown.stderr, [LINE_HEAD.sub("", line) for line in log.read_text().splitlines()]


def test_a_rules_terminal_shows_info_and_above_and_its_log_has_all(tmp_path: Path) -> None:
    body = (
        "logger.info('told\\ntwice'); logger.debug('noted'); logger.warning('beware'); print('by C', flush=True)\n"
        "    raise ValueError('use 1 or more.')"
    )
    log = tmp_path / "log"
    shown, lines = run_as_a_rule(body, log)
    assert shown == "told\ntwice\nwarning: beware\nerror: use 1 or more.\n"
    assert lines[0].startswith(ATTEMPT) and lines[1:] == [
        *("told", "twice", "noted", "warning: beware", "by C", "error: use 1 or more.")
    ]
    assert len(LINE_HEAD.findall(log.read_text())) == 5, "every line has time, job and process"


def test_a_bug_is_one_line_on_a_rules_terminal_and_a_traceback_in_its_log(
    tmp_path: Path,
) -> None:
    shown, lines = run_as_a_rule("assert 1 == 2, 'ours'", tmp_path / "log")
    assert shown == f"error: AssertionError: ours (see {tmp_path}/log)\n"
    assert lines[1].startswith("Traceback") and lines[-1] == "AssertionError: ours"


def test_a_closed_terminal_stops_no_job(tmp_path: Path) -> None:
    body = "[logger.info(str(i)) for i in range(3)]"
    gone = "exec 3> >(exec true); wait $!; "
    shown, lines = run_as_a_rule(body, tmp_path / "log", launcher=gone)
    assert (shown, lines[1:]) == ("", ["0", "1", "2"])
    shown, lines = run_as_a_rule(body, tmp_path / "other", launcher="exec 3>&-; ")
    assert (shown, lines[1:]) == ("", ["0", "1", "2"])


def test_a_quiet_worker_still_warns(tmp_path: Path) -> None:
    body = "from retort.cli import quiet_terminal; quiet_terminal(); logger.info('a'); logger.warning('b')"
    shown, lines = run_as_a_rule(body, tmp_path / "log")
    assert (shown, lines[1:]) == ("warning: b\n", ["a", "warning: b"])
    assert run(body).stderr == "a\nwarning: b\n", "without a rule there is no log"


@pytest.mark.parametrize(
    ("rank", "shown", "logged"),
    [("0", ["a", "warning: b", "error: c"], 3), ("1", ["error: c"], 2)],
)
def test_of_several_ranks_only_the_first_reports(
    rank: str, shown: list[str], logged: int, tmp_path: Path
) -> None:
    """The launcher closes descriptors, as torchrun does."""
    environment = f"TORCHELASTIC_RUN_ID=x LOCAL_RANK={rank} RANK={rank}"
    body = "logger.info('a'); logger.warning('b'); logger.error('c')"
    said, lines = run_as_a_rule(body, tmp_path / "log", launcher=f"3>&- env {environment} ")
    assert said.splitlines() == shown
    assert len(lines) == logged, "no rank writes an attempt's first line"


def test_what_srun_starts_finds_the_terminal_and_no_other_nodes_process_does(
    tmp_path: Path,
) -> None:
    """By a launcher that leaves a descriptor of its own in the terminal's place."""
    body = "logger.info('a')"
    shown, lines = run_as_a_rule(body, tmp_path / "log", launcher=f"3> {tmp_path}/other env ")
    assert (shown, lines[1:]) == ("a\n", ["a"]) and (tmp_path / "other").read_text() == ""
    launcher = f"3> {tmp_path}/other env SLURM_PROCID=1 "
    shown, lines = run_as_a_rule(body, tmp_path / "log 1", launcher=launcher)
    assert (shown, lines) == ("", ["a"]) and (tmp_path / "other").read_text() == ""


def test_a_rules_terminal_may_be_a_file_with_other_writers(tmp_path: Path) -> None:
    """`snakemake 2> file`: the file is not open for appending, and ranks open it by its path."""
    rank = [sys.executable, "-c", SCRIPT.format(body="logger.info('a rank')")]
    launch = (
        f"import os, subprocess; logger.info('launcher'); subprocess.run({rank!r}, env=os.environ | dict("
        + ("TORCHELASTIC_RUN_ID='x', LOCAL_RANK='0', RANK='0'))")
    )
    script = shlex.join([sys.executable, "-c", SCRIPT.format(body=launch)])
    command = f"{PREFIX}{script}; echo Snakemake >&2"
    with (tmp_path / "shown").open("w") as file:
        subprocess.run(["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=file, check=True)
    assert (tmp_path / "shown").read_text() == "launcher\na rank\nSnakemake\n"


def test_a_users_mistake_is_one_line_and_status_1() -> None:
    found = run("raise ValueError('cache.top_k is 0: use 1 or more.')")
    assert found.returncode == 1
    assert found.stderr == "error: cache.top_k is 0: use 1 or more.\n"
    assert found.stdout == ""


def test_any_other_error_keeps_its_traceback() -> None:
    found = run("assert 1 == 2, 'ours'")
    assert found.returncode == 1
    assert "Traceback" in found.stderr and "AssertionError: ours" in found.stderr


def test_an_interrupt_ends_quietly_with_the_shells_status() -> None:
    found = run("raise KeyboardInterrupt")
    assert found.returncode == 130
    assert found.stderr.startswith("interrupted by Ctrl-C.") and found.stderr.count("\n") == 1


def test_sigterm_ends_cleanly_and_tells_how_to_resume() -> None:
    found = run(
        "import os, signal\n    try: os.kill(os.getpid(), signal.SIGTERM)\n    finally: logger.info('cleaned up')"
    )
    assert found.returncode == 143
    assert found.stderr.splitlines()[1:] == ["cleaned up"]
    assert "rerun the same command to resume" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("interrupt", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    "place",
    [
        "ref = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.{}))",
        "Thing.__del__ = lambda self: os.kill(os.getpid(), signal.{})",
    ],
    ids=["weak reference", "destructor"],
)
def test_an_interrupt_is_not_lost_where_python_drops_exceptions(place: str, interrupt: str) -> None:
    found = run(
        "import os, signal, time, weakref\n    class Thing: pass\n    thing = Thing()\n"
        f"    {place.format(interrupt)}\n    try: del thing; time.sleep(60)\n"
        "    finally: logger.info('cleaned up')"
    )
    assert found.returncode == (143 if interrupt == "SIGTERM" else 130)
    assert "cleaned up" in found.stderr.splitlines() and "Exception ignored" not in found.stderr


def test_sigterm_to_a_child_ends_the_child_only() -> None:
    found = run(
        "import os, signal, time\n    child = os.fork()\n    while not child: time.sleep(0.01)\n"
        "    time.sleep(0.5)  # a new child loses signals that come before it is ready\n"
        "    os.kill(child, signal.SIGTERM)\n    logger.info(str(os.waitpid(child, 0)[1]))"
    )
    assert (found.returncode, found.stderr) == (0, "15\n")


WRITERS = {
    "plain": "open(path, 'wb').write(bytes(1 << 22))",
    "h5py": "import h5py; h5py.File(path, 'w').create_dataset('x', data=bytearray(1 << 22))",
    "safetensors": "import torch, safetensors.torch as s; s.save_file({'x': torch.ones(1 << 22)}, path)",
    "torch": "import torch; torch.save(torch.ones(1 << 22), path)",
}


def run_on_a_small_disk(
    folder: Path, body: str, *, size: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script's body with a disk of this size mounted at a folder."""
    mount = f"mount -t tmpfs -o size={size} none {folder}"
    small_disk = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*small_disk, mount], check=False).returncode
    ):
        pytest.skip("a small disk cannot be mounted here (unshare and mount without rights)")
    command = shlex.join([sys.executable, "-c", SCRIPT.format(body=body)])
    return subprocess.run(
        [*small_disk, f"{mount} && {command}"], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_message_whichever_library_writes(writer: str, tmp_path: Path) -> None:
    body = f"path = '{tmp_path}/file'\n    {WRITERS[writer]}"
    found = run_on_a_small_disk(tmp_path, body, size="1m")
    assert found.returncode == 1
    assert "error: the disk is full" in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def test_a_file_on_a_full_disk_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    body = (
        "import os, numpy as np; from pathlib import Path; from retort.io.hdf5 import write_h5\n"
        f"    folder = Path('{tmp_path}')\n"
        "    for kib in range(8, 256, 31):\n"
        "        (folder / 'filler').write_bytes(bytes(kib << 10))\n"
        "        try: write_h5(folder / 'a.h5', lambda f: f.create_dataset('x', data=np.arange(25000)))\n"
        "        except OSError as error: assert error.errno == 28\n"
        "        size = (folder / 'a.h5').stat().st_size if (folder / 'a.h5').exists() else 0\n"
        "        assert size == 0 or size > 200000, size\n"
        "        print(size > 0, sorted(os.listdir(folder)))\n"
        "        (folder / 'a.h5').unlink(missing_ok=True)"
    )
    found = run_on_a_small_disk(tmp_path, body, size="256k")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert any(line == "True ['a.h5', 'filler']" for line in lines)
    assert any(line == "False ['filler']" for line in lines)


def test_a_read_only_folder_is_one_message_and_keeps_its_files(tmp_path: Path) -> None:
    body = (
        "import os, subprocess, numpy as np; from pathlib import Path; from retort.io.hdf5 import write_h5\n"
        f"    folder = Path('{tmp_path}')\n"
        "    def write(name): write_h5(folder / name, lambda f: f.create_dataset('x', data=np.arange(9)))\n"
        "    write('a.h5'); before = (folder / 'a.h5').read_bytes()\n"
        "    subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)\n"
        "    try: write('b.h5')\n"
        "    finally: print((folder / 'a.h5').read_bytes() == before, os.listdir(folder))"
    )
    found = run_on_a_small_disk(tmp_path, body, size="1m")
    assert found.returncode == 1, found.stderr
    assert found.stdout.splitlines() == ["True ['a.h5']"]
    assert (
        found.stderr.startswith("error: Read-only file system: ")
        and "Traceback" not in found.stderr
    )


def test_progress_goes_to_stderr_at_once() -> None:
    # The process dies without flushing anything.
    found = run("logger.info('half way'); import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert found.stderr == "half way\n" and found.stdout == ""


def test_success_is_silent_and_leaves_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(
        "import os; os.environ['TRANSFORMERS_VERBOSITY'] == 'error' or logger.info('not quiet')"
    )
    assert (found.returncode, found.stderr) == (0, "")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    found = run("import os; logger.info(os.environ['TRANSFORMERS_VERBOSITY'])")
    assert found.stderr == "debug\n"


def test_a_mistake_raises_system_exit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # keep pytest's handlers
    library = logging.getLogger("retort")
    monkeypatch.setattr(library, "handlers", [])
    monkeypatch.setattr(library, "propagate", False)

    def main() -> None:
        logger.info("begun")
        raise ValueError("no such file")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "begun\nerror: no such file\n"
