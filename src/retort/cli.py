"""How every script starts and ends: quiet libraries, one line per message, one sentence per user's mistake.

Progress goes to stderr, which a rule shows on the terminal and keeps in its log; so do errors. A ValueError is the
user's to mend: its sentence is printed without a traceback; so are a full disk, a folder that cannot be written, other
errors of the system, and an interrupt. Anything else is ours, and keeps its traceback.
"""

import errno
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    # Of several processes that do one job, only the first launcher begins an attempt.
    is_first = "LOCAL_RANK" not in os.environ and os.environ.get("SLURM_PROCID", "0") == "0"
    if is_first and not sys.stdout.isatty():
        note(f"{ATTEMPT}{time.strftime('%Y-%m-%d %H:%M:%S')}  {Path(sys.argv[0]).name}")
    try:
        main()
    except KeyboardInterrupt:
        note(f"interrupted by Ctrl-C. {GOES_ON}")
        raise SystemExit(130) from None
    except Exception as error:
        if is_disk_full(error):
            say(f"error: the disk is full ({first_line(error)}): free space. {GOES_ON}")
        elif isinstance(error, ValueError):
            say(f"error: {error}")
        elif isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            say(f"error: {error.strerror}: {error.filename}. Mend that and go on. {GOES_ON}")
        else:
            raise
        raise SystemExit(1) from None


def _terminate_by(process: int) -> None:
    """Let SIGTERM end this process by SystemExit, so that claims and temporaries go; its children die as ever."""

    def terminate(*_: Any) -> None:
        if os.getpid() != process:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        say(f"interrupted by SIGTERM. {GOES_ON}")
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


def say(message: str) -> None:
    """Print one line for the person at the terminal (and for the log)."""
    print(message, file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Print one line for the log alone (a rule's stdout goes nowhere else)."""
    print(message, flush=True)
