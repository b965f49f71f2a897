"""GPU groups: which GPUs there are, and how they are grouped for one copy of the teacher each.

Snakemake counts GPUs but does not assign them; on one machine, leases do (see `leases`). In a SLURM job only its
assigned GPUs count, whatever the config lists: a job for one group uses exactly that, and a workflow inside one
allocation of 8 GPUs divides them among its jobs.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from retort.cluster.given import GPU_ID, visible_gpus
from retort.config.sections import Generation, Training

# Lines of nvidia-smi -L: "GPU 0: NVIDIA A100 (UUID: GPU-5c..)", and below it "  MIG 1g.5gb Device 0: (UUID: MIG-a1..)".
_LISTED = re.compile(r"(?:GPU (\d+):| +MIG ).*\(UUID: ([A-Za-z0-9/-]+)\)")


@dataclass(frozen=True)
class Groups:
    """`groups`: the GPU ids of each teacher copy, empty without GPUs; `left_over`: GPUs in no group."""

    groups: tuple[tuple[str, ...], ...]
    left_over: tuple[str, ...] = ()


def detect_gpus() -> tuple[str, ...]:
    """Return the ids of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists.

    A SLURM job without CUDA_VISIBLE_DEVICES was assigned none, whatever its node has.
    Raises ValueError when nvidia-smi fails: a broken driver is an error, not a reason to run on the CPU.
    """
    if (visible := visible_gpus()) is not None:
        return visible
    if is_scheduled() or shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _broken_driver(str(error)) from None
    output = (found.stdout + found.stderr).strip()
    if "No devices were found" in output:
        return ()  # the driver works without a GPU, as in a container without one; exit status 6
    ids = found.stdout.split()
    if found.returncode or not all(map(GPU_ID.fullmatch, ids)):
        raise _broken_driver(output or f"exit status {found.returncode}")
    return tuple(ids)


def list_gpus() -> dict[str, str]:
    """Return the UUID of every name that nvidia-smi has for this machine's GPUs: index, UUID, a MIG slice's UUID.

    The names of a GPU that is split (MIG) map to its first slice. Empty if nvidia-smi fails.
    """
    try:
        found = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    names: dict[str, str] = {}
    whole: tuple[str, ...] = ()
    for line in found.stdout.splitlines():
        if (match := _LISTED.match(line)) is None:
            continue
        index, uuid = match.groups()
        names[uuid] = uuid
        if index is not None:
            whole = (index, uuid)
        names |= dict.fromkeys(whole, uuid)
        whole = whole if index is not None else ()
    return names


def _broken_driver(reason: str) -> ValueError:
    return ValueError(
        f"nvidia-smi is installed but fails ({reason}): the GPU driver is broken. Fix it, or put "
        'CUDA_VISIBLE_DEVICES="" in front of the command to run on the CPU. If the teacher runs on other machines '
        "than this one, set teacher.generation.num_workers: then GPUs are not counted here."
    )


def parse_groups(
    gpus: str | Sequence[str] | None, *, gpus_per_model: int, detected: Sequence[str]
) -> Groups:
    """Group GPUs: "0,1,2,3" or the detected ones by `gpus_per_model`, or explicit groups ["0", "1", "2,3"].

    Without detected GPUs there is no group, so the same config runs on a laptop's CPU.
    Raises ValueError when there are fewer GPUs than `gpus_per_model`, or a listed GPU is missing or listed twice.
    """
    if not detected:
        return Groups(())
    if isinstance(gpus, str) or gpus is None:
        listed = _split(gpus) if gpus is not None else tuple(detected)
        _refuse_absent(listed, detected)
        if len(listed) < gpus_per_model:
            raise ValueError(
                f"teacher.generation.gpus_per_model is {gpus_per_model}, but there are only {len(listed)} GPUs "
                f"({','.join(listed)}). Lower it, or list more in teacher.generation.gpus."
            )
        whole = len(listed) // gpus_per_model * gpus_per_model
        starts = range(0, whole, gpus_per_model)
        return Groups(tuple(listed[i : i + gpus_per_model] for i in starts), listed[whole:])
    groups = tuple(_split(group) for group in gpus)
    _refuse_absent(tuple(g for group in groups for g in group), detected)
    return Groups(groups)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(r"[,\s]+", text.strip()) if part.strip())


def _refuse_absent(listed: Sequence[str], detected: Sequence[str]) -> None:
    if repeated := sorted({g for g in listed if list(listed).count(g) > 1}):
        raise ValueError(
            f"teacher.generation.gpus lists GPU {', '.join(repeated)} twice: list each GPU once."
        )
    if absent := [g for g in listed if not _is_among(g, detected)]:
        raise ValueError(
            f"teacher.generation.gpus lists GPU {', '.join(absent)}, but this machine has {', '.join(detected)} "
            "(nvidia-smi, or CUDA_VISIBLE_DEVICES). List only those, or leave the key out to use all."
        )


def _is_among(gpu: str, detected: Sequence[str]) -> bool:
    """Return whether a GPU may be one of these; a UUID, which may be abbreviated, cannot be compared with an index."""
    comparable = [other for other in detected if other.isdigit() == gpu.isdigit()]
    if gpu.isdigit():
        return not comparable or gpu in comparable
    return not comparable or any(other.startswith(gpu) for other in comparable)


def count_workers(generation: Generation, *, detected: Sequence[str] | None = None) -> int:
    """Return how many workers share the parts: `num_workers`, else one per GPU group, else 1.

    Without `detected`, GPUs are detected only when their number matters: a login node may have none, or a broken
    driver. Groups that the config lists count as listed, so that every machine plans the same jobs; a missing GPU is
    an error of the job that needs it.
    Raises ValueError when the listed GPUs are fewer than `gpus_per_model` or repeated, or detection fails.
    """
    if generation.num_workers is not None:
        return generation.num_workers
    if generation.gpus is None:
        found = detect_gpus() if detected is None else detected
        return max(1, len(found) // generation.gpus_per_model)
    listed = [g for group in listed_groups(generation.gpus) for g in group]
    groups = parse_groups(
        generation.gpus, gpus_per_model=generation.gpus_per_model, detected=listed
    )
    return len(groups.groups)


def count_threads(training: Training) -> int:
    """Return the CPU threads of a training on this machine: of all its ranks if they run on the CPU, else of one."""
    ranks = training.gpus if training.device == "cpu" else 1
    return training.cpu_threads * ranks


def listed_groups(gpus: str | Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups of ids in a config's `gpus`; a single text is one group."""
    return [_split(gpus)] if isinstance(gpus, str) else [_split(group) for group in gpus]


def describe_machine(generation: Generation, *, detected: Sequence[str]) -> str:
    """Return the table of GPUs, groups and workers that is shown before the work starts.

    In a SLURM job the groups are of its assigned GPUs. Raises ValueError as `parse_groups` does.
    """
    workers = count_workers(generation, detected=detected)
    if not detected:
        return (
            f"No GPU found here: jobs on this machine run on the CPU. Teacher workers: {workers}."
        )
    groups = parse_groups(
        None if is_scheduled() else generation.gpus,
        gpus_per_model=generation.gpus_per_model,
        detected=detected,
    )
    per_model = sorted({len(group) for group in groups.groups})
    rows = [
        ("GPUs available", f"{len(detected)} ({','.join(detected)})"),
        ("GPUs per model", " or ".join(map(str, per_model))),
        ("GPU groups", "  ".join("[" + ",".join(group) + "]" for group in groups.groups)),
        ("Number of workers", str(workers)),
    ]
    if groups.left_over:
        rows.append(("In no group", ",".join(groups.left_over)))
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def is_scheduled() -> bool:
    """Return whether this process runs in a SLURM job, whose GPUs are its own."""
    return "SLURM_JOB_ID" in os.environ
