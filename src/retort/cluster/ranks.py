"""Processes that train one student together: *ranks*, started by torchrun and killed with it.

On several nodes, srun starts one launcher on each; their rendezvous is a port of the first node.
"""

import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from retort.cli import RESUME, is_rank
from retort.cluster.interrupts import Interrupts
from retort.config.training import require_even_share

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER = "RETORT_LAUNCHER"  # the id of the process that started this rank
# Variables that an outer launcher (torchrun, mpirun, srun, accelerate) may have set and accelerate would read.
_LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(SIZE|RANK)"
)
_SETTINGS = (
    "ACCELERATE_",
    "FSDP_",
)  # prefixes of accelerate's settings, which would add to the config
# For ranks to end after a signal: they finish a step and write a checkpoint.
_PATIENCE_S = 600
# Ports of the rendezvous: below Linux's ephemeral ports (32768 and up).
_FIRST_PORT, _PORTS = 20_000, 10_000


def clear_launcher_environment() -> None:
    """Remove the variables of other launchers and accelerate's settings from the environment: the config decides."""
    for name in list(os.environ):
        if name.startswith(_SETTINGS) or (_LAUNCHER_VARIABLES.fullmatch(name) and not is_rank()):
            del os.environ[name]


def rank() -> int:
    """Return this process's rank among all that train together; 0 if it is alone."""
    return int(os.environ["RANK"]) if is_rank() else 0


def local_rank() -> int:
    """Return this process's rank on its node, which is the index of its GPU among the visible ones."""
    return int(os.environ["LOCAL_RANK"]) if is_rank() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def rendezvous_flags(nodes: int) -> list[str]:
    """Return torchrun's flags for the rendezvous of `nodes` launchers, one on each node.

    The nodes are those of the SLURM step. The port depends on the job's and the step's id, so that jobs that share a
    node rarely use the same one, and a retry, which is another job, uses another.
    Raises ValueError when srun did not start one launcher on each of `nodes` nodes.
    """
    if nodes == 1:
        return ["--standalone"]
    names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS")
    if any(os.environ.get(name) != str(nodes) for name in names):
        raise ValueError(
            f"training.nodes is {nodes}, but srun has not started this command once on each of {nodes} nodes. Use "
            f"snakemake --profile profiles/slurm, which does; or, in an allocation of {nodes} nodes, put this in "
            f"front of the command: srun --nodes={nodes} --ntasks-per-node=1. On one machine use training.nodes: 1."
        )
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    return [
        f"--nnodes={nodes}",
        f"--node-rank={os.environ['SLURM_NODEID']}",
        f"--master-addr={first_node(os.environ['SLURM_STEP_NODELIST'])}",
        f"--master-port={_FIRST_PORT + (64 * job + step) % _PORTS}",
    ]


def first_node(nodes: str) -> str:
    """Return the first node in SLURM's notation of a list: gpu-[003-007,9],big1 -> gpu-003."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def launch_ranks(count: int, *, rendezvous: Sequence[str], threads: int) -> None:
    """Run this command line in `count` processes on this node by torchrun, and wait for them.

    `rendezvous` are the flags of `rendezvous_flags`, `threads` the OpenMP threads of a rank. Raises SystemExit(1) when
    a rank fails: it has logged why, and torchrun has ended the node's others; with the shell's status of a signal when
    one ended them all.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # silences DDP's advice
    script = str(sys.modules["__main__"].__file__)  # sys.argv[0] may be the name of a command
    os.environ[_LAUNCHER] = str(os.getpid())
    options = [
        f"--nproc-per-node={count}",
        "--signals-to-handle=SIGHUP,SIGQUIT",
        f"--shutdown-timeout={_PATIENCE_S}",
    ]

    def pass_on(number: int) -> None:
        raise SignalException("", signal.Signals(number))  # torchrun sends it to the ranks

    try:
        # "--": else torchrun takes --signal for one of its own options.
        with Interrupts(pass_on, again=_end_at_once):
            torchrun([*rendezvous, *options, "--", script, *sys.argv[1:]])
    except ChildFailedError:
        raise SystemExit(1) from None
    except SignalException as error:
        logger.warning(f"interrupted by {error.sigval.name}: all ranks ended. {RESUME}")
        raise SystemExit(128 + error.sigval) from None


def _end_at_once(number: int) -> None:
    """End this launcher, and by that its ranks (`die_with_parent`): they may wait for each other, deaf to signals."""
    logger.warning(f"interrupted again: all ranks ended without a checkpoint. {RESUME}")
    os._exit(128 + number)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the launcher dies; ranks that wait for each other would never end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None and int(launcher) != os.getppid():  # it is dead already
        raise SystemExit("the launcher of this rank is gone")


def split_global_batch(batch_size: int, accumulation: int, ranks: int) -> tuple[int, int]:
    """Return (sequences in a rank's forward pass, forward passes per step) for the same global batch on any ranks.

    All ranks together have at most `batch_size` sequences in a forward pass, or one each. Raises ConfigError when the
    global batch, batch_size * accumulation, is not a multiple of `ranks`.
    """
    require_even_share(batch_size, accumulation, ranks)
    share = batch_size * accumulation // ranks
    most = max(1, batch_size // ranks)
    size = max(n for n in range(1, most + 1) if share % n == 0)
    return size, share // size
