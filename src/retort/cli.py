"""How every script starts, logs and ends: `run_script` around its main function.

Modules use `logging`: info and above goes to the terminal and the log, debug to the log only. A script run by hand
writes everything to stderr. A rule's script has the job's log as stdout and stderr, and RETORT_CONSOLE names the
terminal.

A ValueError is a user's mistake: its message is shown without a traceback, as are a full disk, a folder that cannot be
written, other errors of the system, and an interrupt. Any other exception is a bug and keeps its traceback.
"""

import argparse
import errno
import fcntl
import io
import logging
import os
import re
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
_PROGRESS = "RETORT_PROGRESS"  # 0: no progress bars
_TERMINAL_ONLY = "is_terminal_only"
_TIME = "%Y-%m-%d %H:%M:%S"
ATTEMPT = "=== "  # prefix of the first line of an attempt: each attempt appends to the log
# What begins each line of a log: time, job, process.
LINE_HEAD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+\[\d+\] ?")
RESUME = "Finished work is kept: rerun the same command to resume."
# Errors that say nothing about a file's content: no permission, too many open files, no memory, a failing disk or
# network.
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
# Messages of libraries that set no errno: HDF5 and safetensors, then torch.save.
_DISK_FULL = (
    "No space left on device",
    "errno = 28",
    "Disk quota exceeded",
    "errno = 122",
    "PytorchStreamWriter failed writing",
    "iostream error",
)
# From CUDA, torch's CPU allocator, Python and numpy, the system, C++.
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemoryerror",
    "can't allocate memory",
    "memoryerror",
    "cannot allocate memory",
    "bad_alloc",
)


def script_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return the parser of a script; `--help` begins with the script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; exit with status 1 and one message on a ValueError or an error of the system.

    SIGTERM (a time limit, a preemption, Snakemake stopping its jobs) ends the script cleanly with the shell's status
    143, Ctrl-C with 130.
    """
    # Waiting threads spin briefly, then sleep. Seconds per step of a 1M-parameter model on two cores, alone and beside
    # another such job: long spinning 0.19 and 0.79, none 0.28 and 0.36, brief 0.22 and 0.45.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _exit_on_sigterm(os.getpid())
    sys.unraisablehook = _raise_later
    configure_logging()
    # If several processes do one job, only the first launcher writes the attempt's first line.
    is_first = "LOCAL_RANK" not in os.environ and os.environ.get("SLURM_PROCID", "0") == "0"
    if is_first and has_log():
        print(f"{ATTEMPT}{time.strftime(_TIME)}  {Path(sys.argv[0]).name}", flush=True)
    try:
        main()
    except KeyboardInterrupt:
        logger.debug(f"interrupted by Ctrl-C. {RESUME}")
        raise SystemExit(130) from None
    except Exception as error:
        if is_disk_full(error):
            logger.error(f"the disk is full ({first_line(error)}): free space. {RESUME}")
        elif isinstance(error, ValueError):
            logger.error(str(error))
        elif isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            logger.error(f"{error.strerror}: {error.filename}. Fix this. {RESUME}")
        else:
            if has_log():  # where the traceback goes
                what = f"{type(error).__name__}: {first_line(error)} (see {_name_log()})"
                logger.error(what, extra={_TERMINAL_ONLY: True})
            raise
        raise SystemExit(1) from None


def print_text(text: str) -> None:
    """Print what a command is asked for. A reader that has enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes it when it ends


def is_rank() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def has_log() -> bool:
    """Return whether stdout is the log of a rule's job."""
    return CONSOLE in os.environ


def configure_logging() -> None:
    """Send messages to the terminal and, in a rule's job, to the log; of several ranks, only rank 0 reports."""
    library = logging.getLogger("retort")
    library.handlers.clear()
    library.propagate = False  # other libraries add handlers to the root logger
    is_other_rank = is_rank() and os.environ.get("RANK") != "0"
    library.setLevel(logging.WARNING if is_other_rank else logging.DEBUG)
    if has_log():
        log = logging.StreamHandler(sys.stdout)
        log.setFormatter(_Formatter(job=Path(sys.argv[0]).stem))
        log.addFilter(lambda record: not hasattr(record, _TERMINAL_ONLY))
        library.addHandler(log)
    stream = _open_console()
    if stream is not None:
        console = _Console(stream)
        console.setFormatter(_Formatter())
        console.setLevel(logging.INFO if has_log() else logging.DEBUG)
        if is_other_rank:
            console.setLevel(logging.ERROR)
        library.addHandler(console)


