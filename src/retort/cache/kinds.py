"""Kinds of parts: on what, in which type and by which versions they were computed. Unlike kinds round differently.

A part's header names its kind. The merged cache does not: it depends on the parts' rows alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from retort.io.files import write_atomically
from retort.io.records import STRICT

_LIST_SUFFIX = ".unlike"


class UnlikePartsError(ValueError):
    """Parts of unlike kinds, of which the config does not say that they may be merged."""


@dataclass(frozen=True, order=True)
class PartKind:
    """What a part's numbers depend on beside its header: kinds that differ in one of these are unlike.

    All CPUs are one device: another model of CPU rounds differently too, but it is not known which.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    device: str  # "cpu", or the model of the GPU; of a group of several models all of them
    dtype: str  # of the teacher's weights, as resolved
    torch: str  # version
    transformers: str  # version

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}, torch {self.torch}, transformers {self.transformers}"

    def to_json(self) -> dict[str, Any]:
        """Return the entry `made_by` of a part's header."""
        return asdict(self)


def describe_kind(kind: PartKind | None) -> str:
    """Return a kind in words; None is that of parts whose header does not name one."""
    return "of an earlier Retort, which did not note it" if kind is None else str(kind)


def count_kinds(kinds: Iterable[PartKind | None]) -> Counter[PartKind | None]:
    """Return the number of parts of each kind, most frequent first."""
    counts = Counter(kinds)
    ordered = sorted(counts, key=lambda kind: (-counts[kind], describe_kind(kind)))
    return Counter({kind: counts[kind] for kind in ordered})


def describe_count(kind: PartKind | None, count: int) -> str:
    """Return how many parts of a kind there are, in words."""
    return f"{count} part{'s' * (count > 1)}: {describe_kind(kind)}"


def refuse_unlike(paths: Sequence[Path], kinds: Sequence[PartKind | None]) -> None:
    """Raise UnlikePartsError when parts are of several kinds; the files of the rarer ones are listed beside them."""
    counts = count_kinds(kinds)
    if len(counts) < 2:
        return
    folder, lines, lists = paths[0].parent, [], []
    for number, (kind, count) in enumerate(counts.items()):
        line = describe_count(kind, count)
        if number > 0:
            files = [path for path, other in zip(paths, kinds, strict=True) if other == kind]
            lists.append(folder / f"{number}{_LIST_SUFFIX}")
            write_atomically(lists[-1], "".join(f"{path.resolve()}\n" for path in files).encode())
            line += f" (files listed in {lists[-1]})"
        lines.append(line)
    remove = " ".join(map(str, lists))
    raise UnlikePartsError(
        f"the parts in {folder} are of {len(counts)} unlike kinds, which round differently:\n  "
        + "\n  ".join(lines)
        + "\nHave the parts of one kind made again: delete the files of the others, for example with\n"
        f"  cat {remove} | xargs -d '\\n' rm\n"
        "and rerun the same command, on machines and with packages of that kind. Or merge them as they are: "
        "merge.accept_unlike_parts: true."
    )


def refuse_unlike_work(
    mine: PartKind, others: Mapping[Path, PartKind | None], *, store: str | None = None
) -> None:
    """Raise UnlikePartsError when a worker would add parts of its kind to others that exist, of another kind.

    store: URL of the folder that parts are stored in, if they are.
    """
    stored = f" and {store}" if store else ""
    for path, kind in others.items():
        if kind != mine:
            raise UnlikePartsError(
                f"this worker would make parts of another kind than those in {path.parent}, and they round differently."
                f"\n  here: {mine}\n  {path.name}: {describe_kind(kind)}\nRun it on a machine and with packages of "
                f"that kind. Or delete {path.parent}{stored}: its parts are made again. Or set "
                "merge.accept_unlike_parts: true to mix them."
            )


def is_list(path: Path) -> bool:
    """Return whether a file is one that `refuse_unlike` wrote."""
    return path.suffix == _LIST_SUFFIX
