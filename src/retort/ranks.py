"""Several processes that train one student: *ranks*, started by torchrun, of which none outlives what started it."""

import ctypes
import os
import re
import signal
import sys

from retort.commands import say
from retort.config_checks import require_even_share

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER = "RETORT_LAUNCHER"  # the process that started this rank, where we did
# What an outer launcher (torchrun, mpirun, srun, accelerate) may have left behind, and accelerate would believe.
_OTHERS = re.compile(
    r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(SIZE|RANK)"
)
_SETTINGS = ("ACCELERATE_", "FSDP_")  # they would decide what the config does not


def is_rank() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def ignore_surroundings() -> None:
    """Forget what other launchers and accelerate's settings say in the environment: the config decides."""
    for name in list(os.environ):
        if name.startswith(_SETTINGS) or (_OTHERS.fullmatch(name) and not is_rank()):
            del os.environ[name]


def rank() -> int:
    """Return this process's number among those that train together; 0 where it is alone."""
    return int(os.environ["RANK"]) if is_rank() else 0


def local_rank() -> int:
    """Return this process's number on its machine: its GPU among those that are visible."""
    return int(os.environ["LOCAL_RANK"]) if is_rank() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def launch_ranks(count: int, *, threads: int) -> None:
    """Run this very command line in `count` processes by torchrun, and wait for them.

    Raises SystemExit(1) when one fails: it has said why, and torchrun has ended the others; and with the shell's
    status when a signal ended them all.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice is of no use to a user
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        torchrun(["--standalone", f"--nproc-per-node={count}", *sys.argv])
    except ChildFailedError:
        raise SystemExit(1) from None
    except SignalException as error:
        say(f"interrupted by {error.sigval.name}: all ranks ended. The same command goes on.")
        raise SystemExit(128 + error.sigval) from None


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the launcher dies: ranks that wait for each other would never end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None and int(launcher) != os.getppid():  # it died before
        raise SystemExit("the launcher of this rank is gone")


def cut_global_batch(batch_size: int, accumulation: int, ranks: int) -> tuple[int, int]:
    """Return (sequences in a rank's forward pass, forward passes a step), for the same global batch on any ranks.

    Of a forward pass of `batch_size` sequences each rank gets its share. Raises ConfigError when the global batch,
    batch_size * accumulation, does not go into so many parts.
    """
    require_even_share(batch_size, accumulation, ranks)
    share = batch_size * accumulation // ranks
    most = max(1, batch_size // ranks)
    size = max(n for n in range(1, most + 1) if share % n == 0)
    return size, share // size
