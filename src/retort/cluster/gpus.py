"""GPU groups: which devices there are, and how they are grouped for one teacher copy each.

Snakemake counts GPUs but does not say which: on one machine a lease does (room `leases`). Under a scheduler that
assigned devices (SLURM) only those count, whatever the config lists: a job with one group gets exactly that, and a
workflow inside one allocation of 8 GPUs shares them out.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from retort.config.sections import Generation

# Set by SLURM inside an allocation: its devices are ours alone.
_SCHEDULER_MARKS = ("SLURM_JOB_ID",)
_GPU_ID = re.compile(r"\d+|(GPU|MIG)-[A-Za-z0-9/-]+")
# Lines of nvidia-smi -L: "GPU 0: NVIDIA A100 (UUID: GPU-5c..)", and below it "  MIG 1g.5gb Device 0: (UUID: MIG-a1..)".
_LISTED = re.compile(r"(?:GPU (\d+):| +MIG ).*\(UUID: ([A-Za-z0-9/-]+)\)")


@dataclass(frozen=True)
class Groups:
    """`groups`: the devices of each teacher copy; empty where there is no GPU. `left_over`: in no group."""

    groups: tuple[tuple[str, ...], ...]
    left_over: tuple[str, ...] = ()


def detect_gpus() -> tuple[str, ...]:
    """Return the ids of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists.

    A SLURM job without CUDA_VISIBLE_DEVICES was given none, whatever its node has.
    Raises ValueError when nvidia-smi is there and fails: a broken driver is an error, not a CPU run.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = [g.strip() for g in visible.split(",")]
        # CUDA reads as far as the first entry that is none, such as -1.
        return tuple(takewhile(_GPU_ID.fullmatch, ids))
    if is_scheduled() or shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _broken_driver(str(error)) from None
    said = (found.stdout + found.stderr).strip()
    if "No devices were found" in said:
        return ()  # a driver that works without a GPU, as in a container that was given none; exit status 6
    ids = found.stdout.split()
    if found.returncode or not all(map(_GPU_ID.fullmatch, ids)):
        raise _broken_driver(said or f"exit status {found.returncode}")
    return tuple(ids)


def list_gpus() -> dict[str, str]:
    """Return the UUID by every name that nvidia-smi has for a GPU of this machine: index, UUID, a slice's UUID.

    A GPU that is split (MIG) is called by its first slice. Nothing where nvidia-smi does not answer.
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


def _broken_driver(said: str) -> ValueError:
    return ValueError(
        f"nvidia-smi is installed but fails ({said}): the GPU driver is broken. Mend it, or run on the "
        'CPU with CUDA_VISIBLE_DEVICES="" in front of the command. If the teacher runs on other machines than this '
        "one, set teacher.generation.num_workers, and nothing is counted here."
    )


def parse_groups(
    gpus: str | Sequence[str] | None, *, gpus_per_model: int, detected: Sequence[str]
) -> Groups:
    """Group GPUs: "0,1,2,3" or the detected ones by `gpus_per_model`, or explicit groups ["0", "1", "2,3"].

    Listed GPUs on a machine without any give no group: the same config runs on a laptop's CPU.
    Raises ValueError when a group cannot be filled, or a listed GPU is not there.
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
    """Say whether a GPU is there, as far as it can be known: a UUID (it may be abbreviated) is no index."""
    comparable = [other for other in detected if other.isdigit() == gpu.isdigit()]
    if gpu.isdigit():
        return not comparable or gpu in comparable
    return not comparable or any(other.startswith(gpu) for other in comparable)


def count_workers(generation: Generation, *, detected: Sequence[str] | None = None) -> int:
    """Return how many workers share the parts: as configured, else one per group, else one.

    GPUs are looked for (`detected` left out) only when their number matters: a login node may have none, or a
    driver that does not work.
    Groups that the config lists count as listed, so that every machine that reads it plans the same jobs; what a
    machine lacks is said by the job that needs it.
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


def listed_groups(gpus: str | Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups that a config's `gpus` lists, as they are written."""
    return [_split(gpus)] if isinstance(gpus, str) else [_split(group) for group in gpus]


def describe_machine(generation: Generation, *, detected: Sequence[str]) -> str:
    """Return the table that is shown before the work starts. What a scheduler gave is shown as it is."""
    workers = count_workers(generation, detected=detected)
    if not detected:
        return f"No GPU found here: what runs on this machine runs on the CPU. Teacher workers: {workers}."
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
    """Say whether a scheduler has given this process its devices."""
    return any(mark in os.environ for mark in _SCHEDULER_MARKS)
