"""A whole config as one checked record per run, and the keys that ids of artifacts are made of."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from retort.config.paths import UNSET_VARIABLE, explain_unset
from retort.config.schema import (
    ConfigError,
    KeyPath,
    Problem,
    dotted,
    expected,
    find_key,
    merge,
    show,
)
from retort.config.section import (
    Section,
    changes_id,
    is_default,
    key_schemas,
)
from retort.config.sections import CHECKS, Config, section_at
from retort.config.suggestions import (
    closest,
    not_a_section,
    suggest_value,
    unknown_key,
)
from retort.config.sweeps import Run, expand_runs, parse_sections
from retort.config.training import DEFAULT_ALPHA
from retort.config.values import parse_text

_Path = tuple[str | int, ...]  # of a key, or of an item of its list


def load_runs(raw: Mapping[str, Any]) -> dict[str, Config]:
    """Return one complete config per run, in order, with sweeps expanded; without `runs`, one named "student".

    `raw` is Snakemake's `config`. Raises ConfigError (a ValueError) that lists all mistakes.
    """
    configs, problems = find_problems(raw)
    if problems:
        raise ConfigError(*problems)
    return configs


def find_problems(raw: Mapping[str, Any]) -> tuple[dict[str, Config], list[Problem]]:
    """Return the config of each run, and all mistakes: in single keys, and across those that could be read.

    Where there are mistakes, the configs may lack keys.
    """
    base = {str(name): parse_sections(value, str(name)) for name, value in raw.items()}
    runs, problems = expand_runs(base.pop("runs", None))
    if not runs and not problems:
        runs = [Run("student", "", {})]
    everywhere = Run("", "", {})
    problems += [_describe(everywhere, *wrong) for wrong in _read(base)[1]]
    configs: dict[str, Config] = {}
    across: dict[Problem, list[str]] = {}  # problems across keys, with the names of their runs
    for run in runs:
        configs[run.name], wrong_keys = _read_run(merge(base, run.overrides))
        for problem in (_describe(run, *wrong) for wrong in wrong_keys):
            if problem not in problems:
                problems.append(problem)
        for message in _check(configs[run.name], is_partial=bool(wrong_keys)):
            place = run.place(find_key(message))
            across.setdefault(Problem(place, message), []).append(run.name if run.entry else "")
    for problem, names in across.items():
        problems.append(problem._replace(message=_name_runs(names) + problem.message))
    if problems:
        return configs, problems
    ordered = {
        name: c.model_copy(update={"teacher": c.teacher.order_mix()}) for name, c in configs.items()
    }
    return {name: _with_alpha(c) for name, c in ordered.items()}, problems


def _read_run(values: dict[str, Any]) -> tuple[Config, list[tuple[_Path, str, Any]]]:
    """Return what `_read` does; an item of teacher.mix has the section's other keys where it leaves them out."""
    config, wrong = _read(values)
    if wrong or not config.teacher.mix:
        return config, wrong
    shared = {key: value for key, value in values["teacher"].items() if key != "mix"}
    written = values["teacher"]["mix"]
    items = parse_text(written) if isinstance(written, str) else written
    mix = [merge(shared, parse_text(item) if isinstance(item, str) else item) for item in items]
    return _read(merge(values, {"teacher": {"mix": mix}}))


def _read(values: Mapping[str, Any]) -> tuple[Config, list[tuple[_Path, str, Any]]]:
    """Return the config without the keys that cannot be read, and (path, pydantic's type of error, value) of these."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    wrong: dict[_Path, tuple[_Path, str, Any]] = {}
    for found in errors:  # several for one key, if it takes several types
        path = _key_of(found["loc"])
        key = path[:-1] if isinstance(path[-1], int) else path
        if key not in wrong or key != path:
            wrong[key] = (path, found["type"], found["input"])
    unread = {_readable_around(key) for key in wrong}
    config = Config.model_validate(_without(values, unread))
    for key in unread:
        if any(key[:length] in unread for length in range(1, len(key))):
            continue
        owner: Any = config
        for step in key[:-1]:
            owner = owner[step] if isinstance(step, int) else getattr(owner, step)
        vars(owner).pop(key[-1], None)  # a check that asks for it ends with AttributeError
    return config, list(wrong.values())


def _key_of(location: _Path) -> _Path:
    """Return the path of a key, or of an item of its list, without pydantic's names of types."""
    path: _Path = ()
    for step in location:
        if section_at(path):
            path = (*path, step)
        elif isinstance(step, int):
            path = (*path, step)
            if not section_at(path):
                return path
    return path


def _readable_around(key: _Path) -> _Path:
    """Return the key to leave out: a list with an item that is wrong as a whole, or the key itself."""
    return key[:-1] if isinstance(key[-1], int) else key


