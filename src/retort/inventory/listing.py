"""`retort ls`: the artifacts of a folder of results, whose they are, and in what they differ."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.config.schema import show
from retort.inventory.comparing import compare_kinds, compare_nearest, find_trials
from retort.inventory.layout import (
    Artifact,
    find_artifacts,
    find_leftovers,
    find_strangers,
    total_bytes,
)
from retort.inventory.needs import Needs, read_needs
from retort.inventory.origins import Keys, Origin, read_origin, trace_inputs, whole_keys
from retort.inventory.tables import choose_width, describe_age, format_size, render_table

_SHOWN_SOURCES = 2


@dataclass(frozen=True)
class Row:
    """An artifact of a list.

    sources: config files of the runs that use it, else of what made it. used_by: these runs, as "file: run".
    is_needed: by a config that was given; None without one. differs: its keys that others of its kind, or the nearest
    run of the configs, have otherwise. twin: place of another one with the same keys, made from other files.
    """

    artifact: Artifact
    origin: Origin
    sources: tuple[str, ...]
    used_by: tuple[str, ...]
    is_needed: bool | None
    is_trial: bool
    differs: Keys
    twin: str | None

    @property
    def state(self) -> str:
        """The artifact's, and whether it is a trial."""
        return self.artifact.state + (", trial" if self.is_trial else "")


@dataclass(frozen=True)
class Inventory:
    """What lies in some folders of results: rows in the order of the data flow, and what Retort does not know.

    missing: places that the configs need and that are not there, with the configs.
    """

    roots: tuple[Path, ...]
    rows: list[Row]
    missing: dict[str, list[str]]
    strangers: list[Path]
    leftovers: list[Path]


def find_roots(needs: Sequence[Needs], given: Path | None) -> tuple[Path, ...]:
    """Return the folders of results to look at: the one given, else those of the configs, else ./results.

    Raises ValueError where there is none.
    """
    named = [given] if given else [root for one in needs for root in one.roots] or [Path("results")]
    found = tuple({root.resolve(): root for root in named if root.is_dir()}.values())
    if not found or (given and not given.is_dir()):
        what = "--results is" if given else "there is no"
        raise ValueError(
            f"{what} {str(named[0])!r}, which is no folder (looked in {Path.cwd()}). Go to the folder where you type "
            "snakemake, or name the folder of results with --results."
        )
    return found


def take_inventory(configs: Sequence[Path], results: Path | None) -> Inventory:
    """Return what lies in the folders of results. Raises ValueError for a wrong config, or without such a folder."""
    needs = read_needs(configs)
    roots = find_roots(needs, results)
    artifacts = [artifact for root in roots for artifact in find_artifacts(root)]
    origins = {artifact.place: read_origin(artifact) for artifact in artifacts}
    known = {artifact.place for artifact in artifacts}
    missing = {
        place: [_name_runs(one.name, runs)]
        for one in needs
        for place, runs in one.places.items()
        if place not in known and not place.startswith(("checks/", "reports/"))
    }
    strangers = [
        root / name
        for root in roots
        for name in find_strangers(root, [one for one in artifacts if one.root == root])
        if root / name not in roots
    ]
    leftovers = [path for root in roots for path in find_leftovers(root)]
    return Inventory(roots, _make_rows(artifacts, origins, needs), missing, strangers, leftovers)


def _make_rows(
    artifacts: Sequence[Artifact], origins: Mapping[str, Origin], needs: Sequence[Needs]
) -> list[Row]:
    users = _find_users(artifacts, origins, needs)
    keys = {place: whole_keys(place, origins) for place in origins}
    trials = find_trials(artifacts, origins, keys)
    differs, twins = compare_kinds(artifacts, origins, keys)
    needed = {place for one in needs for place in one.places}
    if needs:
        wanted = [found for one in needs for found in one.keys.values()]
        differs = {
            one.place: {}
            if one.place in needed
            else compare_nearest(one, origins, keys[one.place], wanted)
            for one in artifacts
        }
    rows = []
    for artifact in artifacts:
        place, own = artifact.place, origins[artifact.place].source
        used = users.get(place, {})
        rows.append(
            Row(
                artifact,
                origins[place],
                sources=tuple(sorted(used)) or ((own,) if own else ()),
                used_by=tuple(_name_runs(*found) for found in sorted(used.items())),
                is_needed=place in needed if needs else None,
                is_trial=place in trials,
                differs=differs[place],
                twin=twins.get(place),
            )
        )
    return rows


