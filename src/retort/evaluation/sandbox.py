"""Run untrusted Python code in a sandbox: in bubblewrap, with limits on resources and time.

A program sees the system's folders read-only, an empty folder of its own in memory, no network, no home, no environment
variables and no process but its own. It cannot start another process or thread, so one memory limit covers all of it.
The kernel kills it when its parent ends. The sandbox protects the machine, not the score: a program that searches the
memory of its process for the secret token (`_RUNNER`) can fake a pass.
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
_JAIL = "/jail"  # root folder of the program when this process is root
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
# The base interpreter of this one's environment, because no package is needed; mounted outside of home, which the
# program must not see.
_PYTHON = f"/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
_MAX_RESULT_BYTES = 4096

# Runs inside the sandbox and reads from stdin a line of JSON, then the program. Root becomes nobody before the limits
# are set: Linux never limits root's number of processes, and counts a user's over the whole machine. The result goes to
# the former stdout, with a token that the program was not given; a program that exits by itself writes none.
_RUNNER = """
import json, os, resource, sys
def run():
    options = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.read()
    if os.getuid() == 0:
        os.chroot(options["jail"]); os.chdir("/tmp")
        os.setgroups([]); os.setgid(options["nobody"]); os.setuid(options["nobody"])
    result, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for name, limit in options["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    token, failure = options["token"], None
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:500]
    os.write(result, json.dumps({"token": token, "failure": failure}).encode())
    os._exit(0)
run()
"""


@dataclass(frozen=True)
class Limits:
    """Limits of a program: wall-clock seconds (and as many CPU seconds), bytes of memory and of files."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20

    def as_rlimits(self) -> dict[str, int]:
        """Return the limits as values for `resource.setrlimit`, by their names."""
        return {
            "RLIMIT_NPROC": 0,  # no process besides the running one
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
    """Whether a program passed; if not, why, in one line."""

    has_passed: bool
    failure: str | None = None


def run_program(program: str, *, limits: Limits) -> Outcome:
    """Run a Python program; it passes when it reaches its end without an exception.

    Raises ValueError when there is no working sandbox on this machine.
    """
    require_sandbox()
    return _run(program, limits)


def _run(program: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    options = {"token": token, "limits": limits.as_rlimits(), "nobody": NOBODY, "jail": _JAIL}
    process = subprocess.Popen(
        _command(limits),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    deadline = time.monotonic() + limits.seconds
    try:
        _send(process, json.dumps(options) + "\n" + program)
        result = _receive(process, deadline)
    finally:
        process.kill()  # the kernel kills everything inside with it
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
    return _read_outcome(result, token, limits)


def _send(process: "subprocess.Popen[bytes]", text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text.encode("utf-8", errors="replace"))
        process.stdin.flush()
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has already ended and writes no result


def _receive(process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
    """Return what the program writes, up to a maximum; None when the time is over."""
    assert process.stdout is not None
    result = b""
    while len(result) < _MAX_RESULT_BYTES:
        timeout = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([process.stdout], [], [], timeout)
        if not ready:
            return None
        piece = os.read(process.stdout.fileno(), _MAX_RESULT_BYTES)
        if not piece:
            break
        result += piece
    return result


def _read_outcome(result: bytes | None, token: str, limits: Limits) -> Outcome:
    if result is None:
        return Outcome(False, f"timed out after {limits.seconds:g} s")
    try:
        found: Any = json.loads(result)
        is_genuine = found["token"] == token
        failure = found["failure"]
    except (ValueError, TypeError, KeyError):
        is_genuine, failure = False, None
    if not is_genuine:
        return Outcome(False, "stopped before its end: it exited, or was killed at a limit")
    return Outcome(failure is None, failure)


def _command(limits: Limits, runner: str = _RUNNER) -> list[str]:
    """Return the command that runs `runner` in bubblewrap, with only what Python needs of the machine."""
    command = [str(shutil.which("bwrap")), "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--hostname", "sandbox"]
    if os.getuid() == 0:
        # User nobody could not enter a Python in root's home. So root mounts the folders, and the runner gives up root;
        # it calls chroot first, because a process in a chroot cannot create user namespaces.
        command += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT"):
            command += ["--cap-add", capability]
        command += ["--perms", "0755", "--dir", _JAIL]
        command += [*_mount_system(""), *_mount_system(_JAIL)]
    else:
        command += ["--unshare-user", "--disable-userns", *_mount_system("")]
    root = _JAIL if os.getuid() == 0 else ""
    command += ["--proc", f"{root}/proc", "--dev", f"{root}/dev", "--remount-ro", f"{root}/dev"]
    command += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", f"{root}/tmp"]
    command += ["--remount-ro", "/", "--chdir", f"{root}/tmp", "--setenv", "HOME", "/tmp"]
    command += ["--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    return [*command, _PYTHON, "-I", "-S", "-c", runner]


def _mount_system(root: str) -> list[str]:
    """Return the options that mount the system's folders and Python below `root`, read-only."""
    options = ["--ro-bind", str(Path(sys.base_prefix).resolve()), f"{root}/python"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), f"{root}{path}"]
        elif path.exists():
            options += ["--ro-bind", str(path), f"{root}{path}"]
    return options


@cache
def require_sandbox() -> None:
    """Raise ValueError when bubblewrap is missing, cannot run here, or fails one of the probes."""
    if shutil.which("bwrap") is None:
        raise ValueError(
            "evaluation.humaneval.allow_code_execution is true, but bubblewrap, the sandbox for a model's code, is not "
            "installed "
            f"here. Run: {INSTALL}."
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
            "evaluation.humaneval.allow_code_execution is true, but bubblewrap cannot run here: "
            f"{(done.stderr.strip().splitlines() or ['no error message'])[-1]}. If user namespaces are disabled, an "
            "administrator can enable them (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu, an AppArmor profile "
            "for bwrap); start a container with --security-opt seccomp=unconfined or more rights. Or remove benchmarks "
            "that run code."
        )
    for problem, program in _PROBES.items():
        outcome = _run(program, Limits(seconds=60.0))
        if not outcome.has_passed:
            raise ValueError(
                f"evaluation.humaneval.allow_code_execution is true, but the sandbox is not safe on this machine: "
                f"{problem} "
                f"({outcome.failure}). Run benchmarks that run code on another machine."
            )


# Checked before any untrusted code runs: {problem: a program that passes if there is no such problem}.
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
    block = bytearray(1 << 34)
except MemoryError:
    block = None
assert block is None
""",
    "a user namespace can be created": """
import ctypes
CLONE_NEWUSER = 0x10000000
assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) != 0
""",
    "a network can be reached": """
with open("/proc/net/dev") as file:
    assert [line.split(":")[0].strip() for line in file if ":" in line] == ["lo"]
""",
    "the system's folders can be written": """
import os
for folder in ("/", "/usr", "/dev", "/dev/shm"):
    try:
        os.close(os.open(folder + "/written", os.O_CREAT | os.O_WRONLY))
    except OSError:
        continue
    raise AssertionError(folder)
""",
}
