"""Several processes that train one student: *ranks*, started by torchrun, of which none outlives what started it.

On several nodes srun starts one launcher on each, and these meet at a port of the first node.
"""

import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from retort.cli import is_rank
from retort.config.checks import require_even_share

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER = "RETORT_LAUNCHER"  # the process that started this rank, where we did
# What an outer launcher (torchrun, mpirun, srun, accelerate) may have left behind, and accelerate would believe.
_OTHERS = re.compile(
    r"(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_(SIZE|RANK)"
)
_SETTINGS = ("ACCELERATE_", "FSDP_")  # they would decide what the config does not
# Where launchers meet: below the ports that Linux gives to whoever asks for any (32768 and more).
_FIRST_PORT, _PORTS = 20_000, 10_000


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


def find_meeting(nodes: int) -> list[str]:
    """Return torchrun's flags by which the launchers of `nodes` nodes, one on each, find each other.

    Their step of a SLURM job says which nodes those are; the port is made of the job's and the step's number, so that
    jobs which share a node seldom meet at one, and a retry, which is another job, at another.
    Raises ValueError where srun has not started one launcher on each of so many nodes.
    """
    if nodes == 1:
        return ["--standalone"]
    names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS")
    if any(os.environ.get(name) != str(nodes) for name in names):
        raise ValueError(
            f"training.nodes is {nodes}, but srun has not started this command once on each of {nodes} nodes. Use "
            "snakemake --profile profiles/slurm, which does, or put in front of the command, in an allocation of so "
            f"many nodes: srun --nodes={nodes} --ntasks-per-node=1. On one machine use training.nodes: 1."
        )
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    return [
        f"--nnodes={nodes}",
        f"--node-rank={os.environ['SLURM_NODEID']}",
        f"--master-addr={first_node(os.environ['SLURM_STEP_NODELIST'])}",
        f"--master-port={_FIRST_PORT + (64 * job + step) % _PORTS}",
    ]


def first_node(nodes: str) -> str:
    """Return the first name of a list of nodes as SLURM writes it: gpu-[003-007,9],big1 -> gpu-003."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])


def launch_ranks(count: int, *, meeting: Sequence[str], threads: int) -> None:
    """Run this very command line in `count` processes of this node by torchrun, and wait for them.

    `meeting`: of find_meeting. Raises SystemExit(1) when one fails: it has said why, and torchrun has ended the others
    of its node, and with them ends whoever talks to them; and with the shell's status when a signal ended them all.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice is of no use to a user
    script = str(sys.modules["__main__"].__file__)  # sys.argv[0] may be the name of a command
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        torchrun([*meeting, f"--nproc-per-node={count}", script, *sys.argv[1:]])
    except ChildFailedError:
        raise SystemExit(1) from None
    except SignalException as error:
        logger.warning(
            f"interrupted by {error.sigval.name}: all ranks ended. The same command goes on."
        )
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
