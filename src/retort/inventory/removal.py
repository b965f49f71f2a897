"""`retort gc`: remove what no config needs, and nothing that anybody holds.

An artifact is renamed, looked at again, and then deleted. So whoever looks finds all of it or nothing: a gc that is
killed leaves no half of a cache under its name, and the next one deletes the renamed rest. While it removes, gc holds a
lock beside the results against another gc, and lists the files in `.snakemake/locks` of the current folder, so that a
Snakemake that has planned with them, on any node, refuses to start instead of failing in a job. What is left of the
race: a Snakemake of another folder that shares the cache, and has planned but started no job yet.
"""

import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from retort.inventory.holders import OWN_MARK, Holders
from retort.inventory.layout import (
    REMOVED,
    Artifact,
    find_artifacts,
    find_leftovers,
    find_strangers,
    total_bytes,
)
from retort.inventory.listing import find_roots
from retort.inventory.needs import Needs, read_needs
from retort.inventory.origins import read_origin
from retort.inventory.tables import choose_width, describe_age, format_size, render_table
from retort.io.files import file_lock, temporary_name
from retort.training.record import TrainingRecord

_LOCK = ".gc.lock"
# What a config has made, if it was ever run; a teacher's record is the same for many.
_TELLING = ("corpus", "synthesis", "tokens", "logits", "validation", "run")
_TOP_LINKS = ("report.html", "summary.txt")


@dataclass(frozen=True)
class Plan:
    """What gc would do in folders of results.

    free: artifacts to remove; those in their folders go with them. kept: that a config needs. spared: others that are
    left, with the reason. sources: config files that made what goes, by place. stores: URLs of objects that belong to
    what goes, by place; they stay. leftovers: what a killed gc had renamed. strangers: paths that are not Retort's.
    """

    roots: tuple[Path, ...]
    free: list[Artifact] = field(default_factory=list)
    kept: list[Artifact] = field(default_factory=list)
    spared: list[tuple[Artifact, str]] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    stores: dict[str, str] = field(default_factory=dict)
    leftovers: list[Path] = field(default_factory=list)
    strangers: list[Path] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is to be removed."""
        rest = sum(
            file.stat().st_size
            for path in self.leftovers
            for file in path.rglob("*")
            if _is_file(file)
        )
        return rest + sum(artifact.num_bytes for artifact in self.free)


def plan_removal(
    keep: Sequence[Path], results: Path | None, *, journals: Sequence[str] = ()
) -> Plan:
    """Return what would be removed if only these configs are kept.

    journals: ids of answers whose journal is to go too. Raises ValueError for a wrong config, a folder that does not
    exist, configs none of which has any result there, and a journal that is not there or is needed.
    """
    needs = read_needs(keep)
    plan = Plan(find_roots(needs, results))
    holders = Holders(plan.roots)
    for root in plan.roots:
        _plan_folder(plan, root, needs, journals, holders)
    made = {one.place for one in plan.kept if one.kind.name in _TELLING}
    strange = [one.name for one in needs if not made & one.places.keys()]
    if len(strange) == len(needs) and plan.free:
        raise ValueError(
            f"Nothing that {' and '.join(strange)} makes is in {', '.join(map(str, plan.roots))}, so all results there "
            "would go. Was it edited since, or is this another folder or another version of Retort? `retort ls` shows "
            "what is there. Run the config first, or delete by hand."
        )
    unknown = set(journals) - {one.id for one in [*plan.free, *(one for one, _ in plan.spared)]}
    if unknown:
        raise ValueError(
            f"--journal {sorted(unknown)[0]!r}: there is no such folder in syntheses/, or a config that is kept "
            "needs it."
        )
    return plan


def _plan_folder(
    plan: Plan, root: Path, needs: Sequence[Needs], journals: Sequence[str], holders: Holders
) -> None:
    found = find_artifacts(root)
    places = {place for one in needs for place in one.places}
    named = [os.path.realpath(path) for one in needs for path in one.paths]
    now = read_clock(root)
    settled: list[str] = []  # what lies in these folders goes, or stays, with them
    for artifact in found:
        if any(artifact.place.startswith(f"{place}/") for place in settled):
            continue
        own = os.path.realpath(artifact.path)
        if artifact.place in places:
            plan.kept.append(artifact)
            continue
        if artifact.kind.name == "journal" and artifact.id not in journals:
            if artifact.own_files:
                plan.spared.append((artifact, "answers that were paid for: --journal removes them"))
            continue
        settled.append(artifact.place)
        if any(f"{path}/".startswith(f"{own}/") for path in named):
            plan.kept.append(artifact)
        elif why := holders.find(artifact, now=now) or _find_unknown(artifact):
            plan.spared.append((artifact, why))
        else:
            plan.free.append(artifact)
            origin = read_origin(artifact)
            plan.sources[artifact.place] = origin.source or ""
            if origin.store:
                plan.stores[artifact.place] = origin.store
    plan.leftovers.extend(find_leftovers(root))
    plan.strangers.extend(
        root / name for name in find_strangers(root, found) if root / name not in plan.roots
    )


def _find_unknown(artifact: Artifact) -> str | None:
    """Return which file of a folder is not Retort's, None without one."""
    unknown = [*artifact.unknown, *_find_added(artifact)]
    if not unknown:
        return None
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return f"it holds {unknown[0]}{more}, which Retort did not write: move that away first"


