"""The files of a config and what the command line adds, as one, so that every mistake is told with its line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from retort.config.load import find_problems
from retort.config.schema import ConfigError, Problem, find_key, is_empty
from retort.config.sections import Config
from retort.config.sweeps import prefer_command_line
from retort.config.yaml_source import KeyPath, Place, Source, read_yaml

COMMAND_LINE = Place("--config")
_TEMPLATE = "__use_yte__"  # Snakemake fills such a file in before it reads it


def read_files(paths: Sequence[Path], given: Mapping[str, Any]) -> Source | None:
    """Return the values of files and of `--config`, each laid over the one before, key by key, as Snakemake does.

    None if a file is a template, which only Snakemake can read. Raises ValueError when a file cannot be read.
    """
    source = Source({})
    for path in paths:
        inside = path.is_relative_to(Path.cwd())
        added = read_yaml(path, str(path.relative_to(Path.cwd()) if inside else path))
        if _TEMPLATE in added.values:
            return None
        source = _lay_over(source, added)
    source = add_typed(source, given, COMMAND_LINE)
    return replace(source, values=prefer_command_line(source.values, given))


def add_typed(source: Source, given: Mapping[str, Any], place: Place) -> Source:
    """Return `source` with values laid over it that were typed, in `place`."""
    return _lay_over(source, Source(dict(given), dict.fromkeys(_paths(given), place)))


def load_source(source: Source) -> dict[str, Config]:
    """Return one complete config per run. Raises ConfigError that lists all mistakes with their places, in order."""
    configs, problems = find_problems(source.values)
    found = [(place, message) for place, message in source.problems]
    found += [(Place(""), message) for message in _refuse_keys(source.values)]
    found += [(source.place(problem.path) or Place(""), problem.message) for problem in problems]
    if not found:
        return configs
    files = [*source.files, COMMAND_LINE.file, "--set", ""]
    found.sort(key=lambda item: (files.index(item[0].file), item[0].line or 1_000_000_000))
    lines = [f"{place}: {message}" if place.file else message for place, message in found]
    raise ConfigError(*(Problem((), line) for line in dict.fromkeys(lines)))


def locate(error: ValueError, source: Source) -> str:
    """Return an error's message; before each mistake, the place of the key that it begins with if that is written."""
    return "\n".join(_locate(line, source) for line in str(error).splitlines())


def _locate(message: str, source: Source) -> str:
    if re.match(r"[a-z_]+\.[a-z_.\[\]\d]+ ", message):
        path = find_key(message)
        if path in source.places:
            return f"{source.places[path]}: {message}"
    return message


def _lay_over(base: Source, over: Source) -> Source:
    """Return `base` updated by `over`: sections are merged, lists and other values replaced."""
    places = dict(base.places)
    values = _merge(base.values, over.values, (), places)
    return Source(
        values, places | over.places, [*base.problems, *over.problems], base.files + over.files
    )


def _merge(
    base: Mapping[str, Any], over: Mapping[str, Any], path: KeyPath, places: dict[KeyPath, Place]
) -> dict[str, Any]:
    """Return the merged values, and remove the places of those that are replaced."""
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        key = (*path, str(name))
        if isinstance(below, Mapping) and is_empty(value):
            continue  # a section whose keys are all commented out
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merge(below, value, key, places)
        else:
            for replaced in [p for p in places if p[: len(key)] == key]:
                del places[replaced]
        merged[name] = value
    return merged


def _paths(values: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key and item below `values`."""
    pairs = (
        values.items()
        if isinstance(values, Mapping)
        else enumerate(values)
        if isinstance(values, list)
        else ()
    )
    for name, value in pairs:
        yield (*path, str(name))
        yield from _paths(value, (*path, str(name)))


def _refuse_keys(values: Any, path: str = "the config") -> Iterator[str]:
    """Yield a sentence for each key that YAML made something else of; a module's config comes as Snakemake reads it."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(name, bool | float | date) or name is None:
            yield (
                f"{path} has the key {name}, which YAML makes of a word that is not in quotes, such as no, on or "
                "2026-01-01. Put the name in quotes."
            )
        yield from _refuse_keys(value, str(name))