def _find_users(
    artifacts: Sequence[Artifact], origins: Mapping[str, Origin], needs: Sequence[Needs]
) -> dict[str, dict[str, list[str]]]:
    """Return {place: {config file: names of its runs that use it}}: of the configs given, else of runs on the disk."""
    users: dict[str, dict[str, list[str]]] = {}
    if needs:
        for one in needs:
            for place, runs in one.places.items():
                users.setdefault(place, {})[one.name] = runs
        return users
    for artifact in artifacts:
        source, run = origins[artifact.place].source, artifact.run
        if artifact.kind.name != "run" or source is None or run is None:
            continue
        for place in trace_inputs(artifact.place, origins):
            runs = users.setdefault(place, {}).setdefault(source, [])
            if run not in runs:
                runs.append(run)
    return users


def _name_runs(source: str, runs: Iterable[str]) -> str:
    names = ", ".join(runs)
    return f"{source} ({names})" if names else source


def render_inventory(found: Inventory, *, is_long: bool = False, width: int | None = None) -> str:
    """Return the inventory as text of `width` columns (of the terminal, from 80 to 120); is_long: small kinds too."""
    width = width or choose_width()
    kinds = dict.fromkeys(row.artifact.kind for row in found.rows)
    blocks = [_render_head(found)]
    short = []
    for kind in kinds:
        rows = [row for row in found.rows if row.artifact.kind == kind]
        size = format_size(total_bytes(row.artifact for row in rows))
        if kind.is_small and not is_long:
            short.append(f"{len(rows)} {kind.title} ({size})")
            continue
        head = f"{kind.title}: {len(rows)}, {size}"
        cells = [_cells(row) for row in rows]
        blocks.append("\n".join([head, *render_table(cells, width=width)]))
    if short:
        blocks.append(f"also {', '.join(short)}: --all lists them")
    blocks += _render_rest(found, width)
    return "\n\n".join(blocks)


def _render_head(found: Inventory) -> str:
    top = [
        row
        for row in found.rows
        if not row.artifact.kind.is_small and row.artifact.kind.name != "synthesis"
    ]
    unfinished = sum(
        not row.artifact.is_finished for row in found.rows if not row.artifact.kind.is_small
    )
    trials = sum(row.is_trial for row in top)
    folders = ", ".join(f"{root}/" for root in found.roots)
    facts = [f"{len(top)} artifacts", format_size(total_bytes(row.artifact for row in found.rows))]
    facts += [f"{unfinished} unfinished"] if unfinished else []
    facts += [f"{trials} of trials"] if trials else []
    return f"{folders}: {', '.join(facts)}"


def _render_rest(found: Inventory, width: int) -> Iterator[str]:
    def listed(head: str, items: Iterable[str]) -> str:
        text = f"{head}: {', '.join(items)}"
        return "\n".join(textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False))

    if found.missing:
        yield listed(
            "not made yet", (f"{place} of {names[0]}" for place, names in found.missing.items())
        )
    if found.leftovers:
        yield listed(
            "left by a removal that was killed (retort gc ends it)", map(str, found.leftovers)
        )
    if found.strangers:
        yield listed("not Retort's", map(str, found.strangers))


def _cells(row: Row) -> list[str]:
    artifact = row.artifact
    more = len(row.sources) - _SHOWN_SOURCES
    sources = ", ".join(row.sources[:_SHOWN_SOURCES]) + (f" +{more}" if more > 0 else "")
    if row.is_needed is False:
        sources = f"not needed{f', of {sources}' if sources else ''}"
    about = [f"{key}={show(value)}" for key, value in row.differs.items()]
    if row.twin:
        about.append(f"keys of {row.twin.rpartition('/')[2]}, other files")
    if artifact.unknown:
        about.append(f"not Retort's: {', '.join(artifact.unknown[:3])}")
    age = describe_age(artifact.changed)
    return [
        artifact.title,
        format_size(artifact.num_bytes),
        age,
        row.state,
        sources,
        "  ".join(about),
    ]


def to_json(found: Inventory) -> dict[str, Any]:
    """Return the inventory as JSON values: bytes, times in seconds since 1970, and all keys of each artifact."""
    artifacts = [
        {
            "kind": row.artifact.kind.name,
            "id": row.artifact.id,
            "path": str(row.artifact.path),
            "run": row.artifact.run,
            "source": row.origin.source,
            "used_by": list(row.used_by),
            "is_needed": row.is_needed,
            "state": row.artifact.state,
            "is_finished": row.artifact.is_finished,
            "is_trial": row.is_trial,
            "bytes": row.artifact.num_bytes,
            "files": len(row.artifact.files),
            "changed": round(row.artifact.changed, 3),
            "inputs": dict(row.origin.inputs),
            "keys": row.origin.keys,
            "differs": row.differs,
            "unknown": row.artifact.unknown,
        }
        for row in found.rows
    ]
    return {
        "folders": [str(root) for root in found.roots],
        "bytes": total_bytes(row.artifact for row in found.rows),
        "artifacts": artifacts,
        "missing": found.missing,
        "strangers": [str(path) for path in found.strangers],
        "leftovers": [str(path) for path in found.leftovers],
    }