def _find_added(artifact: Artifact) -> list[str]:
    """Return the files that were put into the final/ of a finished student."""
    if artifact.kind.name != "run" or not artifact.is_finished:
        return []
    try:
        written = TrainingRecord.read(artifact.path / "training.json").final
    except ValueError:
        return []
    inside = [file.name for file in artifact.own_files if file.name.startswith("final/")]
    names = (name.removeprefix("final/") for name in inside)
    return [f"final/{name}" for name in names if name not in written and not name.endswith(".tmp")]


def remove(plan: Plan) -> list[tuple[Artifact, str]]:
    """Remove what a plan says; return what stayed after all, with the reason.

    Waits for another gc in the same folders. Raises ValueError when a folder cannot be locked.
    """
    stayed: list[tuple[Artifact, str]] = []
    with ExitStack() as stack:
        for root in plan.roots:
            busy = f"another gc is at work in {root}: waiting for it to end"
            stack.enter_context(file_lock(root / _LOCK, busy=busy))
        stack.enter_context(_lock_out_snakemake(plan.free))
        renamed = _rename_all(plan, stayed)
        # What began between the first look and the renaming: its locks and open files have moved along.
        holders = Holders(plan.roots)
        for artifact, path in renamed:
            moved = Artifact(
                artifact.kind, artifact.root, path.relative_to(artifact.root).as_posix()
            )
            now = read_clock(artifact.root)
            why = holders.find(artifact, now=now) or holders.find(moved, now=now)
            if why and not artifact.path.exists():
                path.rename(artifact.path)
                stayed.append((artifact, why))
            elif failure := _delete(path):
                stayed.append((artifact, failure))
            else:
                _remove_empty(artifact)
        for path in plan.leftovers:
            _delete(path)
        for root in plan.roots:
            _remove_links(root)
    return stayed


def _rename_all(plan: Plan, stayed: list[tuple[Artifact, str]]) -> list[tuple[Artifact, Path]]:
    """Rename the folders that nobody holds, and return (artifact, new path) of each; add the others to `stayed`."""
    holders = Holders(plan.roots)
    renamed = []
    for planned in plan.free:
        artifact = Artifact(planned.kind, planned.root, planned.place)  # its files as they are now
        why = holders.find(artifact, now=read_clock(artifact.root))
        if not why and artifact.changed > planned.changed:
            why = "it was written to meanwhile"
        if why:
            stayed.append((artifact, why))
            continue
        path = artifact.path.with_name(f"{REMOVED}{artifact.id}-{os.getpid()}")
        try:
            artifact.path.rename(path)
        except FileNotFoundError:
            continue  # somebody else removed it
        except OSError as error:
            stayed.append((artifact, f"{error.strerror}: {artifact.path}"))
            continue
        renamed.append((artifact, path))
    return renamed


