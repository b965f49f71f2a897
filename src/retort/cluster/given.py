"""The GPUs that a process was given, beside those that PyTorch sees: no job runs on others, or on a CPU instead.

They are given by CUDA_VISIBLE_DEVICES, which a lease, a scheduler or a person sets. On a machine without GPUs it is not
set, and nothing is expected.
"""

import os
import re
from itertools import takewhile

GPU_ID = re.compile(r"\d+|(GPU|MIG)-[A-Za-z0-9/-]+")
# Lock files of the GPUs that a process with a lease, and its children, may use; "": there was none to lease.
IN_USE = "RETORT_GPUS_IN_USE"
# For tests: GPUs are leased and counted, and the work is done on the CPU.
SIMULATED = "RETORT_SIMULATED_GPUS"
_OF_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


def visible_gpus() -> tuple[str, ...] | None:
    """Return the ids in CUDA_VISIBLE_DEVICES, None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    # CUDA stops at the first entry that is not an id, such as -1.
    return tuple(takewhile(GPU_ID.fullmatch, (gpu.strip() for gpu in visible.split(","))))


def require_given(num_seen: int, *, build: str, has_cuda: bool) -> None:
    """Compare the GPUs that PyTorch sees with those that this process was given.

    num_seen: GPUs that PyTorch sees; build: its version; has_cuda: whether it is a build for GPUs at all. Raises
    ValueError where it sees fewer than were given, or where a job sees some though none was given to it.
    """
    if os.environ.get(SIMULATED):
        return
    given = visible_gpus()
    if given is not None and num_seen < len(given):
        raise _unseen(f"GPUs {','.join(given)} were given to this job", num_seen, build, has_cuda)
    if given is not None:
        return
    of_slurm = next(filter(None, map(os.environ.get, _OF_SLURM)), None)
    if of_slurm and num_seen == 0:
        raise _unseen(f"SLURM gave GPUs {of_slurm} to this job", num_seen, build, has_cuda)
    if num_seen and os.environ.get(IN_USE) == "":
        raise ValueError(
            f"PyTorch sees {num_seen} GPUs, but neither a scheduler nor CUDA_VISIBLE_DEVICES gave one to this job, and "
            "nvidia-smi lists none: other jobs may be using them. In SLURM ask for GPUs (gpu or gres, as "
            "profiles/slurm/config.yaml does). If the whole node is yours, name them in front of the command "
            "(CUDA_VISIBLE_DEVICES=0,1). To run on the CPU, set teacher.device and training.device: cpu."
        )


def _unseen(given: str, num_seen: int, build: str, has_cuda: bool) -> ValueError:
    if has_cuda:
        check = (
            "Type nvidia-smi -L here: if it fails, the driver is missing or older than this PyTorch needs, or a "
            "container was started without its GPUs (apptainer --nv, docker --gpus all); if it lists fewer, "
            "CUDA_VISIBLE_DEVICES names GPUs that this machine does not have"
        )
    else:
        check = "This is a build for CPUs: install the CUDA build of the same version"
    return ValueError(
        f"{given}, but PyTorch {build} sees {num_seen or 'none'} of them. {check}. To run on the CPU, put "
        'CUDA_VISIBLE_DEVICES="" in front of the command, or set teacher.device and training.device: cpu.'
    )
