"""How every script starts and ends: where its messages go, quiet libraries, one sentence per user's mistake.

Modules use `logging`: info and above is for the person at the terminal, debug for the log alone. Typed by hand, a
script writes both to stderr. A rule gives it the job's log as stdout and stderr, and names the terminal in
RETORT_CONSOLE.

A ValueError is the user's to correct: its sentence is shown without a traceback; so are a full disk, a folder that
cannot be written, other errors of the system, and an interrupt. Anything else is ours, and its traceback is kept.
"""

import errno
import fcntl
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

CONSOLE = (
    "RETORT_CONSOLE"  # the stderr of a rule's shell, as a path: /proc/<process>/fd/<descriptor>
)
_PROGRESS = "RETORT_PROGRESS"  # 0: no bars
_NOT_IN_LOG = "is_for_the_terminal_alone"
_TIME = "%Y-%m-%d %H:%M:%S"
ATTEMPT = "=== "  # begins the line that begins an attempt: logs are appended to
GOES_ON = "What is finished is kept; the same command goes on from there."
# Errors that say nothing of a file's content: no permission, too many open files, no memory, a failing disk or network.
SYSTEM_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
)
# What libraries say where they keep no errno: HDF5 and safetensors, then torch.save.
_DISK_FULL = (
    "No space left on device",
    "errno = 28",
    "Disk quota exceeded",
    "errno = 122",
    "PytorchStreamWriter failed writing",
    "iostream error",
)
# Of CUDA, of torch's allocator on a CPU, of Python and numpy, of the system, of C++.
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemoryerror",
    "can't allocate memory",
    "memoryerror",
    "cannot allocate memory",
    "bad_alloc",
)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; exit with status 1 and one sentence on a ValueError or an error of the system.

    SIGTERM (a time limit, a preemption, Snakemake ending its jobs) is an orderly end with the shell's status 143.
    """
    # Threads that wait spin a little, then sleep. On two cores, seconds per step of a 1M-parameter model, alone and
    # beside another such job: spinning for long 0.19 and 0.79, never 0.28 and 0.36, a little 0.22 and 0.45.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _terminate_by(os.getpid())
    sys.unraisablehook = _raise_again
    configure_logging()
    # Of several processes that do one job, only the first launcher begins an attempt.
    is_first = "LOCAL_RANK" not in os.environ and os.environ.get("SLURM_PROCID", "0") == "0"
    if is_first and has_log():
        print(f"{ATTEMPT}{time.strftime(_TIME)}  {Path(sys.argv[0]).name}", flush=True)
    try:
        main()
    except KeyboardInterrupt:
        logger.debug(f"interrupted by Ctrl-C. {GOES_ON}")
        raise SystemExit(130) from None
    except Exception as error:
        if is_disk_full(error):
            logger.error(f"the disk is full ({first_line(error)}): free space. {GOES_ON}")
        elif isinstance(error, ValueError):
            logger.error(str(error))
        elif isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            logger.error(f"{error.strerror}: {error.filename}. Correct that. {GOES_ON}")
        else:
            if has_log():  # where the traceback goes
                what = f"{type(error).__name__}: {first_line(error)} (see {_name_log()})"
                logger.error(what, extra={_NOT_IN_LOG: True})
            raise
        raise SystemExit(1) from None


def is_rank() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def has_log() -> bool:
    """Say whether stdout is a log that a rule gave this script."""
    return CONSOLE in os.environ


def configure_logging() -> None:
    """Send messages to the terminal and, under a rule, to the log; of several ranks the first one alone reports."""
    library = logging.getLogger("retort")
    library.handlers.clear()
    library.propagate = False  # other libraries give the root logger handlers of their own
    is_further = is_rank() and os.environ.get("RANK") != "0"
    library.setLevel(logging.WARNING if is_further else logging.DEBUG)
    if has_log():
        log = logging.StreamHandler(sys.stdout)
        log.setFormatter(_Formatter(job=Path(sys.argv[0]).stem))
        log.addFilter(lambda record: not hasattr(record, _NOT_IN_LOG))
        library.addHandler(log)
    stream = _open_console()
    if stream is not None:
        console = _Console(stream)
        console.setFormatter(_Formatter())
        console.setLevel(logging.INFO if has_log() else logging.DEBUG)
        if is_further:
            console.setLevel(logging.ERROR)
        library.addHandler(console)


def keep_to_log() -> None:
    """Show warnings and errors alone on the terminal from now on; without a log, everything as before."""
    console = _find_console()
    if console is not None and has_log():
        console.setLevel(logging.WARNING)


def open_terminal() -> TextIO | None:
    """Return the terminal that messages go to, locked for one bar; None without one, or with one of no width.

    Until it is closed, messages stand above the bar. Jobs share the terminal: it is opened again, because a lock
    belongs to an opening, and jobs inherit one from Snakemake.
    """
    console = _find_console()
    if console is None or console.level > logging.INFO or os.environ.get(_PROGRESS) == "0":
        return None
    try:
        path = os.ttyname(console.stream.fileno())
        opened = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.get_terminal_size(opened).columns == 0:
            raise OSError  # as of a container's that nobody looks at: a bar would have no width
    except OSError:
        os.close(opened)
        return None
    console.terminal = io.TextIOWrapper(io.FileIO(opened, "w"), write_through=True)
    return console.terminal


class _Formatter(logging.Formatter):
    """The message, with "warning: " or "error: " before it; in a log, each line after time, job and process."""

    def __init__(self, job: str | None = None) -> None:
        super().__init__(datefmt=_TIME)
        self._job = job

    def format(self, record: logging.LogRecord) -> str:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = kind + record.getMessage()
        if self._job is None:
            return text
        begin = f"{self.formatTime(record, self.datefmt)} {self._job}[{record.process}] "
        return "\n".join((begin + line).rstrip() for line in text.splitlines() or [""])


class _Console(logging.StreamHandler[TextIO]):
    """Writes to a person, above the bar where one is shown. A terminal that is gone stops no job."""

    terminal: TextIO | None = None  # of the bar

    def emit(self, record: logging.LogRecord) -> None:
        if self.terminal is None or self.terminal.closed:
            super().emit(record)
        elif record.levelno > logging.DEBUG:
            from tqdm import tqdm

            try:
                tqdm.write(self.format(record), file=self.terminal)
            except Exception:
                self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), (OSError, ValueError)):
            super().handleError(record)


def _find_console() -> _Console | None:
    handlers = logging.getLogger("retort").handlers
    return next((found for found in handlers if isinstance(found, _Console)), None)


def _open_console() -> TextIO | None:
    """Return what the person at the terminal reads: stderr, or what a rule's shell had as its stderr.

    A script inherits it as a descriptor. Ranks, and what srun starts, do not, and open it by its path; where that fails
    (a socket cannot be opened), and on other nodes of a job, messages are in the log alone.
    """
    if not has_log():
        return sys.stderr
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return None  # there the path may be another process's
    path = Path(os.environ[CONSOLE])
    mine = Path("/proc/self/fd") / path.name
    try:
        is_inherited = mine.exists() and mine.samefile(path)
        opened = (
            os.dup(int(path.name)) if is_inherited else os.open(path, os.O_WRONLY | os.O_NOCTTY)
        )
        # In a file (snakemake 2> file) each would else write over what another has written meanwhile.
        fcntl.fcntl(opened, fcntl.F_SETFL, fcntl.fcntl(opened, fcntl.F_GETFL) | os.O_APPEND)
    except OSError:
        return None
    return os.fdopen(opened, "w", errors="backslashreplace")


def _name_log() -> str:
    """Return the path of stdout, from here where it lies below."""
    try:
        path = Path("/proc/self/fd/1").readlink()
    except OSError:
        return "its log"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _terminate_by(process: int) -> None:
    """Let SIGTERM end this process by SystemExit, so that claims and temporaries go; its children die as ever."""

    def terminate(*_: Any) -> None:
        if os.getpid() != process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        logger.warning(f"interrupted by SIGTERM. {GOES_ON}")
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)


def _raise_again(found: "sys.UnraisableHookArgs") -> None:
    """Raise an interrupt again, a moment later, that came where Python drops every exception.

    That is in destructors and in callbacks of weak references, of which h5py has one for each object it opens: three of
    54 interrupts of a worker were lost there, and it went on to its end.
    """
    interrupt = found.exc_type
    if not issubclass(interrupt, (KeyboardInterrupt, SystemExit)):
        # Once the end has begun, what a library's destructor says of its own children's end is no use to anybody.
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            sys.__unraisablehook__(found)
        return
    args = found.exc_value.args if found.exc_value else ()

    def interrupt_again(*_: Any) -> None:
        raise interrupt(*args)

    if threading.current_thread() is threading.main_thread():  # where handlers of signals run
        signal.signal(signal.SIGALRM, interrupt_again)
        signal.setitimer(signal.ITIMER_REAL, 0.01)


def is_disk_full(error: BaseException) -> bool:
    """Say whether an exception, or what it was raised from, comes of a full disk or quota, whichever library wrote."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(chain) for words in _DISK_FULL):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def is_out_of_memory(words: object) -> bool:
    """Say whether an exception, or a log, speaks of memory that was not to be had, a GPU's or the machine's."""
    text = f"{type(words).__name__}: {words}".lower()
    return any(sign in text for sign in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
