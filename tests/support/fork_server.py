"""A process that has loaded libraries and does nothing but fork: each child is a job as if Python had just started.

The jobs' own code, `retort` and the scripts, is never loaded before the fork. What a child shares with its server and
a real start would not: the seed of hashes of strings, the layout of the address space, and which libraries are loaded.
"""

import atexit
import builtins
import ctypes
import fcntl
import gc
import json
import marshal
import os
import random
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.machinery import BuiltinImporter, SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn

Request = dict[str, Any]

_SET_MEMORY, _ALL = 35, 14  # of prctl(2): PR_SET_MM, PR_SET_MM_MAP
_shown: list[Any] = []  # memory that /proc shows

LIBRARIES = {
    "snakemake": "snakemake.cli snakemake.profiles snakemake.report.html_reporter snakemake.storage smart_open "
    "yte argparse_dataclass jinja2 requests filelock xxhash graphlib difflib mimetypes platformdirs",
    # What keeps PyTorch out of its process; transformers as it is where PyTorch is not to be found.
    "light": "numpy h5py numba pyarrow datasets tokenizers transformers.models.auto.tokenization_auto filelock xxhash "
    "transformers.tokenization_utils_tokenizers transformers.models.llama.configuration_llama "
    "jinja2 yaml pydantic zstandard tenacity tqdm matplotlib.figure matplotlib.backends.backend_agg "
    "matplotlib.backends.backend_svg pandas.io.formats.string pandas.io.formats.csvs",
    "full": "numpy torch h5py numba pyarrow datasets tokenizers accelerate safetensors.torch filelock xxhash "
    "transformers.trainer transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto "
    "transformers.models.llama.modeling_llama torch.profiler torch.utils.serialization.config tabulate "
    "jinja2 yaml pydantic zstandard tenacity tqdm",
}


def runs_snakemake(words: list[str]) -> bool:
    """Say whether a command line is of a process that runs Snakemake itself."""
    if words[0] == "-m":
        return words[1] == "snakemake" or words[1:3] == ["retort", "run"]
    return Path(words[0]).stem == "quick_snakemake"


def starts_ranks(words: list[str]) -> bool:
    """Say whether a command line may start processes by torchrun."""
    return words[:2] == ["-m", "torch.distributed.run"] or Path(words[0]).stem == "train"


def set_by_scripts(environment: Mapping[str, str], sources: str) -> dict[str, str]:
    """Return an environment with what a script, whose `retort` lies in `sources`, sets before it imports libraries."""
    code = "import json, os; from retort.cli import run_script\n"
    code += "run_script(lambda: print(json.dumps(dict(os.environ))))"
    paths = {**environment, "PYTHONPATH": sources}
    said = subprocess.run([sys.executable, "-c", code], env=paths, check=True, stdout=-1).stdout
    found: dict[str, str] = json.loads(said.splitlines()[-1])
    return found


def load(kind: str) -> None:
    """Import the libraries of a kind, with the variables that a script sets before it imports them."""
    if kind != "snakemake":
        os.environ.update(set_by_scripts(os.environ, os.environ.pop("RETORT_SOURCES")))
        del os.environ["PYTHONPATH"]
    if kind == "light":
        sys.modules["torch"] = None  # type: ignore[assignment]
    for name in LIBRARIES[kind].split():
        import_module(name)
    # A first model loads most of pydantic, and looks for its plugins among all packages.
    import_module("pydantic").create_model("First", field=(int, 0))
    if kind == "light":
        del sys.modules["torch"]
    assert "retort" not in sys.modules, "a job must load its own"


def main(kind: str, descriptor: int, stand_in: str) -> NoReturn:
    """Serve, and in each child run a job to its end."""
    finish(serve(kind, descriptor, stand_in))


