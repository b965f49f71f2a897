"""GPU groups: which devices there are, how they are grouped for one teacher copy each, and who holds them now.

Snakemake counts GPUs but does not say which: on one machine a lease does. One lock file per GPU in a node-local
folder, taken all or nothing so that nobody waits for others while holding some; the kernel frees them when their
holder dies, however it dies. Under a scheduler that assigned devices (SLURM) its assignment is used as it is.
"""

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from retort.config import Generation

_POLL_S = 0.5
_SAY_WAITING_S = 60.0
# Set by SLURM inside an allocation: its devices are ours alone.
_SCHEDULER_MARKS = ("SLURM_JOB_ID",)


@dataclass(frozen=True)
class Groups:
    """`groups`: the devices of each teacher copy; empty where there is no GPU. `left_over`: in no group."""

    groups: tuple[tuple[str, ...], ...]
    left_over: tuple[str, ...] = ()


def detect_gpus() -> tuple[str, ...]:
    """Return the ids of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists.

    Raises ValueError when nvidia-smi is there and fails: a broken driver is an error, not a CPU run.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(g.strip() for g in visible.split(",") if g.strip() and g.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or getattr(error, "stdout", "") or str(error)
        if "No devices were found" in said:  # a login node with the tool but no GPU
            return ()
        raise ValueError(
            f"nvidia-smi is installed but fails ({said.strip()}): the GPU driver is broken. Mend it, or run on the "
            'CPU with CUDA_VISIBLE_DEVICES="" in front of the command.'
        ) from None
    return tuple(line.strip() for line in found.stdout.splitlines() if line.strip())


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
    if absent := [g for g in listed if g not in detected]:
        raise ValueError(
            f"teacher.generation.gpus lists GPU {', '.join(absent)}, but this machine has {', '.join(detected)} "
            "(nvidia-smi, or CUDA_VISIBLE_DEVICES). List only those, or leave the key out to use all."
        )


def count_workers(generation: Generation, *, detected: Sequence[str]) -> int:
    """Return how many workers share the parts: as configured, else one per group, else one.

    Groups that the config lists count as listed, so that every machine that reads it plans the same jobs; what a
    machine lacks is said by the job that needs it.
    """
    if generation.num_workers is not None:
        return generation.num_workers
    if generation.gpus is None:
        return max(1, len(detected) // generation.gpus_per_model)
    listed = [g for group in _listed(generation.gpus) for g in group]
    groups = parse_groups(
        generation.gpus, gpus_per_model=generation.gpus_per_model, detected=listed
    )
    return len(groups.groups)


def _listed(gpus: str | Sequence[str]) -> list[tuple[str, ...]]:
    return [_split(gpus)] if isinstance(gpus, str) else [_split(group) for group in gpus]


def describe_machine(generation: Generation, *, detected: Sequence[str]) -> str:
    """Return the table that is shown before the work starts."""
    workers = count_workers(generation, detected=detected)
    if not detected:
        return f"No GPU found here: what runs on this machine runs on the CPU. Teacher workers: {workers}."
    groups = parse_groups(
        generation.gpus, gpus_per_model=generation.gpus_per_model, detected=detected
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


def lock_folder() -> Path:
    """Return the node-local folder of this user's GPU locks: not in TMPDIR, which may differ from job to job."""
    named = os.environ.get("RETORT_LOCK_DIR")
    folder = Path(named) if named else Path(f"/tmp/retort-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def lease(
    candidates: Sequence[Sequence[str]], *, folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[str, ...]]:
    """Hold the first of the candidate groups that is free, waiting until one is; yields its GPUs.

    All of a group's locks are taken or none, so waiting jobs of any sizes cannot deadlock.
    """
    waited_since = said = time.monotonic()
    while True:
        for group in candidates:
            with ExitStack() as stack:
                if _take_all(group, folder, stack):
                    held = stack.pop_all()
                    with held:
                        yield tuple(group)
                    return
        now = time.monotonic()
        if now - said >= _SAY_WAITING_S:
            said = now
            say(
                f"waiting for a free GPU group for {now - waited_since:.0f} s: all are held by other jobs"
            )
        time.sleep(_POLL_S * (0.5 + random.random()))


def _take_all(group: Sequence[str], folder: Path, stack: ExitStack) -> bool:
    """Take every lock of a group; False (what was taken is freed by the caller's stack) when one is held."""
    for gpu in sorted(group):
        lock = filelock.FileLock(folder / f"gpu-{re.sub('[^A-Za-z0-9]', '_', gpu)}.lock")
        try:
            stack.enter_context(lock.acquire(blocking=False))
        except filelock.Timeout:
            return False
    return True


@contextmanager
def _visible(gpus: Sequence[str]) -> Iterator[None]:
    """Let only these GPUs be seen by CUDA while the block runs; must be entered before CUDA starts."""
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
    if before["CUDA_VISIBLE_DEVICES"] is None:
        # The ids are nvidia-smi's, which counts by bus; CUDA by itself counts the fastest first.
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def is_scheduled() -> bool:
    """Say whether a scheduler has given this process its devices."""
    return any(mark in os.environ for mark in _SCHEDULER_MARKS)


@contextmanager
def lease_teacher(
    generation: Generation, *, worker: int, say: Callable[[str], None]
) -> Iterator[tuple[str, ...]]:
    """Hold one GPU group for a teacher copy: worker w prefers group w mod groups. Nothing on a CPU or under
    a scheduler."""
    detected = () if is_scheduled() else detect_gpus()
    groups = parse_groups(
        generation.gpus, gpus_per_model=generation.gpus_per_model, detected=detected
    ).groups
    if not groups:
        yield ()
        return
    first = worker % len(groups)
    with (
        lease([*groups[first:], *groups[:first]], folder=lock_folder(), say=say) as held,
        _visible(held),
    ):
        yield held


@contextmanager
def lease_training(count: int, *, say: Callable[[str], None]) -> Iterator[tuple[str, ...]]:
    """Hold any `count` free GPUs of this machine. Nothing on a CPU or under a scheduler."""
    detected = () if is_scheduled() else detect_gpus()
    if not detected:
        yield ()
        return
    if count > len(detected):
        raise ValueError(
            f"training.gpus is {count}, but this machine has {len(detected)} ({', '.join(detected)}). Lower it."
        )
    groups = [detected[i : i + count] for i in range(len(detected) - count + 1)]
    with lease(groups, folder=lock_folder(), say=say) as held, _visible(held):
        yield held
