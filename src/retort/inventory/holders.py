"""What holds artifacts: a running Snakemake, jobs on this node, locks, claims, and files that were just written.

- A Snakemake that runs, on whatever node, lists all files of its plan in `.snakemake/locks` of its folder.
- Jobs of this node are found by the paths on their command lines and by the files that they have open, also those that
  hold GPUs (cluster.leases).
- A training, a snapshot, a pruning and a synthesis hold a lock file (flock); a worker touches a claim on each part.
- Anything else that is unfinished is held for five minutes after the last write, for jobs of other nodes without these.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from retort.inventory.layout import Artifact
from retort.teacher.claims import is_live

_RECENT_S = 300.0
# Paths in a word of a command line: in the JSON of a job, behind a flag's equals sign, or several in one word.
_ENDS = (re.compile(r"[\"']"), re.compile(r"[\s\"',=:;\[\]{}()]+"), re.compile("="))
OWN_MARK = "# retort gc"  # first line of the lock that gc itself writes


@dataclass(frozen=True)
class Hold:
    """A path, resolved, that is held, and by what."""

    path: str
    reason: str


class Holders:
    """What is held below some folders of results, as of when it was made; `is_held` of one artifact looks again."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]
        self.holds = [*self._read_plans(), *self._read_processes()]

    def find(self, artifact: Artifact, *, now: float) -> str | None:
        """Return what holds an artifact, None if nothing does. `now`: of the file system's clock."""
        own = os.path.realpath(artifact.path)
        for hold in self.holds:
            if (
                hold.path == own
                or hold.path.startswith(f"{own}/")
                or own.startswith(f"{hold.path}/")
            ):
                return hold.reason
        return find_lock(artifact.path, _list_locks(artifact)) or _find_recent(artifact, now)

    def _read_plans(self) -> Iterator[Hold]:
        """Yield the files in the plans of running Snakemakes, and their whole folders for those that have none yet."""
        running = dict(_find_snakemakes())
        for folder in find_projects(self.roots):
            locks = [path for path in _list_snakemake_locks(folder) if not _is_own(path)]
            why = f"Snakemake runs in {folder} (if it was killed: snakemake --unlock)"
            for lock in locks:
                for line in _read_lines(lock):
                    yield Hold(os.path.realpath(folder / line), why)
            here = [process for process, place in running.items() if place == str(folder)]
            if len(here) > sum(lock.name.endswith(".output.lock") for lock in locks):
                for root in self.roots:
                    yield Hold(str(root), f"Snakemake starts in {folder} (process {here[-1]})")

    def _read_processes(self) -> Iterator[Hold]:
        """Yield the paths below the folders of results that processes of this node name or have open."""
        mine = _list_ancestors()
        for process in _list_processes():
            if process in mine:
                continue
            name, paths = _read_process(process)
            for path in paths:
                if any(path.startswith(f"{root}/") for root in self.roots):
                    yield Hold(path, f"{name} (process {process}) uses it")


def find_projects(roots: Iterable[Path]) -> list[Path]:
    """Return the folders from which Snakemake may work on folders of results: this one, and theirs with .snakemake."""
    folders = [Path.cwd(), *(above for root in roots for above in (root, *root.parents))]
    return [folder for folder in dict.fromkeys(folders) if (folder / ".snakemake").is_dir()]


def find_lock(folder: Path, names: Iterable[str]) -> str | None:
    """Return the lock file or claim of a live process among files of a folder, in words; None without one."""
    for name in names:
        path = folder / name
        if name.endswith(".claim"):
            with suppress(OSError):
                if is_live(path):
                    return f"a worker claims {name}"
        elif _is_locked(path):
            return f"a job holds {name}"
    return None


def _list_locks(artifact: Artifact) -> list[str]:
    """Return its lock files and claims; of a synthesis, the lock is that of its journal."""
    names = [file.name for file in artifact.files if file.name.endswith((".lock", ".claim"))]
    return names + (["../.journal.lock"] if artifact.kind.name == "synthesis" else [])


def _is_locked(path: Path) -> bool:
    """Return whether another process has the lock of a file."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or no locks on this file system, where nothing can be said
        return True
    finally:
        os.close(file)
    return False


def _find_recent(artifact: Artifact, now: float) -> str | None:
    age = now - artifact.changed
    if artifact.is_finished or not artifact.changed or age > _RECENT_S:
        return None
    return f"it is unfinished, and was written to {max(0, age):.0f} s ago"


def _list_snakemake_locks(folder: Path) -> list[Path]:
    return sorted((folder / ".snakemake" / "locks").glob("*.lock"))


def _is_own(lock: Path) -> bool:
    return next(_read_lines(lock), "").startswith(OWN_MARK)


def _read_lines(path: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from filter(None, path.read_text(errors="surrogateescape").splitlines())


def _find_snakemakes() -> Iterator[tuple[int, str]]:
    """Yield (process, folder) of each Snakemake of this node that locks its folder, or will."""
    for process in _list_processes():
        words = _read_words(process)
        names = [Path(word).name for word in words[:3]]
        is_run = names[:2] == ["retort", "run"] or names[1:3] == ["retort", "run"]
        is_run = is_run or words[1:4] == ["-m", "retort", "run"]
        if not (is_run or "snakemake" in names) or {
            "--nolock",
            "-n",
            "--dry-run",
            "--dryrun",
        } & set(words):
            continue
        with suppress(OSError):
            place = Path(f"/proc/{process}/cwd").readlink()
            for flag, value in pairwise([part for word in words for part in word.split("=", 1)]):
                place = place / value if flag in ("--directory", "-d") else place
            yield process, os.path.realpath(place)


def _read_process(process: int) -> tuple[str, set[str]]:
    """Return the name of a process's program, and the paths that it was given or has open, resolved."""
    words = _read_words(process)
    paths: set[str] = set()
    with suppress(OSError):
        place = Path(f"/proc/{process}/cwd").readlink()
        pieces = (part for word in words for ends in _ENDS for part in ends.split(word))
        parts = {part for part in pieces if "/" in part}
        paths |= {os.path.realpath(place / part) for part in parts if len(part) < 4096}
    with suppress(OSError):  # another user's
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                paths.add(str(entry.readlink()))
    with suppress(OSError):
        maps = Path(f"/proc/{process}/maps").read_text(errors="surrogateescape").splitlines()
        paths |= {line.split(maxsplit=5)[5] for line in maps if line.count(" ") > 4 and "/" in line}
    return _name_program(words), paths


def _name_program(words: Sequence[str]) -> str:
    """Return the program of a command line; of an interpreter, the script that it runs."""
    names = [Path(word).name for word in words if not word.startswith("-")] or ["a kernel thread"]
    is_interpreter = re.match(r"(python|bash|sh|perl)[\d.]*$", names[0])
    return names[1] if is_interpreter and len(names) > 1 and "-c" not in words[:3] else names[0]


def _read_words(process: int) -> list[str]:
    with suppress(OSError):
        text = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="surrogateescape")
        return text.removesuffix("\0").split("\0")
    return []


def _list_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _list_ancestors() -> set[int]:
    """Return this process and those that started it, whose command lines name what is to be removed."""
    found, process = set(), os.getpid()
    while process > 0 and process not in found:
        found.add(process)
        try:
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            break
        process = int(status.rpartition(")")[2].split()[1])
    return found
