"""Untrusted code cannot leave the sandbox: every way out is tried, in the real bubblewrap.

A program passes when it reaches its end; each of these asserts, from inside, that one way out is closed.
"""

import ctypes
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retort.evaluation.sandbox import Limits, require_sandbox, run_program
from support.sandbox import OBSTACLE, needs_sandbox

GENEROUS = Limits(seconds=120.0)  # for busy machines

ESCAPES = {
    "a fork": """
import os
try:
    child = os.fork()
except OSError:
    child = None
if child == 0:
    os._exit(0)
assert child is None
""",
    "a thread": """
import threading
try:
    threading.Thread(target=print).start()
    started = True
except RuntimeError:
    started = False
assert not started
""",
    "a command": """
import os, subprocess
for way in (lambda: subprocess.run(["/bin/true"]), lambda: os.posix_spawn("/bin/true", ["true"], {})):
    try:
        way()
    except OSError:
        continue
    raise AssertionError("it ran")
""",
    "a socket to the world or to this machine": """
import socket
for address in (("1.1.1.1", 53), ("127.0.0.1", 22)):
    try:
        socket.create_connection(address, timeout=5)
    except OSError:
        continue
    raise AssertionError(address)
with open("/proc/net/dev") as file:
    assert [line.split(":")[0].strip() for line in file if ":" in line] == ["lo"]
""",
    "a huge allocation": """
blocks = []
try:
    while True:
        blocks.append(bytearray(1 << 24))
except MemoryError:
    reached = len(blocks) << 24
    blocks.clear()
assert 1 << 26 < reached <= 1 << 30, reached
""",
    "a huge file, or many": """
import os
written = 0
try:
    for number in range(100):
        with open(f"/tmp/{number}", "wb") as file:
            written += file.write(bytes(1 << 20))
except OSError:
    pass
assert 0 < written <= 16 << 20, written
""",
    "a file of the system": """
import os
for folder in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/dev/shm", "/proc/sys/kernel", "/python", "/python/lib"):
    if not os.path.isdir(folder):
        continue
    try:
        os.close(os.open(folder + "/written", os.O_CREAT | os.O_WRONLY))
    except OSError:
        continue
    raise AssertionError(folder)
""",
    "its parent, and all others": """
import os, signal
assert os.getpid() < 10 and [p for p in os.listdir("/proc") if p.isdigit() and int(p) > 10] == []
for process in (os.getppid(), 1, -1):
    try:
        os.kill(process, signal.SIGKILL)
    except OSError:
        pass
""",
    "rights": """
import os
with open("/proc/self/status") as file:
    found = dict(line.split(":", 1) for line in file)
assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0, found["CapEff"]
assert found["NoNewPrivs"].strip() == "1"
assert os.getuid() != 0 or os.stat("/proc/1").st_uid == 0
for become_root in (lambda: os.setuid(0), lambda: os.chroot("/"), lambda: os.setgroups([0])):
    if os.getuid() == 0:
        break  # root of a user namespace, outside of which it is nobody
    try:
        become_root()
    except OSError:
        continue
    raise AssertionError
""",
    "namespaces of its own": """
import ctypes
libc = ctypes.CDLL(None)
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000):  # user, mount, network, process
    assert libc.unshare(flag) != 0, hex(flag)
""",
    "limits raised": """
import resource
for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CPU"):
    limit = getattr(resource, name)
    hard = resource.getrlimit(limit)[1]
    try:
        resource.setrlimit(limit, (hard + 1, hard + 1))
    except (OSError, ValueError):
        continue
    raise AssertionError(name)
""",
}


RECURSION = "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()"
# Guesses where the result goes, but not the token in it.
PRETENDER = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b'{"token": "x", "failure": null}')
    except OSError:
        pass
os._exit(0)
"""
FLOOD = """
import os
for descriptor in range(64):
    try:
        while True:
            os.write(descriptor, b"x" * 65536)
    except OSError:
        pass
"""


@pytest.mark.skipif(
    "bubblewrap" not in os.environ.get("RETORT_REQUIRE", "").split(","),
    reason="RETORT_REQUIRE does not name bubblewrap, so tests may be skipped where it is missing",
)
def test_bubblewrap_works_where_it_is_required() -> None:
    assert OBSTACLE is None, OBSTACLE


@needs_sandbox
@pytest.mark.parametrize("escape", ESCAPES)
def test_there_is_no_way_out_by(escape: str) -> None:
    outcome = run_program(ESCAPES[escape], limits=GENEROUS)
    assert outcome.has_passed, outcome.failure


@needs_sandbox
def test_home_files_and_environment_are_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    tmp_path.chmod(0o755)
    secret.chmod(0o644)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = f"""