def serve(kind: str, descriptor: int, stand_in: str) -> Callable[[], object]:
    """Fork jobs until nobody asks any more; return only in a job, with what it has to do."""
    asked = socket.socket(fileno=descriptor)
    load(kind)
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, every page
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    jobs: dict[int, socket.socket] = {}  # by the process's id
    while True:
        waiting = {c.fileno(): pid for pid, c in jobs.items()}
        poll = select.poll()
        for number in (asked.fileno(), woken, *waiting):
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll():
            if number == woken:
                os.read(woken, 4096)
                reap(jobs)
            elif number != asked.fileno():
                pass_on(jobs, waiting[number])
            else:
                request, descriptors = receive(asked)
                if request is None:
                    end(jobs)
                job = os.fork()
                if job == 0:
                    for held in (asked, *jobs.values()):
                        held.detach()
                    return become(request, descriptors, stand_in)
                with suppress(OSError):  # whichever of the two is first
                    os.setpgid(job, job)
                jobs[job] = socket.socket(fileno=descriptors[0])
                for spare in descriptors[1:]:
                    os.close(spare)
                jobs[job].send(b"taken")


def receive(asked: socket.socket) -> tuple[Request | None, list[int]]:
    """Return what to run and descriptors: the client, its folder, its UTS namespace, the job's; None at the end."""
    message, descriptors, _, _ = socket.recv_fds(asked, 1 << 22, 256)
    return (marshal.loads(message) if message else None), list(descriptors)


def pass_on(jobs: dict[int, socket.socket], job: int) -> None:
    """Give a job's process group the signal that its client got; SIGKILL where the client is gone."""
    if job not in jobs:
        return
    try:
        said = jobs[job].recv(1)
    except OSError:
        said = b""
    os.killpg(job, said[0] if said else signal.SIGKILL)
    if not said:
        jobs.pop(job).close()


def reap(jobs: dict[int, socket.socket]) -> None:
    """Tell the clients of jobs that have ended how they did."""
    while True:
        try:
            job, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if job == 0:
            return
        if job in jobs:
            client = jobs.pop(job)
            with client, suppress(OSError):  # it was killed a moment ago
                client.send(str(status).encode())


def end(jobs: dict[int, socket.socket]) -> NoReturn:
    """Kill what still runs, say what all jobs took, and exit."""
    for job in jobs:
        os.killpg(job, signal.SIGKILL)
    while jobs:
        reap(jobs)
    own, theirs = (
        resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    seconds = [round(used.ru_utime + used.ru_stime, 1) for used in (own, theirs)]
    print(f"seconds of processor: {seconds[0]} of its own, {seconds[1]} of its jobs", flush=True)
    os._exit(0)


def become(request: Request, descriptors: list[int], stand_in: str) -> Callable[[], object]:
    """Make this child what the client would be as an interpreter that just started; return what runs its code."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        is_ignored = number in request["ignored"] or number in (signal.SIGPIPE, signal.SIGXFSZ)
        signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fchdir(descriptors[1])
    is_elsewhere = enter_machine(descriptors[2])
    os.umask(request["umask"])
    os.environb.clear()
    os.environb.update(request["env"])
    take_descriptors(dict(zip(request["descriptors"], descriptors[3:], strict=True)))
    if is_elsewhere:
        show_as(request)
    for name, soft, hard in request["limits"]:
        if resource.getrlimit(name) != (soft, hard):
            resource.setrlimit(name, (soft, hard))
    if runs_snakemake(request["words"]):
        sys.executable = stand_in  # its jobs are forked as well
    if starts_ranks(request["words"]):
        os.environ["PYTHON_EXEC"] = stand_in  # of torchrun
    if "RETORT_LAUNCHER" in os.environ:
        os.environ["RETORT_LAUNCHER"] = str(os.getppid())  # a rank looks whether its parent lives
    if request["is_unbuffered"]:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # TextIOWrapper's
    tempfile.tempdir = None
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    sys.modules.pop(__name__, None)
    return prepare(request["words"])


def enter_machine(space: int) -> bool:
    """Enter a UTS namespace; return False if this process is in it."""
    if os.fstat(space).st_ino == Path("/proc/self/ns/uts").stat().st_ino:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(space, 0) == 0, os.strerror(ctypes.get_errno())
    return True


def show_as(request: Request) -> None:
    """Let /proc show this job's command line and environment, not its server's (prctl(2), PR_SET_MM_MAP)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    words = [os.fsencode(word) for word in (sys.executable, *request["words"])]
    variables = [name + b"=" + value for name, value in request["env"].items()]
    texts = [b"".join(item + b"\0" for item in items) for items in (words, variables)]
    _shown[:] = [ctypes.create_string_buffer(text, len(text)) for text in texts]
    starts = [ctypes.addressof(shown) for shown in _shown]
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # Code from and to; data from and to, and where the heap begins.
    code, data, stack = fields[23:25], fields[42:45], fields[25]
    ends = [start + len(text) for start, text in zip(starts, texts, strict=True)]
    of_texts = [at for both in zip(starts, ends, strict=True) for at in both]
    # At the end: no auxiliary vector, of size 0, and no file.
    numbers = [*map(int, (*code, *data)), libc.sbrk(0), int(stack), *of_texts, 0, 0xFFFFFFFF << 32]
    layout = (ctypes.c_uint64 * len(numbers))(*numbers)
    done = libc.prctl(_SET_MEMORY, _ALL, layout, ctypes.c_ulong(ctypes.sizeof(layout)), 0)
    assert done == 0, os.strerror(ctypes.get_errno())


def take_descriptors(wanted: dict[int, int]) -> None:
    """Have the descriptors under the numbers wanted, and no others."""
    above = max(wanted, default=0) + 1
    high = {number: fcntl.fcntl(given, fcntl.F_DUPFD, above) for number, given in wanted.items()}
    start = 0
    for kept in sorted(high.values()):
        os.closerange(start, kept)
        start = kept + 1
    os.closerange(start, 1 << 20)
    for number, given in high.items():
        os.dup2(given, number)
        os.close(given)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number not in wanted:
            setattr(sys, name, None)
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]  # TextIOWrapper's


