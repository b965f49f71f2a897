"""A whole config: one checked record for each run, and which of its keys name results."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from retort.config.checks import DEFAULT_ALPHA, check_config
from retort.config.schema import (
    ConfigError,
    Schema,
    fill_defaults,
    flatten,
    is_section,
    leaves,
    load_schema,
    merge,
    read_config,
    section_schema,
)
from retort.config.sections import (
    Config,
    build_section,
    is_default,
    section_name,
)
from retort.config.sweeps import expand_runs


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


def names_artefacts(schema: Schema, section: Schema) -> bool:
    """Say whether a key, by its schema and its section's, is part of the names of what is made from it."""
    return bool(schema.get("identity", True) and section.get("identity", True))


@cache
def _defaults() -> dict[str, Any]:
    return {".".join(path): schema["default"] for path, schema in leaves()}