import os
assert "hf_secret" not in str(dict(os.environ)), "environment"
for process in (p for p in os.listdir("/proc") if p.isdigit()):
    try:
        with open(f"/proc/{{process}}/environ", "rb") as file:
            assert b"hf_secret" not in file.read(), process
    except OSError:
        pass
for path in {[str(secret), str(Path.home()), str(Path.cwd()), "/etc/passwd", "/var", "/run", "/sys"]}:
    assert not os.path.exists(path), path
assert os.listdir("/tmp") == []
open("/tmp/mine", "w").close()
"""
    outcome = run_program(program, limits=GENEROUS)
    assert outcome.has_passed, outcome.failure
    # The next program does not see /tmp/mine.
    assert run_program(program, limits=GENEROUS).has_passed


@needs_sandbox
def test_shared_memory_of_others_is_not_seen() -> None:
    """Every process of the same IPC namespace could read and write this System V segment."""
    libc, key = ctypes.CDLL(None, use_errno=True), secrets.randbelow(1 << 30) + 1
    segment = libc.shmget(key, 4096, 0o1666)  # IPC_CREAT, readable and writable by all
    assert segment >= 0, os.strerror(ctypes.get_errno())
    try:
        program = f"import ctypes\nassert ctypes.CDLL(None).shmget({key}, 4096, 0) == -1"
        outcome = run_program(program, limits=GENEROUS)
        assert outcome.has_passed, outcome.failure
        assert libc.shmget(key, 4096, 0) == segment
    finally:
        libc.shmctl(segment, 0, None)  # IPC_RMID


@needs_sandbox
def test_a_fork_bomb_ends_at_its_time_limit() -> None:
    before = _processes()
    outcome = run_program(
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        limits=Limits(seconds=3.0),
    )
    assert not outcome.has_passed
    assert _processes() <= before


def _processes() -> set[str]:
    """Return the bwrap processes that this process started."""
    mine = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"bwrap" in command.split(b"\0")[0] and _is_ours(folder):
            mine.add(folder.name)
    return mine


def _is_ours(folder: Path) -> bool:
    fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[1]) == os.getpid()


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("while True: pass", marks=pytest.mark.slow),
        pytest.param("import time; time.sleep(1000)", marks=pytest.mark.slow),
        "import signal\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_a_program_that_does_not_end_fails(program: str) -> None:
    outcome = run_program(program, limits=Limits(seconds=2.0))
    assert not outcome.has_passed
    assert outcome.failure is not None


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "def broken(:",
        "assert False, 'no'",
        pytest.param(RECURSION, marks=pytest.mark.slow),  # half a minute until memory is used up
        PRETENDER,
    ],
)
def test_a_program_that_exits_before_its_end_does_not_pass(program: str) -> None:
    assert not run_program(program, limits=GENEROUS).has_passed


@pytest.mark.slow
@needs_sandbox
def test_a_flood_of_output_is_not_kept() -> None:
    assert not run_program(FLOOD, limits=Limits(seconds=5.0)).has_passed
    assert run_program("print('x' * 10**7)", limits=GENEROUS).has_passed


@needs_sandbox
def test_a_program_ends_with_the_process_that_started_it() -> None:
    code = (
        "from retort.evaluation.sandbox import Limits, run_program\n"
        "print('ready', flush=True)\n"
        "run_program('while True: pass  # orphan-of-a-test', limits=Limits(seconds=600))\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert starter.stdout is not None
        starter.stdout.readline()
        _wait(lambda: len(_below(starter.pid)) >= 3)
        below = _below(starter.pid)
    finally:
        starter.kill()
        starter.wait()
    _wait(lambda: not any(Path(f"/proc/{process}").exists() for process in below))


def _below(process: int) -> list[int]:
    """Return all descendants of a process; none of one that has just ended."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    children = [int(p) for p in text.split()]
    return children + [grandchild for child in children for grandchild in _below(child)]


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.fixture
def _no_cache() -> Iterator[None]:
    require_sandbox.cache_clear()
    yield
    require_sandbox.cache_clear()


@pytest.mark.usefixtures("_no_cache")
def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="is not installed") as refusal:
        run_program("pass", limits=Limits())
    assert "apt-get install bubblewrap" in str(refusal.value)


@pytest.mark.usefixtures("_no_cache")
def test_where_bubblewrap_cannot_run_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="cannot run here: bwrap: No permissions") as refusal:
        run_program("pass", limits=Limits())
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.usefixtures("_no_cache")
def test_an_unsafe_sandbox_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_door = tmp_path / "bwrap"  # runs the command outside of any sandbox
    open_door.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -I ]; do shift; done\nexec {sys.executable} "$@"\n'
    )
    open_door.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="is not safe on this machine"):
        run_program("pass", limits=Limits())
