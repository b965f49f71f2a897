"""A whole config as one checked record per run, and the keys that ids of artifacts are made of."""

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
    section_schema,
)
from retort.config.sections import Config, build_section, is_default, section_name
from retort.config.sweeps import expand_runs
from retort.config.values import read_config


def load_runs(raw: Mapping[str, Any]) -> dict[str, Config]:
    """Return one complete config per run, in order, with sweeps expanded; without `runs`, one named "student".

    `raw` is Snakemake's `config`. Raises ConfigError (a ValueError) for the first mistake, with the name of its run.
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
    """Return the keys of a section that change ids and differ from their default, as JSON values.

    Defaults are left out so that a key that is added later does not change old ids.
    """
    schema = section_schema(section_name(section))
    found: dict[str, Any] = {}
    for key, sub in schema["properties"].items():
        value = getattr(section, key)
        if is_section(sub):
            if below := identity(value):
                found[key] = below
        elif changes_id(sub, schema) and not is_default(value, sub):
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def changes_id(schema: Schema, section: Schema) -> bool:
    """Return whether another value of a key, given its schema and its section's, changes the ids of results."""
    return bool(schema.get("identity", True) and section.get("identity", True))


@cache
def _defaults() -> dict[str, Any]:
    return {".".join(path): schema["default"] for path, schema in leaves()}
