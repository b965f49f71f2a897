"""GPU groups: which devices there are, how they are grouped for one teacher copy each, and who holds them now.

Snakemake counts GPUs but does not say which: on one machine a lease does. One lock file per GPU in a node-local
folder, taken all or nothing so that nobody waits for others while holding some; the kernel frees them when their
holder dies, however it dies. Under a scheduler that assigned devices (SLURM) only those count, whatever the config
lists: a job with one group gets exactly that, and a workflow inside one allocation of 8 GPUs shares them out.
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
from itertools import takewhile
from pathlib import Path

import filelock

from retort.config import Generation

_POLL_S = 0.5
_SAY_WAITING_S = 60.0
# Set by SLURM inside an allocation: its devices are ours alone.
_SCHEDULER_MARKS = ("SLURM_JOB_ID",)
_GPU_ID = re.compile(r"\d+|(GPU|MIG)-[A-Za-z0-9/-]+")


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
    listed = [g for group in _listed(generation.gpus) for g in group]
    groups = parse_groups(
        generation.gpus, gpus_per_model=generation.gpus_per_model, detected=listed
    )
    return len(groups.groups)


def _listed(gpus: str | Sequence[str]) -> list[tuple[str, ...]]:
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


def lock_folder() -> Path:
    """Return the node-local folder of this user's GPU locks: not in TMPDIR, which may differ from job to job."""
    named = os.environ.get("RETORT_LOCK_DIR")
    folder = Path(named) if named else Path(f"/tmp/retort-gpus-{os.getuid()}")
    if (
        is_scheduled()
    ):  # ids may be counted anew in each job, so "0" of two jobs need not be one GPU
        step = os.environ.get("SLURM_STEP_ID", "batch")
        folder /= f"slurm-{os.environ['SLURM_JOB_ID']}.{step}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def lease(
    candidates: Sequence[Sequence[str]],
    *,
    count: int | None = None,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[tuple[str, ...]]:
    """Hold the first of the candidate groups that is free, waiting until one is; yields its GPUs.

    With `count`, any so many GPUs of a group are enough. All that are needed are taken or none, so waiting jobs of
    any sizes cannot deadlock.
    """
    waited_since = said = time.monotonic()
    while True:
        for group in candidates:
            with ExitStack() as stack:
                if taken := _take(group, count or len(group), folder, stack):
                    held = stack.pop_all()
                    with held:
                        yield taken
                    return
        now = time.monotonic()
        if now - said >= _SAY_WAITING_S:
            said = now
            say(
                f"waiting for a free GPU group for {now - waited_since:.0f} s: all are held by other jobs"
            )
        time.sleep(_POLL_S * (0.5 + random.random()))


def _take(
    group: Sequence[str], count: int, folder: Path, stack: ExitStack
) -> tuple[str, ...] | None:
    """Lock `count` GPUs of a group and return them; None when fewer are free (the caller's stack frees those)."""
    taken: list[str] = []
    for place, gpu in enumerate(sorted(group, key=lambda g: (len(g), g))):
        if len(taken) + len(group) - place < count:
            return None
        # Not the soft lock that filelock falls back to without flock: it would outlive a killed process.
        lock = filelock.FileLock(
            folder / f"gpu-{re.sub('[^A-Za-z0-9]', '_', gpu)}.lock", fallback_to_soft=False
        )
        try:
            stack.enter_context(lock.acquire(blocking=False))
        except filelock.Timeout:
            continue
        taken.append(gpu)
        if len(taken) == count:
            return tuple(g for g in group if g in taken)
    return None


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
    generation: Generation, *, worker: int, device: str = "auto", say: Callable[[str], None]
) -> Iterator[tuple[str, ...]]:
    """Hold one GPU group for a teacher copy: worker w prefers group w mod groups. Nothing on a CPU."""
    detected = () if device == "cpu" else detect_gpus()
    groups = parse_groups(
        None if is_scheduled() else generation.gpus,
        gpus_per_model=generation.gpus_per_model,
        detected=detected,
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
def lease_training(
    count: int,
    *,
    device: str = "auto",
    among: str | Sequence[str] | None = None,
    say: Callable[[str], None],
) -> Iterator[tuple[str, ...]]:
    """Hold any `count` free GPUs of this machine, or of the scheduler's assignment; `among` those that the config
    lists, where it does. Nothing on a CPU."""
    detected = () if device == "cpu" else detect_gpus()
    if among is not None and not is_scheduled():
        allowed = {gpu for group in _listed(among) for gpu in group}
        detected = tuple(gpu for gpu in detected if gpu in allowed)
    if not detected:
        yield ()
        return
    if count > len(detected):
        raise ValueError(
            f"training.gpus is {count}, but this machine has {len(detected)} ({', '.join(detected)}). Lower it."
        )
    with lease([detected], count=count, folder=lock_folder(), say=say) as held, _visible(held):
        yield held