def quiet_terminal() -> None:
    """Show only warnings and errors on the terminal from now on; without a log, change nothing."""
    console = _find_console()
    if console is not None and has_log():
        console.setLevel(logging.WARNING)


def open_terminal() -> TextIO | None:
    """Return the terminal for one progress bar, locked; None if there is none, another job has it, or its width is 0.

    Until it is closed, messages are printed above the bar. Jobs share the terminal and inherit its descriptor from
    Snakemake; a lock belongs to an open file, so the terminal is opened again.
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
            raise OSError  # as in a container without an attached terminal
    except OSError:
        os.close(opened)
        return None
    console.terminal = io.TextIOWrapper(io.FileIO(opened, "w"), write_through=True)
    return console.terminal


class _Formatter(logging.Formatter):
    """The message, prefixed with "warning: " or "error: "; in a log, every line also with time, job and process."""

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
    """Writes to the terminal, above the progress bar if there is one. A closed terminal is no error."""

    terminal: TextIO | None = None  # where the bar is

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
    """Return the stream that the user reads: stderr, or the stderr of a rule's shell.

    The script inherits its descriptor. Ranks and what srun starts do not, and open it by its path; if that fails (a
    socket cannot be opened), and on other nodes of a job, messages go to the log only.
    """
    if not has_log():
        return sys.stderr
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return None  # on this node the path may belong to another process
    path = Path(os.environ[CONSOLE])
    mine = Path("/proc/self/fd") / path.name
    try:
        is_inherited = mine.exists() and mine.samefile(path)
        opened = (
            os.dup(int(path.name)) if is_inherited else os.open(path, os.O_WRONLY | os.O_NOCTTY)
        )
        # Without O_APPEND, processes would overwrite each other's messages in a file (snakemake 2> file).
        fcntl.fcntl(opened, fcntl.F_SETFL, fcntl.fcntl(opened, fcntl.F_GETFL) | os.O_APPEND)
    except OSError:
        return None
    return os.fdopen(opened, "w", errors="backslashreplace")


def _name_log() -> str:
    """Return the path of stdout, relative if it is below the current folder."""
    try:
        path = Path("/proc/self/fd/1").readlink()
    except OSError:
        return "its log"
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _exit_on_sigterm(process: int) -> None:
    """Exit by SystemExit on SIGTERM, which removes claims and temporaries; child processes die by the signal."""

    def terminate(*_: Any) -> None:
        if os.getpid() != process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # exit only once
        logger.warning(f"interrupted by SIGTERM. {RESUME}")
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)


def _raise_later(found: "sys.UnraisableHookArgs") -> None:
    """Raise an interrupt again, a moment later, that was raised where Python drops every exception.

    Such places are destructors and callbacks of weak references; h5py has one of those for each object it opens. Three
    of 54 interrupts of a worker were lost there, and it ran to its end.
    """
    interrupt = found.exc_type
    if not issubclass(interrupt, (KeyboardInterrupt, SystemExit)):
        # During an exit, errors in destructors (a library whose own children have ended) are noise.
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            sys.__unraisablehook__(found)
        return
    args = found.exc_value.args if found.exc_value else ()

    def interrupt_again(*_: Any) -> None:
        raise interrupt(*args)

    if (
        threading.current_thread() is threading.main_thread()
    ):  # the only one that runs signal handlers
        signal.signal(signal.SIGALRM, interrupt_again)
        signal.setitimer(signal.ITIMER_REAL, 0.01)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception, or one it was raised from, means a full disk or quota, whichever library wrote."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(cause) for message in _DISK_FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def is_out_of_memory(source: BaseException | str) -> bool:
    """Return whether an exception, or the text of a log, reports that a GPU or the machine ran out of memory."""
    text = f"{type(source).__name__}: {source}".lower()
    return any(message in text for message in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
