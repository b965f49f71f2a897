"""Every dial of Retort as a frozen record: read from the config, checked, made into flags and back.

`config.schema.yaml`, beside this module, is the only place of types, ranges, defaults and descriptions.
`python -m retort.config.load` prints config/README.md from it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

from retort.config.checks import DEFAULT_ALPHA, check_config
from retort.config.schema import (
    ConfigError,
    Schema,
    expected,
    fill_defaults,
    flatten,
    is_section,
    leaves,
    load_schema,
    merge,
    read_config,
    read_value,
    section_schema,
    show,
)
from retort.config.sections import (
    SECTIONS,
    Cache,
    Config,
    Dataset,
    Evaluation,
    Generation,
    Merge,
    Output,
    Student,
    Synthesis,
    Teacher,
    Tracking,
    Training,
    build_section,
    freeze,
    is_default,
    section_name,
)
from retort.config.sweeps import expand_runs

__all__ = [
    "SECTIONS",
    "Cache",
    "Config",
    "ConfigError",
    "Dataset",
    "Evaluation",
    "Generation",
    "Merge",
    "Output",
    "Student",
    "Synthesis",
    "Teacher",
    "Tracking",
    "Training",
    "add_section_flags",
    "identity",
    "load_runs",
    "readme",
    "section_flags",
    "section_from_args",
]

# Sections whose flags carry the section's name, so that one script can take several sections.
_PREFIXED = ("dataset", "teacher", "cache", "student", "evaluation", "synthesis")
# What a single job cannot be told: how many jobs there are.
_NO_FLAG = ("teacher.generation.num_workers",)
# Flags that users know by another name than the key's.
_ALIAS = {"training.dataloader_num_workers": "--num-workers"}


def load_runs(raw: Mapping[str, Any]) -> dict[str, Config]:
    """Return one complete config per run, in order, sweeps written out; without `runs`, one named "student".

    `raw` is what Snakemake calls config. Raises ConfigError (a ValueError) for the first mistake,
    with the run's name when it is in a run.
    """
    if "runs" in raw:
        raw = {**raw, "runs": expand_runs(raw["runs"])}
    values = read_config(raw)
    runs = values.pop("runs", {})
    schema = {"properties": {k: v for k, v in load_schema()["properties"].items() if k != "runs"}}
    configs: dict[str, Config] = {}
    for name, overrides in (runs or {"student": {}}).items():
        complete = fill_defaults(merge(values, overrides), schema)
        try:
            check_config(dict(flatten(complete)), _defaults())
        except ConfigError as error:
            raise ConfigError(f"In run '{name}': {error}" if runs else str(error)) from None
        training = complete["training"]
        if training["alpha"] is None:
            training["alpha"] = DEFAULT_ALPHA[training["distillation_type"]]
        configs[name] = Config(
            **{section: build_section(section, complete[section]) for section in complete}
        )
    return configs


def identity(section: Any) -> dict[str, Any]:
    """Return a section's keys that name artefacts and differ from their default, ready for JSON.

    A key added later with a default is not in it, so it leaves old names alone.
    """
    schema = section_schema(section_name(section))
    named: dict[str, Any] = {}
    for key, sub in schema["properties"].items():
        value = getattr(section, key)
        if is_section(sub):
            if below := identity(value):
                named[key] = below
        elif names_artefacts(sub, schema) and not is_default(value, sub):
            named[key] = list(value) if isinstance(value, tuple) else value
    return named


def add_section_flags(parser: argparse.ArgumentParser, section: str) -> None:
    """Add one flag per key of a section, with the schema's type, default and description.

    "teacher" and "teacher.generation" are two sections here: a script that takes both adds both.
    """
    group = parser.add_argument_group(section, section_schema(section)["description"])
    for key, sub in _flag_keys(section):
        dest = f"{section}.{key}"
        names = [_flag(section, key), *([_ALIAS[dest]] if dest in _ALIAS else [])]
        text = f"{sub['description']} Default: {show(sub['default'])}."
        default = freeze(sub["default"])
        if sub["type"] == "boolean":
            action = argparse.BooleanOptionalAction
            group.add_argument(
                *names, dest=dest, action=action, default=default, help=_escape(text)
            )
        else:
            reader = partial(_read_flag, section, key)
            takes = _escape(f"{text} Takes {expected(sub)}.")
            group.add_argument(
                *names, dest=dest, type=reader, default=default, metavar=key.upper(), help=takes
            )


def section_from_args(args: argparse.Namespace, section: str) -> Any:
    """Return a section's record from parsed flags; what has no flag there is at its default."""
    values = fill_defaults({}, section_schema(section))
    given = vars(args)
    values |= {key: given[f"{section}.{key}"] for key, _ in _flag_keys(section)}
    record = build_section(section, values)
    if section == "teacher" and any(dest.startswith("teacher.generation.") for dest in given):
        generation = section_from_args(args, "teacher.generation")
        return Teacher(**{**vars(record), "generation": generation})
    return record