def prepare(words: list[str]) -> Callable[[], object]:
    """Set what the interpreter's command line sets; return what runs its code as `__main__`."""
    sys.orig_argv = [sys.executable, *words]
    paths = os.environ.get("PYTHONPATH")
    given = [str(Path(path).absolute()) for path in paths.split(os.pathsep)] if paths else []
    main = sys.modules["__main__"].__dict__
    main.clear()
    main |= {"__name__": "__main__", "__builtins__": builtins, "__annotations__": {}}
    main |= {"__doc__": None, "__package__": None, "__loader__": None, "__spec__": None}
    # As `site` does: a path that a .pth file names too (an editable install) is there once.
    sys.path[:] = [*given, *(path for path in sys.path if path not in given)]
    customize(given)
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        sys.path.insert(0, str(Path.cwd()))
        # What the interpreter itself calls.
        return partial(runpy._run_module_as_main, words[1])  # type: ignore[attr-defined]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        main["__loader__"] = BuiltinImporter
        return partial(run, words[1], "<string>", main)
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    main |= {"__file__": words[0], "__cached__": None}
    main["__loader__"] = SourceFileLoader("__main__", words[0])
    return partial(run, Path(words[0]).read_bytes(), words[0], main)


def customize(folders: list[str]) -> None:
    """Run what folders on PYTHONPATH have for the start of every interpreter."""
    for name in ("sitecustomize", "usercustomize"):
        if any(Path(folder, f"{name}.py").exists() for folder in folders):
            sys.modules.pop(name, None)
            import_module(name)


def run(source: str | bytes, path: str, main: dict[str, Any]) -> None:
    """Run code as `__main__`."""
    exec(compile(source, path, "exec", dont_inherit=True), main)


def finish(job: Callable[[], object]) -> NoReturn:
    """Run a job and end as the interpreter does, but for the destructors of all that its modules hold.

    Those take 0.4 s of processor, most of it for copying the server's pages. Handlers of atexit run, Python's and C's.
    """
    status, is_interrupted = 0, False
    try:
        job()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status, is_interrupted = 1, isinstance(error, KeyboardInterrupt)
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter itself calls
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            status = 120
    if is_interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    ctypes.PyDLL(None).exit(
        status & 0xFF
    )  # holding the interpreter's lock: no thread of Python's runs meanwhile
    raise AssertionError("exit returned")
