"""`retort show` of a result that is no cache: the main facts of its records, how it was made, and its keys."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retort.config.schema import show
from retort.inventory.kinds import KINDS
from retort.inventory.layout import Artifact, find_artifacts
from retort.inventory.origins import Origin, find_made, read_origin
from retort.inventory.tables import format_size
from retort.io.files import read_json

# Digests of many files, long lists, and what is shown elsewhere.
_HIDDEN = {
    "format",
    "version",
    "digest",
    "files",
    "final",
    "header",
    "config",
    "made",
    "workers",
    "trained",
}
_HIDDEN |= {
    "command",
    "versions",
    "units",
    "breakdowns",
    "text",
    "kinds",
    "curve",
    "training",
    "reliability",
    "breakdown",
}
_MAX_ITEMS = 6


def find_artifact(path: Path) -> Artifact | None:
    """Return the artifact whose folder, or a file in it, is at a path; None for a path that is in none.

    Of an artifact that lies in another one's folder, this is the inner one.
    """
    folders = [path, *path.absolute().parents] if path.is_dir() else [*path.absolute().parents]
    for folder in folders:
        for root in folder.absolute().parents[:5]:
            place = folder.absolute().relative_to(root).as_posix()
            if any(_fits(place, kind.place) for kind in KINDS):
                found = [one for one in find_artifacts(root) if one.place == place]
                if found:
                    return found[0]
    return None


def _fits(place: str, pattern: str) -> bool:
    steps, names = pattern.split("/"), place.split("/")
    return (names[0] == steps[0] and len(names) == len(steps)) or (
        steps[0] == "*" and "benchmarks" in names
    )


def describe_artifact(artifact: Artifact) -> str:
    """Return the facts of an artifact: state, size, what its record says, how it was made, and its keys."""
    origin = read_origin(artifact)
    state = artifact.state + (f", {format_size(artifact.num_bytes)}" if artifact.files else "")
    lines = [f"{artifact.kind.name} {artifact.path}: {state}"]
    records = [artifact.path / name for name in artifact.kind.finished if name.endswith(".json")]
    for path in records:
        if path.exists():
            lines += ["", *_align(_list_facts(read_json(path)))]
    table = artifact.path / "summary.txt"
    if table.exists():
        lines += ["", table.read_text(encoding="utf-8").rstrip()]
    return "\n".join([*lines, *_describe_origin(origin, artifact)])


def describe_record(path: Path) -> str:
    """Return the facts of a JSON file that Retort wrote. Raises ValueError for another one."""
    content = read_json(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if not isinstance(kind, str) or not kind.startswith("retort"):
        raise ValueError(
            f"{path} is no record of Retort's: it has no format. Give a result's folder or record."
        )
    made = content.get("made") if "made" in content else content
    about = dict(_describe_made(made)) if isinstance(made, dict) else {}
    facts = [*_align(_list_facts(content)), *_align(about.items())]
    return "\n".join([f"{path}: {kind}, version {content.get('version')}", "", *facts])


def _describe_origin(origin: Origin, artifact: Artifact) -> list[str]:
    lines = [""]
    made = find_made(artifact)
    lines += _align(
        [*_describe_made(made), *((f"from {kind}", place) for kind, place in origin.inputs.items())]
    )
    if origin.keys:
        lines += ["", "keys that differ from their defaults:"]
        lines += _align((key, show(value)) for key, value in origin.keys.items())
    return lines


def _describe_made(made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not made.get("finished"):
        return
    of = f"run {made['run']} of {made.get('source')}" if made.get("run") else made.get("source")
    yield "made for", str(of or "no config file")
    yield "finished", f"{made['finished']}, after {made.get('seconds', 0):,.1f} s"
    where = [made.get("device"), made.get("dtype")]
    yield "on", ", ".join(str(word) for word in where if word)
    commit = f"commit {made['commit'][:12]}" if made.get("commit") else "no checkout"
    dirty = " with changes" if made.get("uncommitted_changes") else ""
    packages = [f"{name} {version}" for name, version in (made.get("versions") or {}).items()]
    yield "by", f"{commit}{dirty}; {', '.join(packages[:2])}"


def _list_facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of a record's facts; an estimate is one, with its interval."""
    for key, value in content.items():
        if key in _HIDDEN or value is None or value in ({}, []):
            continue
        if not isinstance(value, dict):
            yield key, _format(value)
            continue
        if "value" in value and "low" in value:
            yield (
                key,
                f"{_format(value['value'])} ({_format(value['low'])} to {_format(value['high'])})",
            )
        elif key == "metrics" or len(value) <= 2 * _MAX_ITEMS:
            yield from ((f"{key}.{name}", text) for name, text in _list_facts(value))


def _format(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if len(value) > _MAX_ITEMS or any(isinstance(item, dict | list) for item in value):
        return f"{len(value):,} of them"
    return ", ".join(map(_format, value))


def _align(rows: Any) -> list[str]:
    found = [(str(key), str(value)) for key, value in rows]
    width = max((len(key) for key, _ in found), default=0)
    return [f"  {key:<{width}}  {value}" for key, value in found]
