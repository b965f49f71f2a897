"""Sweeps: a run with lists of values becomes one run for each combination of them.

A list is a sweep if its key takes no list; if it does (`cache.temperatures`), a list of lists is. A run's name contains
only its own values, so adding a value to the sweep renames no run.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from retort.config.schema import (
    ConfigError,
    KeyPath,
    Schema,
    dotted,
    is_section,
    load_schema,
    merge,
    resolve,
    show,
    types_of,
)
from retort.config.values import parse_text, read_leaf

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def expand_runs(runs: Any) -> Any:
    """Return `runs` with every sweep expanded to one run for each combination of values.

    Raises ConfigError when a sweep has no values, or two runs would have the same name.
    """
    runs = parse_text(runs) if isinstance(runs, str) else runs
    if not isinstance(runs, Mapping):
        return runs  # empty, or refused by read_config
    schema = load_schema()["properties"]["runs"]["additionalProperties"]
    expanded: dict[str, Any] = {}
    for entry, overrides in runs.items():
        for name, run in _expand_run(str(entry), _parse_sections(overrides, schema), schema):
            if name in expanded:
                raise ConfigError(
                    f"runs has two runs named {name!r}, at least one from a sweep. Rename one."
                )
            expanded[name] = run
    return expanded


def _expand_run(name: str, overrides: Any, schema: Schema) -> Iterator[tuple[str, Any]]:
    """Yield (name, overrides) of each run of an entry: one without a sweep."""
    sweeps = list(_find_sweeps(overrides, schema, ()))
    for path, values in sweeps:
        _check_values(("runs", name, *path), values)
    labels = _name_keys([path for path, _ in sweeps])
    for chosen in itertools.product(*(values for _, values in sweeps)):
        run, words = overrides, [name]
        for (path, _), label, value in zip(sweeps, labels, chosen, strict=True):
            run = merge(run, _nest(path, value))
            words.append(f"{label}_{_word(value)}")
        yield "-".join(words), run


def _parse_sections(value: Any, schema: Schema) -> Any:
    """Return a section and its subsections as mappings; Snakemake passes those of --config as text."""
    value = parse_text(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value  # empty, or refused by read_config
    parsed = {}
    for key, item in value.items():
        sub = resolve(schema["properties"].get(str(key), {}))
        parsed[str(key)] = _parse_sections(item, sub) if is_section(sub) else item
    return parsed


def _find_sweeps(
    overrides: Any, schema: Schema, path: KeyPath
) -> Iterator[tuple[KeyPath, list[Any]]]:
    """Yield the path and the values of every key with a sweep, in the config's order."""
    for key, value in overrides.items() if isinstance(overrides, Mapping) else ():
        sub = resolve(schema["properties"].get(key, {}))
        below = (*path, key)
        if is_section(sub):
            yield from _find_sweeps(value, sub, below)
        elif sub:
            value = parse_text(value) if _is_list_as_text(value) else value
            if isinstance(value, list) and _is_sweep(value, sub):
                yield (
                    below,
                    [read_leaf(item, sub, (*below, str(i))) for i, item in enumerate(value)],
                )


def _is_list_as_text(value: Any) -> bool:
    """Return whether a value is a list as Snakemake's --config passes it: as text."""
    return isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")


def _is_sweep(values: list[Any], schema: Schema) -> bool:
    return "array" not in types_of(schema) or any(isinstance(item, list) for item in values)


def _check_values(path: KeyPath, values: list[Any]) -> None:
    if not values:
        raise ConfigError(
            f"{dotted(path)} is [], a sweep without values. Give it values, or leave the key out."
        )
    words: dict[str, Any] = {}
    for value in values:
        if (word := _word(value)) in words:
            raise ConfigError(
                f"{dotted(path)} has {show(words[word])} and {show(value)}, which would give two runs the same "
                f"name ({word!r}). Remove one of them, or write them as two runs."
            )
        words[word] = value


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


def _nest(path: KeyPath, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)
