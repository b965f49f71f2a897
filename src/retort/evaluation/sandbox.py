"""Code that nobody has read, run where it can do no harm: in bubblewrap, under limits, and not for long.

A program sees the system's folders read-only, an empty folder of its own in memory, no network, no home, no variable of
the environment, and no process but its own. It cannot start another process or a thread, so one limit of memory holds
for all that it does. The kernel kills it with whoever started it. What is guarded is the machine, not the score: a
program that looks for the proof that it ended well (`_RUNNER`) can pretend to have done so.
"""

import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

INSTALL = "apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora, RHEL)"
NOBODY = 65534
_JAIL = "/jail"  # where root puts what is seen
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
# The interpreter that this one's environment was made from: no package is needed. Elsewhere than at home, where nobody
# may look.
_PYTHON = f"/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
_SAID_AT_MOST = 4096  # bytes that are read of a verdict

# Runs inside, from stdin: a line of JSON, then the program. Whoever started it as root is nobody from here on; limits
# follow, because Linux counts root's processes never and a user's only beside all others of his. The verdict goes where
# stdout was, with a word that the program was not told; a program that exits by itself says none.
_RUNNER = """
import json, os, resource, sys
def run():
    told = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.read()
    if os.getuid() == 0:
        os.chroot(told["jail"]); os.chdir("/tmp")
        os.setgroups([]); os.setgid(told["nobody"]); os.setuid(told["nobody"])
    verdict, nothing = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nothing, place)
    for name, most in told["limits"].items():
        resource.setrlimit(getattr(resource, name), (most, most))
    word, failure = told["word"], None
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:500]
    os.write(verdict, json.dumps({"word": word, "failure": failure}).encode())
    os._exit(0)
run()
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds by the clock (and as many of a processor), bytes of memory and of files."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20

    def of_process(self) -> dict[str, int]:
        """Return the resource limits that the kernel holds a program to, by their names."""
        return {
            "RLIMIT_NPROC": 0,  # it runs already; any other would be one too many
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_DATA": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_CPU": max(1, round(self.seconds + 0.5)),
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended: well, or why not, in one line."""

    has_passed: bool
    failure: str | None = None


def run_program(program: str, *, limits: Limits) -> Outcome:
    """Run a Python program; it has passed when it came to its end without an exception.

    Raises ValueError where there is no sandbox to run it in.
    """
    require_sandbox()
    return _run(program, limits)


def _run(program: str, limits: Limits) -> Outcome:
    word = secrets.token_hex(16)
    told = {"word": word, "limits": limits.of_process(), "nobody": NOBODY, "jail": _JAIL}
    process = subprocess.Popen(
        _command(limits),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    until = time.monotonic() + limits.seconds
    try:
        _tell(process, json.dumps(told) + "\n" + program)
        said = _listen(process, until)
    finally:
        process.kill()  # the kernel ends all that is inside with it
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
    return _judge(said, word, limits)


def _tell(process: "subprocess.Popen[bytes]", text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text.encode("utf-8", errors="replace"))
        process.stdin.flush()
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended before: there will be no verdict


def _listen(process: "subprocess.Popen[bytes]", until: float) -> bytes | None:
    """Return what a program says, up to a bound; None when its time is over."""
    assert process.stdout is not None
    said = b""
    while len(said) < _SAID_AT_MOST:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        piece = os.read(process.stdout.fileno(), _SAID_AT_MOST)
        if not piece:
            break
        said += piece
    return said


def _judge(said: bytes | None, word: str, limits: Limits) -> Outcome:
    if said is None:
        return Outcome(False, f"not at its end after {limits.seconds:g} s")
    try:
        verdict: Any = json.loads(said)
        is_ours = verdict["word"] == word
        failure = verdict["failure"]
    except (ValueError, TypeError, KeyError):
        is_ours, failure = False, None
    if not is_ours:
        return Outcome(False, "ended before its end: it exited, or was killed at a limit")
    return Outcome(failure is None, failure)


def _command(limits: Limits, runner: str = _RUNNER) -> list[str]:
    """Return the command that runs `_RUNNER` in bubblewrap, with nothing of the machine but what Python needs."""
    words = [str(shutil.which("bwrap")), "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--hostname", "sandbox"]
    if os.getuid() == 0:
        # Nobody could not enter a Python in root's home. So root builds the place, and the runner gives root up; it
        # changes the root folder first, because in such a place the kernel makes no namespace of users.
        words += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT"):
            words += ["--cap-add", capability]
        words += ["--perms", "0755", "--dir", _JAIL]
        words += [*_mount_system(""), *_mount_system(_JAIL)]
    else:
        words += ["--unshare-user", "--disable-userns", *_mount_system("")]
    root = _JAIL if os.getuid() == 0 else ""
    words += ["--proc", f"{root}/proc", "--dev", f"{root}/dev", "--remount-ro", f"{root}/dev"]
    words += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", f"{root}/tmp"]
    words += ["--remount-ro", "/", "--chdir", f"{root}/tmp", "--setenv", "HOME", "/tmp"]
    words += ["--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    return [*words, _PYTHON, "-I", "-S", "-c", runner]


def _mount_system(root: str) -> list[str]:
    """Return the options that show the system's folders and Python below a folder, read-only."""
    words = ["--ro-bind", str(Path(sys.base_prefix).resolve()), f"{root}/python"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), f"{root}{path}"]
        elif path.exists():
            words += ["--ro-bind", str(path), f"{root}{path}"]
    return words


@cache
def require_sandbox() -> None:
    """Raise ValueError where bubblewrap is missing, may not run here, or does not hold what it should."""
    if shutil.which("bwrap") is None:
        raise ValueError(
            f"evaluation.allow_code_execution is true, but bubblewrap is not installed here: code of a model runs "
            f"nowhere else. Type: {INSTALL}."
        )
    done = subprocess.run(
        _command(Limits(), runner="pass"),
        stdin=subprocess.DEVNULL,
        env={},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(
            "evaluation.allow_code_execution is true, but bubblewrap may not run here: "
            f"{(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}. Where user namespaces are switched off, "
            "an administrator allows them (sysctl kernel.unprivileged_userns_clone=1, or on Ubuntu an AppArmor profile "
            "for bwrap); in a container, give it --security-opt seccomp=unconfined or more rights. Or leave benchmarks "
            "that run code out."
        )
    for what, program in _PROBES.items():
        outcome = _run(program, Limits(seconds=60.0))
        if not outcome.has_passed:
            raise ValueError(
                f"evaluation.allow_code_execution is true, but the sandbox here does not hold: {what} "
                f"({outcome.failure}). Benchmarks that run code need another machine."
            )


# What must hold before code that nobody has read runs: each program passes where it does.
_PROBES = {
    "Python's own modules cannot be read": "import hashlib, math, random, typing",
    "another process can be started": """
import os
try:
    child = os.fork()
except OSError:
    child = None
if child == 0:
    os._exit(0)
assert child is None
""",
    "memory is not limited": """
try:
    held = bytearray(1 << 34)
except MemoryError:
    held = None
assert held is None
""",
    "a namespace of users can be made": """
import ctypes
CLONE_NEWUSER = 0x10000000
assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) != 0
""",
    "a network is there": """
with open("/proc/net/dev") as file:
    assert [line.split(":")[0].strip() for line in file if ":" in line] == ["lo"]
""",
    "the system can be written": """
import os
for folder in ("/", "/usr", "/dev", "/dev/shm"):
    try:
        os.close(os.open(folder + "/written", os.O_CREAT | os.O_WRONLY))
    except OSError:
        continue
    raise AssertionError(folder)
""",
}
