"""Leases: which job holds which GPUs of this machine, as long as a process lives that may use them.

One lock file per GPU in a node-local folder, freed by the kernel when its holder dies, however it dies; nothing else
is kept. All of a group are taken or none, so jobs that wait hold nothing; but one of them, whoever has the *gate*,
wants one group: nobody else takes a GPU of it any more, and what becomes free of it is kept. So a large job is not
starved by a flow of small ones, and as only one at a time holds while it waits, no two can wait for each other.

A GPU has one lock whatever it is called: by index, by UUID, through CUDA_VISIBLE_DEVICES or not.
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

from retort.cluster.gpus import detect_gpus, is_scheduled, list_gpus, listed_groups, parse_groups
from retort.config.sections import Generation

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_GATE_POLL_S = 0.05  # whoever is at the gate is faster than those who are not
_SAY_WAITING_S = 60.0
_IN_USE = "RETORT_GPUS_IN_USE"  # lock files of the GPUs that a process and its children may use


def lock_folder() -> Path:
    """Return the node-local folder of this user's GPU locks: not in TMPDIR, which may differ from job to job.

    Raises ValueError when locks cannot be kept there.
    """
    named = os.environ.get("RETORT_LOCK_DIR")
    folder = Path(named) if named else Path(f"/tmp/retort-gpus-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named and folder.stat().st_uid != os.getuid():
            raise PermissionError(0, "it belongs to somebody else")
        if is_scheduled():
            # ids may be counted anew in each job, so "0" of two jobs need not be one GPU; nor of two nodes, which may
            # share a folder all the same
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
        "that you may write to, by RETORT_LOCK_DIR=/path in front of the command."
    )


@contextmanager
def lease(
    candidates: Sequence[Sequence[str]],
    *,
    count: int | None = None,
    folder: Path,
) -> Iterator[tuple[str, ...]]:
    """Hold the first of the candidate groups that is free, waiting until one is; yields its GPUs.

    With `count`, any so many GPUs of a group are enough.
    Raises ValueError when locks cannot be kept in the folder, or two ids of a group are one GPU.
    """
    names = find_names([gpu for group in candidates for gpu in group])
    for group in candidates:
        _refuse_two_names(group, names)
    locks = _Locks(folder, names)
    try:
        try:
            held = _wait(candidates, count, locks)
        except OSError as error:
            raise _no_locks(folder, error) from None
        in_use = os.pathsep.join(str(locks.path(gpu, "in-use")) for gpu in held)
        with _environment(**{_IN_USE: in_use}):
            yield held
    finally:
        locks.release_but(())


def _refuse_two_names(group: Sequence[str], names: dict[str, str]) -> None:
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
) -> tuple[str, ...]:
    """Return a group that is locked as a whole, however long that lasts."""
    gate = locks.file("gate.lock")
    target: Sequence[str] = ()  # what this process wants, once it has the gate
    waited_since = said = time.monotonic()
    try:
        while True:
            found = []
            for group in candidates:
                taken = locks.take(group, count or len(group))
                if len(taken) == (count or len(group)):
                    locks.release_but(taken)
                    return taken
                locks.release_but(target)
                found.append(len(taken))
            if not gate.is_locked and _try(gate):
                target = candidates[found.index(max(found))]
            locks.want(target)
            now = time.monotonic()
            if now - said >= _SAY_WAITING_S:
                said = now
                logger.info(
                    f"waiting for a free GPU group for {now - waited_since:.0f} s: all are held by other jobs"
                )
            time.sleep(_GATE_POLL_S if gate.is_locked else _POLL_S * (0.5 + random.random()))
    finally:
        locks.want_nothing()
        gate.release()


def _try(lock: filelock.BaseFileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return False
    return True


class _Locks:
    """The locks that this process holds, by GPU."""

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        self._folder = folder
        self._names = names
        self._held: dict[str, filelock.BaseFileLock] = {}
        self._wanted: dict[str, filelock.BaseFileLock] = {}

    def path(self, gpu: str, kind: str) -> Path:
        return self._folder / f"gpu-{re.sub('[^A-Za-z0-9]', '_', self._names[gpu])}.{kind}"

    def file(self, name: str) -> filelock.BaseFileLock:
        # Not the soft lock that filelock falls back to without flock: it would outlive a killed process.
        # For all users, where they share a folder.
        return filelock.FileLock(self._folder / name, fallback_to_soft=False, mode=0o666)

    def take(self, group: Sequence[str], count: int) -> tuple[str, ...]:
        """Lock up to `count` GPUs of a group, lowest ids first, and return those that are held."""
        held = [gpu for gpu in group if gpu in self._held]
        for gpu in sorted(group, key=lambda g: (len(g), g)):
            if len(held) >= count:
                break
            if gpu not in self._held and self._take_one(gpu):
                held.append(gpu)
        return tuple(gpu for gpu in group if gpu in held[:count])

    def _take_one(self, gpu: str) -> bool:
        if gpu not in self._wanted and _is_locked(self.path(gpu, "wanted"), fcntl.LOCK_SH):
            return False
        lock = self.file(self.path(gpu, "lock").name)
        if not _try(lock):
            return False
        if _is_locked(self.path(gpu, "in-use"), fcntl.LOCK_EX):
            lock.release()  # its holder was killed, but not yet a rank that it started
            return False
        self._held[gpu] = lock
        return True

    def want(self, group: Sequence[str]) -> None:
        """Keep others from taking the GPUs of a group; what cannot be wanted now may be at the next call."""
        for gpu in group:
            if gpu not in self._wanted:
                lock = self.file(self.path(gpu, "wanted").name)
                if _try(lock):
                    self._wanted[gpu] = lock

    def want_nothing(self) -> None:
        """Let others take what was wanted."""
        while self._wanted:
            self._wanted.popitem()[1].release()

    def release_but(self, kept: Sequence[str]) -> None:
        """Free what is held, but for these GPUs."""
        for gpu in [gpu for gpu in self._held if gpu not in kept]:
            self._held.pop(gpu).release()


def _is_locked(path: Path, kind: int) -> bool:
    """Say whether a lock of some kind could not be had now."""
    file = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def keep_in_use() -> None:
    """Hold the GPUs of the process that started this one, for as long as this one lives.

    An executed child does not inherit locks. Whoever is forked from here (a DataLoader's process) cannot use a GPU, and
    lets go of them.
    """
    for path in filter(None, os.environ.get(_IN_USE, "").split(os.pathsep)):
        in_use = os.open(path, os.O_RDONLY)
        fcntl.flock(in_use, fcntl.LOCK_SH)
        os.register_at_fork(after_in_child=partial(os.close, in_use))


def find_names(gpus: Sequence[str]) -> dict[str, str]:
    """Return one name for each GPU, by whatever it is called: its UUID where nvidia-smi says it, else the id itself.

    The name of a GPU that is split (MIG) is that of its first slice, which is what CUDA uses of it.
    """
    listed = list_gpus()
    return {gpu: _find_name(gpu, listed) for gpu in gpus}


def _find_name(gpu: str, listed: dict[str, str]) -> str:
    if gpu in listed:
        return listed[gpu]
    longer = {name for known, name in listed.items() if not gpu.isdigit() and known.startswith(gpu)}
    return longer.pop() if len(longer) == 1 else gpu


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
    """Let only these GPUs be seen by CUDA; must be entered before CUDA starts."""
    # The ids are nvidia-smi's, which counts by bus; CUDA by itself counts the fastest first.
    return _environment(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=",".join(gpus))


@contextmanager
def lease_teacher(
    generation: Generation, *, worker: int, device: str = "auto"
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
    """Hold any `count` free GPUs of this machine, or of the scheduler's assignment; `among` those that the config
    lists, where it does. Nothing on a CPU."""
    detected = () if device == "cpu" else detect_gpus()
    if among is not None and not is_scheduled():
        allowed = {gpu for group in listed_groups(among) for gpu in group}
        detected = tuple(gpu for gpu in detected if gpu in allowed)
    if not detected:
        yield ()
        return
    if count > len(detected):
        raise ValueError(
            f"training.gpus is {count}, but this machine has {len(detected)} ({', '.join(detected)}). Lower it."
        )
    with lease([detected], count=count, folder=lock_folder()) as held, _visible(held):
        yield held
