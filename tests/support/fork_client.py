"""What stands for the interpreter in tests: asks a fork server for the process, and is that process to its parent.

It hands over arguments, environment, working folder, umask, limits, ignored signals and every inheritable descriptor,
passes signals on, and ends as the job ended. What the servers do not take is executed by the real interpreter instead.
Of modules in Python it imports `os` alone: this takes some ten milliseconds of processor for every job.
"""

# ruff: noqa: PTH115, PTH208 (pathlib takes longer to import than all the rest)
import _signal  # type: ignore[import-not-found]  # of CPython, without stubs
import _socket
import marshal
import os
import resource
import sys

MAX_DESCRIPTORS = 200  # the kernel hands over 253 at most
FORWARDED = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGABRT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGALRM,
    _signal.SIGCONT,  # before SIGTERM, SLURM wakes what is stopped
    _signal.SIGTERM,
)
LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]


def is_plain(words: "list[str]") -> bool:
    """Say whether a command line is `script.py ...`, `-m module ...` or `-c code ...`, with no other flag."""
    if words[:1] in (["-m"], ["-c"]):
        return len(words) > 1
    return bool(words) and words[0].endswith(".py") and os.access(words[0], os.R_OK)


def surroundings() -> "tuple[object, ...]":
    """Return what a job and its server must have in common: rights, CPUs, and namespaces.

    A job enters its client's UTS namespace, which is what tells the nodes of a pretended cluster apart.
    """
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "user")]
    # Of the groups, the own one may be named or not.
    rights = (*os.getresuid(), *os.getresgid(), *sorted({os.getegid(), *os.getgroups()}))
    return (*spaces, *rights, *sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0))


def inheritable() -> "list[int]":
    """Return the open descriptors that an executed program would have."""
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if os.get_inheritable(descriptor):
                found.append(descriptor)
        except OSError:  # the folder's own, closed by now
            continue
    return sorted(found)


def ask(
    socket: "_socket.socket", words: "list[str]", descriptors: "list[int]", *, is_unbuffered: bool
) -> None:
    """Send what is to run; raise OSError when it does not fit a message."""
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "words": words,
        "is_unbuffered": is_unbuffered,
        "env": dict(os.environb),
        "descriptors": descriptors,
        "umask": umask,
        "limits": [(name, *resource.getrlimit(name)) for name in LIMITS],
        "ignored": [s for s in FORWARDED if _signal.getsignal(s) == _signal.SIG_IGN],
        "surroundings": surroundings(),
    }
    cwd = os.open(".", os.O_PATH)
    machine = os.open("/proc/self/ns/uts", os.O_RDONLY)
    handed = b"".join(n.to_bytes(4, sys.byteorder) for n in (cwd, machine, *descriptors))
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, handed)
    socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, 1 << 22)
    socket.sendmsg([marshal.dumps(request)], [rights])
    os.close(cwd)
    os.close(machine)


def end_as(status: int) -> None:
    """End this process by the status that another was waited for with."""
    if not os.WIFSIGNALED(status):
        os._exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (_signal.SIGKILL, _signal.SIGSTOP):
        _signal.signal(number, _signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main(interpreter: str, path: str, words: "list[str]") -> None:
    """Have the job done by a server if one takes it, else by the interpreter."""
    descriptors = inheritable()
    plain = words[1:] if words[:1] == ["-u"] else words
    is_fit = is_plain(plain) and len(descriptors) < MAX_DESCRIPTORS
    if is_fit and not _signal.pthread_sigmask(_signal.SIG_BLOCK, FORWARDED):
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            socket.connect(path)
            ask(socket, plain, descriptors, is_unbuffered=plain is not words)
            said = socket.recv(64)
        except OSError:
            said = b"refused"
        if said == b"taken":
            wait_for_end(socket, descriptors)
        socket.close()
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, FORWARDED)
    os.execv(interpreter, [interpreter, *words])


def wait_for_end(socket: "_socket.socket", descriptors: "list[int]") -> None:
    """Pass signals on until the job has ended, then end as it did."""
    for number in FORWARDED:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, lambda received, _: socket.send(bytes([received])))
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, FORWARDED)
    for descriptor in descriptors:
        if descriptor > 2:  # a pipe ends when the job closes it
            os.close(descriptor)
    status = socket.recv(64)
    if not status:
        os.write(2, b"the fork server ended before the job\n")
        os._exit(1)
    end_as(int(status))
