"""The bar of the teacher's pass, on a real terminal (a pty)."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
from pathlib import Path
from retort.cli import configure_logging
from retort.teacher.progress import Progress, logger
from retort.tokens.index import Part
configure_logging()
folder = Path(sys.argv[1])
sizes = {"shard": 0, "first": 0, "sequences": 5, "tokens": 100, "positions": 80}
parts = [Part(name=str(i), **sizes) for i in range(4)]
files = [folder / f"{i}.h5" for i in range(4)]
files[0].write_bytes(bytes(160))  # another worker's
with Progress(parts, files, log_interval_s=0.0, poll_interval_s=0.0) as shown:
    logger.info("above the bar")
    for part, file in zip(parts[1:], files[1:]):
        shown.start_part(part)
        shown.add(50)
        shown.add(50)
        file.write_bytes(bytes(160))
        shown.end_part(part, file)
        time.sleep(float(sys.argv[2]))
"""


def run_with_terminal(
    folder: Path,
    *,
    log: Path,
    console: str = "3>&2",
    pause_s: float = 0.0,
    environment: dict[str, str] | None = None,
) -> str:
    """Run the program in a shell, as a rule does, with a pause after each part; return the terminal's output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    script = folder / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    (folder / "parts").mkdir(exist_ok=True)
    prefix = f"exec {console}; export RETORT_CONSOLE=/proc/$$/fd/3"  # workflow/rules/messages.smk
    command = f"{prefix}; {sys.executable} {script} {folder / 'parts'} {pause_s} >> {log} 2>&1"
    process = subprocess.Popen(
        ["bash", "-c", command],
        stderr=slave,
        stdout=slave,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # EIO: no process has the terminal open any more
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_the_bar_advances_to_the_end_and_the_log_has_lines_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # The bar is drawn twice a second at most.
    shown = run_with_terminal(tmp_path, log=log, pause_s=0.6)
    percents = [int(found) for found in re.findall(r"(\d+)%\|", shown)]
    assert percents[0] == 25, "parts of other workers count"
    assert percents == sorted(percents) and percents[-1] == 100 and len(set(percents)) > 2
    assert "parts 4/4, samples 20/20, 0.0 MB, 2.0 B/position" in shown
    assert "part 2 of 4 done" not in shown
    assert "\rabove the bar\r\n" in shown, "lines must not cut the bar"
    lines = log.read_text()
    assert "\r" not in lines and "%|" not in lines and "above the bar" in lines
    assert (
        lines.count("part ") >= 3 and "part 2 of 4 done: 5 samples, 100 tokens, 160 bytes" in lines
    )


@pytest.mark.parametrize(
    ("console", "environment"),
    [("3> >(cat >&2)", {}), ("3>&2", {"RETORT_PROGRESS": "0"})],
    ids=["no terminal", "not wanted"],
)
def test_where_no_bar_can_be_or_is_wanted_there_are_lines(
    console: str, environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    shown = run_with_terminal(
        tmp_path, log=log, console=console, environment=os.environ | environment
    )
    assert "%|" not in shown + log.read_text()
    assert "parts 2/4" in shown and "parts 2/4" in log.read_text()
    assert "\r" not in log.read_text() and "part 2 of 4 done" not in shown


def test_one_process_has_the_bar_of_a_terminal() -> None:
    program = (
        "import fcntl, os, pty, struct, sys, termios\n"
        "from retort.cli import configure_logging, open_terminal\n"
        "_, slave = pty.openpty()\n"
        "os.dup2(slave, 2)\n"
        "assert open_terminal() is None, 'a library shows no bar'\n"
        "configure_logging()\n"
        "assert open_terminal() is None, 'it has no width'\n"
        "fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 140, 0, 0))\n"
        "first = open_terminal()\n"
        "assert first is not None and open_terminal() is None\n"
        "first.close()\n"
        "assert open_terminal() is not None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
