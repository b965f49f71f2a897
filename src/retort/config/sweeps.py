"""Sweeps: a run whose keys carry lists becomes one run for every combination of their values.

A list counts as a sweep where the key takes no list; where it takes one (`cache.temperatures`), a list of lists does.
A run's name says its values and nothing else of the sweep, so a value that is added adds its runs and renames none.
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
    parse_text,
    read_leaf,
    resolve,
    show,
    types_of,
)

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


def expand_runs(runs: Any) -> Any:
    """Return `runs` with every sweep written out, one run for each combination of values.

    Raises ConfigError for a sweep without values, or where two runs would have one name.
    """
    runs = parse_text(runs) if isinstance(runs, str) else runs
    if not isinstance(runs, Mapping):
        return runs  # empty, or refused when it is read
    schema = load_schema()["properties"]["runs"]["additionalProperties"]
    expanded: dict[str, Any] = {}
    for name, overrides in runs.items():
        for single, chosen in _expand_run(str(name), _parse_sections(overrides, schema), schema):
            if single in expanded:
                raise ConfigError(
                    f"runs has two runs named {single!r}, one of a sweep. Rename one."
                )
            expanded[single] = chosen
    return expanded


def _expand_run(name: str, overrides: Any, schema: Schema) -> Iterator[tuple[str, Any]]:
    """Yield (name, overrides) of every run that one entry stands for; most stand for themselves."""
    sweeps = list(_find_sweeps(overrides, schema, ()))
    for path, values in sweeps:
        _check_values(("runs", name, *path), values)
    labels = _name_keys([path for path, _ in sweeps])
    for chosen in itertools.product(*(values for _, values in sweeps)):
        single, words = overrides, [name]
        for (path, _), label, value in zip(sweeps, labels, chosen, strict=True):
            single = merge(single, _nest(path, value))
            words.append(f"{label}_{_word(value)}")
        yield "-".join(words), single


def _parse_sections(value: Any, schema: Schema) -> Any:
    """Return a section, and those in it, as mappings: Snakemake's --config hands them over as text."""
    value = parse_text(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value  # empty, or refused when it is read
    parsed = {}
    for key, item in value.items():
        sub = resolve(schema["properties"].get(str(key), {}))
        parsed[str(key)] = _parse_sections(item, sub) if is_section(sub) else item
    return parsed


def _find_sweeps(
    overrides: Any, schema: Schema, path: KeyPath
) -> Iterator[tuple[KeyPath, list[Any]]]:
    """Yield the path and the values of every key that carries a sweep, in the order of the config."""
    for key, value in overrides.items() if isinstance(overrides, Mapping) else ():
        sub = resolve(schema["properties"].get(key, {}))
        below = (*path, key)
        if is_section(sub):
            yield from _find_sweeps(value, sub, below)
        elif sub:
            value = parse_text(value) if _is_written_list(value) else value
            if isinstance(value, list) and _is_sweep(value, sub):
                yield (
                    below,
                    [read_leaf(item, sub, (*below, str(i))) for i, item in enumerate(value)],
                )


def _is_written_list(value: Any) -> bool:
    """Say whether a value is a list as Snakemake's --config hands it over: as text."""
    return isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")


def _is_sweep(values: list[Any], schema: Schema) -> bool:
    return "array" not in types_of(schema) or any(isinstance(item, list) for item in values)


def _check_values(path: KeyPath, values: list[Any]) -> None:
    if not values:
        raise ConfigError(
            f"{dotted(path)} is [], a sweep over no value at all. Give it values, or leave the key out."
        )
    words: dict[str, Any] = {}
    for value in values:
        if (word := _word(value)) in words:
            raise ConfigError(
                f"{dotted(path)} has {show(words[word])} and {show(value)}, which would give two runs one name "
                f"({word!r}). Drop one of them, or write them as two runs."
            )
        words[word] = value


def _name_keys(paths: list[KeyPath]) -> list[str]:
    """Return the last word of every key; the whole key where another one ends in that word, too."""
    ends = [path[-1] for path in paths]
    return [path[-1] if ends.count(path[-1]) == 1 else ".".join(path) for path in paths]


def _word(value: Any) -> str:
    """Return a value as a part of a run's name, which is a folder's."""
    if isinstance(value, list | tuple):
        return "_".join(map(_word, value))
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return _UNFIT.sub("_", text).strip("_")


def _nest(path: KeyPath, value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)
