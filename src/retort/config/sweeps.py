"""Runs, and sweeps: a run with lists of values becomes one run for each combination of them.

A list is a sweep if its key takes no list; if it does (`cache.temperatures`), a list of lists is. A run's name contains
only its own values, so adding a value to the sweep renames no run.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from retort.config.schema import ConfigError, KeyPath, Problem, dotted, merge, show
from retort.config.section import Section, key_types
from retort.config.sections import Config, section_at
from retort.config.suggestions import not_a_section
from retort.config.values import parse_text, read_value

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class Run(NamedTuple):
    """One run: its name, the entry of `runs` that it comes from ("" without `runs`), and its overrides."""

    name: str
    entry: str
    overrides: Mapping[str, Any]

    def place(self, key: KeyPath) -> KeyPath:
        """Return where a key's value is written: in the run, if the run overrides it."""
        found: Any = self.overrides
        for name in key:
            if isinstance(found, list):
                break
            if not isinstance(found, Mapping) or name not in found:
                return key
            found = found[name]
        return ("runs", self.entry, *key)


def expand_runs(runs: Any) -> tuple[list[Run], list[Problem]]:
    """Return all runs, a sweep as one for each combination of its values, and the mistakes in names and sweeps."""
    runs = parse_text(runs) if isinstance(runs, str) else runs
    if not isinstance(runs, Mapping):
        wrong = runs is not None and runs != ""
        return [], [Problem(("runs",), not_a_section(("runs",), runs))] if wrong else []
    expanded: dict[str, Run] = {}
    problems: list[Problem] = []
    for name, overrides in runs.items():
        entry = str(name)
        try:
            for run in _expand_run(entry, _read_entry(entry, overrides)):
                if run.name in expanded:
                    message = f"runs has two runs named {run.name!r}, at least one from a sweep. Rename one."
                    raise ConfigError(Problem(("runs", entry), message))
                expanded[run.name] = run
        except ConfigError as error:
            problems += error.problems
    return list(expanded.values()), problems


def prefer_command_line(raw: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose runs override no key of `given`, what the command line sets (Snakemake's --config).

    `raw` is the config with `given` merged into it. Runs of the command line itself are kept.
    """
    runs = parse_text(raw["runs"]) if isinstance(raw.get("runs"), str) else raw.get("runs")
    if not isinstance(runs, Mapping) or "runs" in given:
        return dict(raw)
    set_there = {str(name): parse_sections(value, str(name)) for name, value in given.items()}
    kept = {name: _leave_out(parse_sections(run), set_there) for name, run in runs.items()}
    return {**raw, "runs": kept}


def _leave_out(values: Any, others: Mapping[str, Any]) -> Any:
    """Return nested sections without the keys that `others` has too."""
    if not isinstance(values, Mapping):
        return values
    kept = {}
    for name, value in values.items():
        other = others.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            kept[name] = _leave_out(value, other)
        elif name not in others or isinstance(value, Mapping):
            kept[name] = value
    return kept


def _read_entry(name: str, overrides: Any) -> dict[str, Any]:
    """Return the overrides of an entry of `runs`, its sections as mappings."""
    overrides = parse_sections(overrides)
    message = None
    if not _RUN_NAME.fullmatch(name):
        message = (
            f"runs.{name!r} is not a valid name: it becomes a folder's name, so it takes letters, digits, "
            "'.', '_' and '-', and begins with a letter or a digit. Rename the run, for "
            f"instance to {_NOT_IN_NAMES.sub('_', name).strip('._-') or 'run1'!r}."
        )
    elif overrides is None or overrides == "":
        return {}
    elif not isinstance(overrides, Mapping):
        message = not_a_section(("runs", name), overrides)
    elif "output" in overrides:
        message = (
            f"runs.{name}.output is set, but runs share folders, because they share results. Set output "
            "at the top of the config, for all runs."
        )
    if message:
        raise ConfigError(Problem(("runs", name), message))
    return dict(overrides)


def _expand_run(name: str, overrides: Mapping[str, Any]) -> Iterator[Run]:
    """Yield each run of an entry: one without a sweep."""
    sweeps = list(_find_sweeps(overrides, Config, ()))
    for path, values in sweeps:
        _check_values(("runs", name, *path), values)
    labels = _name_keys([path for path, _ in sweeps])
    for chosen in itertools.product(*(values for _, values in sweeps)):
        run, words = overrides, [name]
        for (path, _), label, value in zip(sweeps, labels, chosen, strict=True):
            run = merge(run, nest(path, value))
            words.append(f"{label}_{_word(value)}")
        yield Run("-".join(words), name, run)


def parse_sections(value: Any, *path: str) -> Any:
    """Return a section and its subsections as mappings; Snakemake passes those of --config as text."""
    section = section_at(path)
    if section is None:
        return value
    value = parse_text(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value  # empty, or refused later
    return {str(key): parse_sections(item, *path, str(key)) for key, item in value.items()}


def _find_sweeps(
    overrides: Any, section: type[Section], path: KeyPath
) -> Iterator[tuple[KeyPath, list[Any]]]:
    """Yield the path and the values of every key with a sweep, in the config's order."""
    types = key_types(section)
    for key, value in overrides.items() if isinstance(overrides, Mapping) else ():
        here = (*path, key)
        if below := section_at(here):
            yield from _find_sweeps(value, below, here)
        elif key in types:
            value = parse_text(value) if _is_list_as_text(value) else value
            is_plain = types[key].items is None
            if isinstance(value, list) and (is_plain or any(isinstance(i, list) for i in value)):
                yield here, [read_value(item, types[key]) for item in value]


def _is_list_as_text(value: Any) -> bool:
    """Return whether a value is a list as Snakemake's --config passes it: as text."""
    return isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")


def _check_values(path: KeyPath, values: list[Any]) -> None:
    message = None
    if not values:
        message = (
            f"{dotted(path)} is [], a sweep without values. Give it values, or leave the key out."
        )
    words: dict[str, Any] = {}
    for value in values:
        if (word := _word(value)) in words:
            message = (
                f"{dotted(path)} has {show(words[word])} and {show(value)}, which would give two runs the same "
                f"name ({word!r}). Remove one of them, or write them as two runs."
            )
        words[word] = value
    if message:
        raise ConfigError(Problem(path, message))


def _name_keys(paths: list[KeyPath]) -> list[str]:
    """Return the last part of each key, or the whole key if another one has the same last part."""
    ends = [path[-1] for path in paths]
    return [path[-1] if ends.count(path[-1]) == 1 else ".".join(path) for path in paths]


def _word(value: Any) -> str:
    """Return a value as part of a run's name, which is the name of a folder."""
    if isinstance(value, list | tuple):
        return "_".join(map(_word, value))
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return _NOT_IN_NAMES.sub("_", text).strip("_")


def nest(path: KeyPath, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the path ("a", "b")."""
    for key in reversed(path):
        value = {key: value}
    return dict(value)
