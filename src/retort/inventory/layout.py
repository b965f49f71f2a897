"""Which artifacts lie in a folder of results, which files are theirs, and which are nobody's that Retort knows.

Only names and sizes are read here, no file's content. Symbolic links are never followed, except for the folder itself.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from retort.inventory.kinds import KIND_OF, KINDS, OF_ALL, Kind

ID = re.compile(r"(api-|demo-)?[0-9a-f]{12}")
REMOVED = (
    ".removed-"  # prefix of an artifact's folder between its removal and the end of the deletion
)


# Beside the kinds' folders.
_TOP_FILES = ("report.html", "summary.txt", ".digests.json", ".configs", ".*.tmp", ".gc.lock")
_LINKS = ("model", "wandb")  # that Retort and its libraries make


@dataclass(frozen=True)
class File:
    """A file or symbolic link below an artifact's folder: its path there, bytes, and time of its last change."""

    name: str
    num_bytes: int
    changed: float
    is_link: bool
    inode: tuple[int, int]


@dataclass(frozen=True)
class Artifact:
    """One artifact in a folder of results, `root`; `place` is its path below, the same in every such folder."""

    kind: Kind
    root: Path
    place: str

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.root / self.place

    @property
    def id(self) -> str:
        """The digits that end its path."""
        return self.place.rpartition("/")[2]

    @property
    def run(self) -> str | None:
        """The name of the run that it is of, None for what runs share."""
        parts = self.place.split("/")
        return parts[1] if parts[0] == "runs" else None

    @property
    def title(self) -> str:
        """Its path without the folder of its kind."""
        return self.place.partition("/")[2]

    @cached_property
    def files(self) -> tuple[File, ...]:
        """All files below its folder, sorted by path. A folder that vanishes meanwhile has none."""
        return tuple(sorted(_walk(self.path, ""), key=lambda file: file.name))

    @cached_property
    def own_files(self) -> tuple[File, ...]:
        """Its files without those of artifacts that lie in its folder."""
        return tuple(file for file in self.files if not _is_nested(self.kind, file.name))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files below its folder; one with several names counts once."""
        return sum({file.inode: file.num_bytes for file in self.files}.values())

    @property
    def changed(self) -> float:
        """When one of its own files was last written, in seconds since 1970; 0 without any."""
        return max((file.changed for file in self.own_files), default=0.0)

    @cached_property
    def state(self) -> str:
        """finished, or unfinished and how far it is, or what of a finished one is missing."""
        return _describe_state(self)

    @property
    def is_finished(self) -> bool:
        """Whether its record is there, and what the record is of."""
        return self.state == "finished"

    @property
    def unknown(self) -> list[str]:
        """The files below its folder that Retort does not write, and links that it does not make."""
        return [file.name for file in self.files if not _is_known(self, file)]


def find_artifacts(root: Path) -> list[Artifact]:
    """Return the artifacts in a folder of results, in the order of the data flow, then by path; [] without a folder."""
    found = [
        Artifact(kind, root, place)
        for kind in KINDS
        for place in _match(root, kind.place.split("/"))
    ]
    order = [kind.name for kind in KINDS]
    return sorted(found, key=lambda one: (order.index(one.kind.name), one.place))


def total_bytes(artifacts: Iterable[Artifact]) -> int:
    """Return the bytes of artifacts; one that lies in another one's folder counts once."""
    found = list(artifacts)
    paths = {one.path for one in found}
    return sum(one.num_bytes for one in found if not paths & set(one.path.parents))