def _without(values: Any, keys: Collection[_Path], path: _Path = ()) -> Any:
    if isinstance(values, str) and any(key[: len(path)] == path != key for key in keys):
        values = parse_text(values)  # a list that the command line gave
    if isinstance(values, list | tuple):
        return [_without(value, keys, (*path, number)) for number, value in enumerate(values)]
    if not isinstance(values, Mapping):
        return values
    kept = {name: value for name, value in values.items() if (*path, name) not in keys}
    return {name: _without(value, keys, (*path, name)) for name, value in kept.items()}


def _check(config: Config, *, is_partial: bool) -> Iterator[str]:
    for check in CHECKS:
        if not is_partial:
            yield from check(config)
            continue
        with suppress(AttributeError):  # it needs a key that could not be read
            yield from check(config)


def _describe(run: Run, path: _Path, kind: str, value: Any) -> Problem:
    """Return the problem of one key."""
    key = path[:-1] if isinstance(path[-1], int) else path
    names = tuple(map(str, key))
    written = run.place(names)
    shown = ("runs", run.name, *path) if written != names else path
    if kind == UNSET_VARIABLE:
        message = f"{dotted(shown)} is {show(value)}, but {explain_unset(value)}"
    elif kind == "extra_forbidden":
        message = unknown_key(shown, value)
    elif section_at(path):
        message = not_a_section(shown, value)
    else:
        message = _describe_value(shown, path, value)
    return Problem(written, message)


def _describe_value(shown: _Path, path: _Path, value: Any) -> str:
    key = path[:-1] if isinstance(path[-1], int) else path
    owner = section_at(key[:-1])
    assert owner is not None, path
    schema = key_schemas(owner)[str(key[-1])]
    takes = schema
    if key != path:
        takes = next(o["items"] for o in schema.get("anyOf", [schema]) if "items" in o)
    choices = [c for o in takes.get("anyOf", [takes]) for c in o.get("enum", [])]
    if close := closest(str(value), choices):
        hint = f"Did you mean {close}? Or"
    elif meant := suggest_value(value, expected(takes)):
        hint = f"{meant}, or"
    else:  # the first sentence of the description says what the key is
        hint = f"{schema['description'].split('. ')[0].rstrip('.')}. Correct the value, or"
    return (
        f"{dotted(shown)} is {show(value)}, but {expected(takes)} is expected. {hint} leave the key out for its "
        f"default ({show(schema['default'])})."
    )


def _name_runs(names: list[str]) -> str:
    """Return "In run 'a': " for a problem of these runs, "" for one of a config without runs."""
    if names == [""]:
        return ""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"In run {shown}: " if len(names) == 1 else f"In runs {shown}{more}: "


def _with_alpha(config: Config) -> Config:
    if config.training.alpha is not None:
        return config
    alpha = DEFAULT_ALPHA[config.training.distillation_type]
    training = config.training.model_copy(update={"alpha": alpha})
    return config.model_copy(update={"training": training})


def read_key(path: KeyPath, value: Any) -> Any:
    """Return one key's value in the key's type. Raises ConfigError when it is not valid."""
    section = section_at(path[:-1])
    assert section is not None, path
    values: Any = {path[-1]: value}
    for name in reversed(path[:-1]):
        values = {name: values}
    config, wrong = _read(values)
    if wrong:
        raise ConfigError(_describe(Run("", "", {}), *wrong[0]))
    owner: Any = config
    for name in path:
        owner = getattr(owner, name)
    return owner


def complete(values: Mapping[str, Any]) -> Config:
    """Return the config of some sections' values, the rest at its defaults; without the checks across keys.

    Raises ConfigError that lists all mistakes in single keys.
    """
    config, wrong = _read(values)
    if wrong:
        raise ConfigError(*(_describe(Run("", "", {}), *found) for found in wrong))
    return _with_alpha(config)


def identity(section: Section) -> dict[str, Any]:
    """Return the keys of a section that change ids and differ from their default, as JSON values.

    Defaults are left out so that a key that is added later does not change old ids.
    """
    return differences(section, ids_only=True)


def differences(section: Section, *, ids_only: bool = False) -> dict[str, Any]:
    """Return the keys of a section that differ from their default, as JSON values; of these, those that change ids."""
    kind = type(section)
    found: dict[str, Any] = {}
    for key in kind.model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            if below := differences(value, ids_only=ids_only):
                found[key] = below
        elif not is_default(section, key) and not (ids_only and not changes_id(kind, key)):
            found[key] = _to_list(value, ids_only) if isinstance(value, tuple) else value
    return found


def _to_list(values: tuple[Any, ...], ids_only: bool) -> list[Any]:
    return [differences(v, ids_only=ids_only) if isinstance(v, Section) else v for v in values]