def _delete(path: Path) -> str | None:
    """Delete a renamed folder; return why that failed, None if it did not."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return None


def _remove_empty(artifact: Artifact) -> None:
    """Remove the folders that held an artifact, below that of all results, if nothing else is in them."""
    for parent in artifact.path.parents:
        if parent == artifact.root:
            return
        try:
            parent.rmdir()
        except OSError:  # not empty
            return


@contextmanager
def _lock_out_snakemake(artifacts: Sequence[Artifact]) -> Iterator[None]:
    """Have a Snakemake that starts here, and has planned with these artifacts, refuse to start.

    The folders of results are locked, so what an earlier gc has left here is of one that was killed.
    """
    folder = Path(".snakemake")
    if not folder.is_dir():
        yield
        return
    locks = folder / "locks"
    locks.mkdir(exist_ok=True)
    for old in locks.glob("*.output.lock"):
        with suppress(OSError):
            if old.read_text(errors="replace").startswith(OWN_MARK):
                old.unlink()
    names = [str(one.path / file.name) for one in artifacts for file in one.own_files]
    number = next(
        n for n in range(1_000_000, 2_000_000) if not (locks / f"{n}.output.lock").exists()
    )
    path = locks / f"{number}.output.lock"
    temporary = temporary_name(path)
    mark = f"{OWN_MARK} {platform.node()} {os.getpid()}"
    temporary.write_text("\n".join([mark, *names, ""]), errors="surrogateescape")
    temporary.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # a Snakemake's
            locks.rmdir()


def _remove_links(root: Path) -> None:
    """Remove the links to the newest report that lead nowhere now; Snakemake makes them again."""
    for name in _TOP_LINKS:
        link = root / name
        if link.is_symlink() and not link.exists() and str(link.readlink()).startswith("reports/"):
            link.unlink(missing_ok=True)


def read_clock(root: Path) -> float:
    """Return the time by the clock of the file system, which all nodes share; this node's where it is read only."""
    try:
        with tempfile.TemporaryFile(dir=root) as clock:
            return os.fstat(clock.fileno()).st_mtime
    except OSError:
        return time.time()


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def render_plan(plan: Plan, *, is_done: bool, stayed: Sequence[tuple[Artifact, str]] = ()) -> str:
    """Return what a plan removes, or has removed, and what stays and why, as text."""
    gone = [one for one in plan.free if one.path not in {artifact.path for artifact, _ in stayed}]
    width = choose_width()
    blocks = [_render_gone(gone, plan.sources, width)] if gone else []
    size = format_size(total_bytes(gone))
    rest = [f"left by a gc that was killed: {path}" for path in plan.leftovers]
    spared = [*plan.spared, *stayed]
    blocks.append(
        [f"{'removed' if is_done else 'to remove'}: {len(gone)} artifacts, {size}", *rest]
    )
    if stores := [plan.stores[one.place] for one in gone if one.place in plan.stores]:
        lines = (
            f"  gcloud storage rm --recursive {url}"
            if url.startswith("gs:")
            else f"  aws s3 rm --recursive {url}"
            for url in stores
        )
        blocks.append(
            ["parts in a store stay, for others may use them. To remove them too:", *lines]
        )
    kept = format_size(total_bytes(plan.kept))
    blocks.append([f"kept for the configs: {len(plan.kept)} artifacts, {kept}"])
    if spared:
        blocks.append(["not touched:", *_render_spared(spared, width)])
    if plan.strangers:
        blocks.append(["not Retort's, not touched:", *(f"  {path}" for path in plan.strangers)])
    if not is_done and (gone or plan.leftovers):
        blocks.append(["Nothing was removed: add --yes to remove this."])
    return "\n\n".join("\n".join(block) for block in blocks)


def _render_gone(gone: Sequence[Artifact], sources: Mapping[str, str], width: int) -> list[str]:
    """Return a line for each artifact, and one for all that are made again in seconds."""
    rows = [
        [
            one.kind.name,
            one.title,
            format_size(one.num_bytes),
            describe_age(one.changed),
            one.state,
            sources[one.place],
        ]
        for one in gone
        if not one.kind.is_small
    ]
    small = [one for one in gone if one.kind.is_small]
    kinds = Counter(one.kind.title for one in small)
    others = ", ".join(f"{number} {title}" for title, number in kinds.items())
    last = [f"  and {others} ({format_size(total_bytes(small))})"] if small else []
    return [*render_table(rows, width=width), *last]


def _render_spared(spared: Sequence[tuple[Artifact, str]], width: int) -> Iterator[str]:
    """Yield a line for each reason, and below it the artifacts that stay for it."""
    for why in dict.fromkeys(reason for _, reason in spared):
        yield f"  {why}:"
        rows = [
            [f"  {one.root}/{one.place}", format_size(one.num_bytes), ""]
            for one, reason in spared
            if reason == why
        ]
        yield from render_table(rows, width=width)