def find_strangers(root: Path, artifacts: Sequence[Artifact]) -> list[str]:
    """Return the paths below `root` that are neither artifacts, nor on the way to one, nor other files of Retort.

    Folders are named, not what is in them; a link is one whatever it points to.
    """
    places = {one.place for one in artifacts}
    on_the_way = {place[:n] for place in places for n, sign in enumerate(place) if sign == "/"}
    tops = {kind.place.partition("/")[0] for kind in KINDS} - {"*"}
    found = []
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in _scan(root / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if not folder and any(fnmatchcase(entry.name, known) for known in _TOP_FILES):
                continue
            if name in places or (folder and entry.name.startswith(REMOVED)):
                continue
            if is_folder and (name in on_the_way or name in tops or _is_empty(root / name)):
                folders.append(name)
            else:
                found.append(name)
    return sorted(found)


def find_leftovers(root: Path) -> list[Path]:
    """Return the folders of artifacts that a killed removal had renamed, but not deleted."""
    places = {kind.place.rpartition("/")[0] for kind in KINDS}
    found = [
        root / place / entry.name
        for parent in sorted(places)
        for place in _match(root, parent.split("/"), is_artifact=False)
        for entry in _scan(root / place)
        if entry.name.startswith(REMOVED) and entry.is_dir(follow_symlinks=False)
    ]
    return sorted(set(found))


def _match(root: Path, steps: Sequence[str], *, is_artifact: bool = True) -> Iterator[str]:
    """Yield the folders below `root` that a place describes; the last step is an id unless it is no artifact's."""
    if "**" in steps:  # a benchmark lies in a run or a teacher
        for owner in ("runs/*/*", "teachers/*"):
            yield from _match(root, [*owner.split("/"), *steps[2:]], is_artifact=is_artifact)
        return
    places = [""]
    for number, step in enumerate(steps):
        is_id = is_artifact and number == len(steps) - 1
        found = []
        for place in places:
            if step != "*":
                names = [step] if _is_folder(root / place / step) else []
            else:
                entries = _scan(root / place)
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
                names = [name for name in names if not name.startswith(".")]
            found += [
                f"{place}/{name}" if place else name
                for name in names
                if not is_id or ID.fullmatch(name)
            ]
        places = found
    yield from places


def _walk(folder: Path, prefix: str) -> Iterator[File]:
    for entry in _scan(folder):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{name}/")
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        is_link = stat.S_ISLNK(status.st_mode)
        yield File(name, status.st_size, status.st_mtime, is_link, (status.st_dev, status.st_ino))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, sorted by name; nothing where there is none, or it may not be read."""
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_empty(folder: Path) -> bool:
    """Return whether a folder has no files, in folders below it neither."""
    return next(_walk(folder, ""), None) is None


def _is_nested(kind: Kind, name: str) -> bool:
    """Return whether a file in an artifact's folder is of another artifact in it."""
    parts = name.split("/")
    if kind.name == "journal":
        return len(parts) > 1 and ID.fullmatch(parts[0]) is not None
    return kind.name in ("run", "teacher") and parts[0] in ("evaluation", "benchmarks")


def _is_known(artifact: Artifact, file: File) -> bool:
    kind, name = artifact.kind, file.name
    if _is_nested(kind, name):
        steps = name.split("/")
        inner = {"evaluation": 2, "benchmarks": 3}.get(steps[0], 1)
        nested = KIND_OF[
            {"evaluation": "evaluation", "benchmarks": "benchmark"}.get(steps[0], "synthesis")
        ]
        if len(steps) <= inner or not ID.fullmatch(steps[inner - 1]):
            return steps[inner - 1].startswith(REMOVED)
        kind, name = nested, "/".join(steps[inner:])
    top = name.partition("/")[0]
    if file.is_link and top not in _LINKS:
        return False
    return any(fnmatchcase(top, pattern) for pattern in (*kind.files, *OF_ALL))


def _describe_state(artifact: Artifact) -> str:
    names = {file.name.partition("/")[0] for file in artifact.own_files}
    if artifact.kind.name == "journal":
        return "finished"
    record, *beside = artifact.kind.finished
    records = [name for name in names if fnmatchcase(name, record)]
    if not records or len(records) < sum(fnmatchcase(name, ".draw_*.json") for name in names):
        return "unfinished" + _describe_progress(artifact, names)
    missing = [name for name in beside if name not in names]
    return f"without {missing[0]}" if missing else "finished"


def _describe_progress(artifact: Artifact, names: set[str]) -> str:
    """Return how far a training or a teacher's pass is, "" for others and before its first file."""
    steps = [
        int(name.rpartition("-")[2]) for name in names if re.fullmatch(r"checkpoint-\d+", name)
    ]
    if artifact.kind.name == "run" and steps:
        return f", at step {max(steps)}"
    if artifact.kind.name != "logits":
        return ""
    done = sum(bool(re.fullmatch(r"parts/[^/.]+\.h5", file.name)) for file in artifact.own_files)
    return f", {done} parts" if done else ""
