"""`retort diff`: why two results, or the same run of two configs, have two ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.config.schema import show
from retort.inventory.facts import find_artifact
from retort.inventory.layout import Artifact
from retort.inventory.needs import read_project
from retort.inventory.nodes import Node, plan_node, read_node
from retort.inventory.origins import default_of
from retort.inventory.tables import choose_width, render_table

_ABSENT = "-"
# Files that are no consequence of keys.
_SOURCES = ("what the student starts from", "tokenizer", "synthesis")


@dataclass(frozen=True)
class Line:
    """A line of a comparison: what differs, as deep in the tree as it is, and both values."""

    depth: int
    what: str
    first: str
    second: str


def explain(first: str, second: str, *, run: str | None = None) -> str:
    """Return why two results have two ids: paths of results, configs, or CONFIG:RUN.

    Of two configs, these are the runs of one name. Raises ValueError for what is neither, for results of two kinds, and
    for configs without a common run.
    """
    found = list(_pair(first, second, run))
    blocks = []
    for (name, a), (other, b) in found:
        if a.id == b.id:
            blocks.append(f"{name} and {other} have one id, {a.id}: {a.kind}.")
            continue
        rows = [
            [" " * 2 * line.depth + line.what, line.first, line.second, ""]
            for line in compare(a, b)
        ]
        table = render_table([["", name, other, ""], *rows], width=choose_width())
        blocks.append("\n".join(table))
    return "\n\n".join(blocks)


def compare(first: Node, second: Node) -> list[Line]:
    """Return in what two ids of one kind differ: each followed by its keys, files and inputs, down to the causes.

    Where nothing that is recorded differs, the last line says so.
    """
    return list(_compare(first, second, 0, set()))


def _compare(first: Node, second: Node, depth: int, seen: set[tuple[str, str]]) -> Iterator[Line]:
    """Yield the lines of two nodes. `seen`: pairs of ids whose causes were told already; they are told once."""
    ids = first.id, second.id
    if ids in seen:
        yield Line(depth, f"{first.kind}, as above", *ids)
        return
    seen.add(ids)
    yield Line(depth, first.kind, *ids)
    causes = [*_compare_keys(first, second, depth + 1)]
    for kind in dict.fromkeys([*first.inputs, *second.inputs]):
        a, b = first.inputs.get(kind), second.inputs.get(kind)
        if a is None or b is None:
            pair = (node.id if node else _ABSENT for node in (a, b))
            causes.append(Line(depth + 1, kind, *pair))
        elif a.id != b.id:
            causes += _compare(a, b, depth + 1, seen)
    causes += _compare_files(first, second, depth + 1, is_explained=bool(causes))
    if not causes:
        commits = [node.commit[:12] if node.commit else _ABSENT for node in (first, second)]
        causes.append(Line(depth + 1, "nothing recorded; commit of Retort", *commits))
    yield from causes


def _compare_keys(first: Node, second: Node, depth: int) -> Iterator[Line]:
    for key in dict.fromkeys([*first.keys, *second.keys]):
        a, b = (node.keys.get(key, default_of(key)) for node in (first, second))
        if a != b and key not in first.unused | second.unused:
            yield Line(depth, key, show(a), show(b))


def _compare_files(first: Node, second: Node, depth: int, *, is_explained: bool) -> Iterator[Line]:
    """Yield the files that differ. What is made of a text differs with its keys, so it is told only without these."""
    read = [any(name.startswith("file ") for name in node.files) for node in (first, second)]
    for name in dict.fromkeys([*first.files, *second.files]):
        a, b = first.files.get(name, _ABSENT), second.files.get(name, _ABSENT)
        is_file = name.startswith("file ") and all(read)
        is_told = is_file or name in _SOURCES or not is_explained
        if a != b and is_told and (is_file or _ABSENT not in (a, b)):
            yield Line(depth, name, a[:12], b[:12])


def _pair(
    first: str, second: str, run: str | None
) -> Iterator[tuple[tuple[str, Node], tuple[str, Node]]]:
    """Yield the pairs to compare, each with a name: one, or of two configs one for each common run."""
    a, b = (_read_side(word) for word in (first, second))
    if isinstance(a, Artifact) and isinstance(b, Artifact):
        _require_one_kind(a, b)
        yield (a.place, read_node(a)), (b.place, read_node(b))
    elif isinstance(a, Artifact):
        assert isinstance(b, _ConfigSide)
        yield (a.place, read_node(a)), _choose_of(b, a, run)
    elif isinstance(b, Artifact):
        yield _choose_of(a, b, run), (b.place, read_node(b))
    else:
        names = [(run or a.run or name, run or b.run or name) for name in a.project.runs]
        common = [
            n for n in dict.fromkeys(names) if n[0] in a.project.runs and n[1] in b.project.runs
        ]
        if not common:
            runs = [", ".join(side.project.runs) for side in (a, b)]
            raise ValueError(
                f"{first} has the runs {runs[0]}, {second} has {runs[1]}: choose one of each, such as mine.yaml:soft."
            )
        for mine, theirs in common:
            pairs = zip((a, b), (mine, theirs), strict=True)
            yield tuple(
                (f"{side.name} {name}", plan_node(side.project.runs[name], Path()))
                for side, name in pairs
            )  # type: ignore[misc]


@dataclass(frozen=True)
class _ConfigSide:
    name: str
    project: Any
    run: str | None


def _read_side(word: str) -> Artifact | _ConfigSide:
    path, _, run = word.rpartition(":")
    if not Path(word).exists() and path and Path(path).is_file():
        found = _ConfigSide(Path(path).name, read_project(Path(path))[1], run)
        if run not in found.project.runs:
            raise ValueError(
                f"{path} has no run {run!r}. Its runs: {', '.join(found.project.runs)}."
            )
        return found
    if Path(word).suffix in (".yaml", ".yml"):
        return _ConfigSide(Path(word).name, read_project(Path(word))[1], None)
    if not Path(word).exists():
        raise ValueError(
            f"{word} does not exist (looked in {Path.cwd()}). `retort ls` lists what is there."
        )
    artifact = find_artifact(Path(word))
    if artifact is None:
        raise ValueError(
            f"{word} is no result of Retort and no config (YAML). `retort ls` lists results."
        )
    return artifact


def _require_one_kind(a: Artifact, b: Artifact) -> None:
    if a.kind != b.kind:
        raise ValueError(
            f"{a.place} is of the kind {a.kind.name}, {b.place} {b.kind.name}: compare two of one kind."
        )


def _choose_of(side: _ConfigSide, artifact: Artifact, run: str | None) -> tuple[str, Node]:
    """Return what a config makes in the place of an artifact: of the run that was named, or has the artifact's name."""
    name = run or side.run or artifact.run
    runs: Sequence[str] = list(side.project.runs)
    if name is None and len(runs) == 1:
        name = runs[0]
    if name not in runs:
        raise ValueError(f"Choose one of the runs of {side.name} with --run: {', '.join(runs)}.")
    found = side.project.runs[name]
    kind = artifact.kind.name
    chosen = found if kind == "run" else getattr(found, kind, None)
    if chosen is None:
        raise ValueError(
            f"The run {name} of {side.name} has no {kind} to compare with {artifact.place}."
        )
    return f"{side.name} {name}", plan_node(chosen, Path())
