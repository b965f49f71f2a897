"""Leases: which job holds which GPUs of this machine, for as long as a process that may use them is alive.

There is one lock file per GPU in a node-local folder; the kernel releases a lock when its holder dies in any way. A job
locks all GPUs of a group or none, so waiting jobs hold nothing, except one: the job that has the *gate* reserves one
group. No other job takes a GPU of that group, and it keeps those that become free. So a large job is not starved by a
stream of small ones. As only one job at a time holds GPUs while it waits, there is no deadlock.

A GPU has one lock, whether it is named by index or UUID, with or without CUDA_VISIBLE_DEVICES.
"""

import fcntl
import logging
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import filelock

from retort.cluster.given import IN_USE
from retort.cluster.gpus import detect_gpus, is_scheduled, list_gpus, listed_groups, parse_groups
from retort.config.sections import Generation

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_GATE_POLL_S = 0.05  # the job with the gate is faster than the others
_NOTIFY_S = 60.0


def lock_folder() -> Path:
    """Create and return the node-local folder of this user's GPU locks; not in TMPDIR, which may differ between jobs.

    Raises ValueError when it cannot be used.
    """
    named = os.environ.get("RETORT_LOCK_DIR")
    folder = Path(named) if named else Path(f"/tmp/retort-gpus-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named and folder.stat().st_uid != os.getuid():
            raise PermissionError(0, "it belongs to another user")
        if is_scheduled():
            # Ids may start at 0 in each job, so "0" of two jobs may be two GPUs; so may "0" of two nodes, which may
            # share this folder.
            step = os.environ.get("SLURM_STEP_ID", "batch")
            node = os.environ.get("SLURMD_NODENAME", "")
            folder /= f"slurm-{os.environ['SLURM_JOB_ID']}.{step}-{node}"
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _no_locks(folder, error) from None
    return folder


def _no_locks(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"GPUs cannot be locked in {str(folder)!r} ({error.strerror}): give all your jobs on this machine one folder "
        "that you can write to, with RETORT_LOCK_DIR=/path in front of the command."
    )


@contextmanager
def lease(
    candidates: Sequence[Sequence[str]],
    *,
    count: int | None = None,
    folder: Path,
    poll_s: float = _POLL_S,
    notify_s: float = _NOTIFY_S,
) -> Iterator[tuple[str, ...]]:
    """Wait for the first of the candidate groups that is free, hold its GPUs during the block, and yield their ids.

    With `count`, any `count` GPUs of a group are enough. A message is logged every `notify_s` while it waits.
    Raises ValueError when the folder cannot hold locks, or two ids of a group are the same GPU.
    """
    names = resolve_gpus([gpu for group in candidates for gpu in group])
    for group in candidates:
        _refuse_repeated(group, names)
    locks = _Locks(folder, names)
    try:
        try:
            held = _wait(candidates, count, locks, poll_s=poll_s, notify_s=notify_s)
        except OSError as error:
            raise _no_locks(folder, error) from None
        in_use = os.pathsep.join(str(locks.path(gpu, "in-use")) for gpu in held)
        with _environment(**{IN_USE: in_use}):
            yield held
    finally:
        locks.release_except(())


def _refuse_repeated(group: Sequence[str], names: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for gpu in group:
        if (other := first.setdefault(names[gpu], gpu)) != gpu:
            raise ValueError(
                f"{other} and {gpu} are the same GPU: list each GPU once in teacher.generation.gpus."
            )


def _wait(
    candidates: Sequence[Sequence[str]],
    count: int | None,
    locks: "_Locks",
    *,
    poll_s: float,
    notify_s: float,
) -> tuple[str, ...]:
    """Return a group once it is locked as a whole."""
    gate = locks.file("gate.lock")
    target: Sequence[str] = ()  # the group that this process reserves, once it has the gate
    started = notified = time.monotonic()
    try:
        while True:
            found = []
            for group in candidates:
                taken = locks.take(group, count or len(group))
                if len(taken) == (count or len(group)):
                    locks.release_except(taken)
                    return taken
                locks.release_except(target)
                found.append(len(taken))
            if not gate.is_locked and _try(gate):
                target = candidates[found.index(max(found))]
            locks.reserve(target)
            now = time.monotonic()
            if now - notified >= notify_s:
                notified = now
                logger.info(
                    f"waiting for a free GPU group for {now - started:.0f} s: other jobs hold all"
                )
            time.sleep(_GATE_POLL_S if gate.is_locked else poll_s * (0.5 + random.random()))
    finally:
        locks.unreserve()
        gate.release()


def _try(lock: filelock.BaseFileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    return True


class _Locks:
    """The locks that this process holds, by GPU: of GPUs it uses, and of GPUs it reserves."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self._folder = folder
        self._names = names
        self._held: dict[str, filelock.BaseFileLock] = {}
        self._reserved: dict[str, filelock.BaseFileLock] = {}

    def path(self, gpu: str, kind: str) -> Path:
        return self._folder / f"gpu-{re.sub('[^A-Za-z0-9]', '_', self._names[gpu])}.{kind}"

    def file(self, name: str) -> filelock.BaseFileLock:
        # Not filelock's fallback without flock, a soft lock: it would outlive a killed process.
        # The mode lets all users lock it, if they share a folder.
        return filelock.FileLock(self._folder / name, fallback_to_soft=False, mode=0o666)

    def take(self, group: Sequence[str], count: int) -> tuple[str, ...]:
        """Lock up to `count` GPUs of a group, lowest ids first, and return the ids of those that are held."""
        held = [gpu for gpu in group if gpu in self._held]
        for gpu in sorted(group, key=lambda g: (len(g), g)):
            if len(held) >= count:
                break
            if gpu not in self._held and self._take_one(gpu):
                held.append(gpu)
        return tuple(gpu for gpu in group if gpu in held[:count])

    def _take_one(self, gpu: str) -> bool:
        if gpu not in self._reserved and _is_locked(self.path(gpu, "wanted"), fcntl.LOCK_SH):
            return False
        lock = self.file(self.path(gpu, "lock").name)
        if not _try(lock):
            return False
        if _is_locked(self.path(gpu, "in-use"), fcntl.LOCK_EX):
            lock.release()  # its holder was killed, but a rank that it started is still alive
            return False
        self._held[gpu] = lock
        return True

    def reserve(self, group: Sequence[str]) -> None:
        """Keep other jobs from taking the GPUs of a group, as far as possible now."""
        for gpu in group:
            if gpu not in self._reserved:
                lock = self.file(self.path(gpu, "wanted").name)
                if _try(lock):
                    self._reserved[gpu] = lock

    def unreserve(self) -> None:
        """Let other jobs take the reserved GPUs."""
        while self._reserved:
            self._reserved.popitem()[1].release()

    def release_except(self, kept: Sequence[str]) -> None:
        """Release the locks of all GPUs but these."""
        for gpu in [gpu for gpu in self._held if gpu not in kept]:
            self._held.pop(gpu).release()


def _is_locked(path: Path, kind: int) -> bool:
    """Return whether another process holds a lock that conflicts with this kind (LOCK_SH, LOCK_EX)."""
    file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def hold_parent_gpus() -> None:
    """Hold the GPUs of the process that started this one until this one ends.

    A child that is executed does not inherit its parent's locks. A child that is forked from this process (for a
    DataLoader) cannot use a GPU and closes them.
    """
    for path in filter(None, os.environ.get(IN_USE, "").split(os.pathsep)):
        in_use = os.open(path, os.O_RDONLY)
        fcntl.flock(in_use, fcntl.LOCK_SH)
        os.register_at_fork(after_in_child=partial(os.close, in_use))


def resolve_gpus(gpus: Sequence[str]) -> dict[str, str]:
    """Return the UUID of each GPU id where nvidia-smi knows it, else the id itself.

    For a GPU that is split (MIG) it is the UUID of its first slice, which is what CUDA uses.
    """
    listed = list_gpus()
    return {gpu: _resolve(gpu, listed) for gpu in gpus}


def _resolve(gpu: str, listed: dict[str, str]) -> str:
    if gpu in listed:
        return listed[gpu]
    matches = {
        name for known, name in listed.items() if not gpu.isdigit() and known.startswith(gpu)
    }
    return matches.pop() if len(matches) == 1 else gpu


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _visible(gpus: Sequence[str]) -> AbstractContextManager[None]:
    """Make only these GPUs visible to CUDA; to be entered before CUDA is initialized."""
    # The ids are nvidia-smi's, in the order of the bus; CUDA's default order is the fastest first.
    return _environment(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=",".join(gpus))


@contextmanager
def lease_teacher(
    generation: Generation, *, worker: int, device: str = "auto"
) -> Iterator[tuple[str, ...]]:
    """Hold one GPU group for a copy of the teacher and yield its ids, () on a CPU. Worker w prefers group w mod groups.

    Raises ValueError when the config's groups do not fit this machine's GPUs (see `parse_groups`), or as `lease` does.
    """
    detected = () if device == "cpu" else detect_gpus()
    groups = parse_groups(
        None if is_scheduled() else generation.gpus,
        gpus_per_model=generation.gpus_per_model,
        detected=detected,
    ).groups
    if not groups:
        with _environment(**{IN_USE: ""}):
            yield ()
        return
    first = worker % len(groups)
    ordered = [*groups[first:], *groups[:first]]
    with lease(ordered, folder=lock_folder()) as held, _visible(held):
        yield held


@contextmanager
def lease_training(
    count: int,
    *,
    device: str = "auto",
    among: str | Sequence[str] | None = None,
) -> Iterator[tuple[str, ...]]:
    """Hold any `count` GPUs of this machine or SLURM job, `among` those of the config if given; yield ids, () on a CPU.

    Raises ValueError when there are fewer than `count`, or as `lease` does.
    """
    detected = () if device == "cpu" else detect_gpus()
    if detected and among is not None and not is_scheduled():
        detected = _choose_among(among, detected)
    if not detected:
        with _environment(**{IN_USE: ""}):
            yield ()
        return
    if count > len(detected):
        raise ValueError(
            f"training.gpus is {count}, but this machine has {len(detected)} ({', '.join(detected)}). Lower it."
        )
    with lease([detected], count=count, folder=lock_folder()) as held, _visible(held):
        yield held


def _choose_among(listed: str | Sequence[str], detected: Sequence[str]) -> tuple[str, ...]:
    """Return the detected GPUs that the config lists. Raises ValueError when there is none."""
    allowed = [gpu for group in listed_groups(listed) for gpu in group]
    names = resolve_gpus([*detected, *allowed])
    found = tuple(gpu for gpu in detected if names[gpu] in map(names.get, allowed))
    if not found:
        raise ValueError(
            f"teacher.generation.gpus lists {', '.join(allowed)}, but this machine has {', '.join(detected)} "
            "(nvidia-smi, or CUDA_VISIBLE_DEVICES), and no other GPU than listed is used. List those, or leave the key "
            "out."
        )
    return found