def section_flags(section: Any) -> list[str]:
    """Return the flags that section_from_args reads back; keys at their default are left out.

    A Teacher's flags are without those of its generation, which is a section of its own.
    """
    name = section_name(section)
    argv: list[str] = []
    for key, sub in _flag_keys(name):
        value, flag = getattr(section, key), _flag(name, key)
        if is_default(value, sub):
            continue
        if sub["type"] == "boolean":
            argv.append(flag if value else "--no-" + flag.removeprefix("--"))
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        argv += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return argv


def readme() -> str:
    """Return config/README.md: how a config is given, and a table of the keys of every section."""
    tables = [_readme_table(section) for section in SECTIONS]
    return "\n".join([_README_HEAD, *tables, _README_RUNS])


def _readme_table(section: str) -> str:
    schema = section_schema(section)
    rows = [
        f"## {section}",
        "",
        schema["description"],
        "",
        "| key | takes | default | meaning | names results |",
    ]
    rows.append("|---|---|---|---|---|")
    for key, sub in schema["properties"].items():
        if not is_section(sub):
            names = "yes" if names_artefacts(sub, schema) else "no"
            cells = [
                f"`{key}`",
                expected(sub),
                f"`{show(sub['default'])}`",
                sub["description"],
                names,
            ]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*rows, ""])


def names_artefacts(schema: Schema, section: Schema) -> bool:
    """Say whether a key, by its schema and its section's, is part of the names of what is made from it."""
    return bool(schema.get("identity", True) and section.get("identity", True))


@cache
def _defaults() -> dict[str, Any]:
    return {".".join(path): schema["default"] for path, schema in leaves()}


def _flag_keys(section: str) -> Iterator[tuple[str, Schema]]:
    for key, schema in section_schema(section)["properties"].items():
        if not is_section(schema) and f"{section}.{key}" not in _NO_FLAG:
            yield key, schema


def _flag(section: str, key: str) -> str:
    prefix = f"{section}-" if section in _PREFIXED else ""
    return f"--{prefix}{key}".replace("_", "-")


def _read_flag(section: str, key: str, text: str) -> Any:
    try:
        return freeze(read_value((*section.split("."), key), text))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _escape(text: str) -> str:
    return text.replace("%", "%%")


_README_HEAD = """# The config

<!-- Generated by `python -m retort.config.load > config/README.md`; edit the schema instead. -->

`config/config.yaml` is the demo. Bring your own with `snakemake --configfile mine.yaml`, which
replaces it (of several files, later ones win key by key), or change single keys with
`--config dataset="{max_samples: 10}" training="{max_steps: 50}"`. Only keys that differ from their
default need to be written. An unknown key, a wrong type or a value out of range is refused before
anything runs.

`config/examples/` has a file for each common case, `config/students/` student models to start from.

A key that *names results* is part of the name of what is made from it: another value makes another
folder beside the old one, and going back costs nothing. The other keys say how or where work is
done, and re-run nothing.
"""

_README_RUNS = """## runs

One student per entry: a name, and what this run sets otherwise, in any section but `output`.
Whatever runs have in common (tokens, cache, the teacher's scores) is computed once. Lists and
values are replaced, sections are merged, and `null` sets a key back to nothing. Without `runs`
there is one run, named `student`.

```yaml
runs:
  hard: {training: {distillation_type: output}}
  soft: {training: {distillation_type: logit}}
  both: {training: {distillation_type: hybrid, alpha: 0.3}}
```

A run is a *sweep* where a key carries a list of values: it becomes one run for each of them, and for
every combination of several. (Where a key takes a list, as `cache.temperatures` does, a list of
lists sweeps.) The runs are named by their values, so one that is added trains its own run only.
This makes `soft-temperature_1-seed_0`, `soft-temperature_1-seed_1`, and so on:

```yaml
runs:
  soft: {training: {distillation_type: logit, temperature: [1.0, 2.0], seed: [0, 1, 2]}}
```
"""

if __name__ == "__main__":
    print(readme(), end="")
