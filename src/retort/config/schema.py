"""The config's schema: its sections, keys, types and defaults, and how they are written in messages."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

SCHEMA_FILE = "config.schema.yaml"  # in the package

Schema = dict[str, Any]
KeyPath = tuple[str, ...]

# Prefixes of API keys, which must not be in a config, nor be shown.
KEY_PREFIXES = ("sk-", "hf_", "gsk_", "Bearer ")


class ConfigError(ValueError):
    """A mistake in the config. The message has the key, the value found, what was expected, and what to do."""


@cache
def load_schema() -> Schema:
    """Return the parsed schema, which is shared: do not change it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (files("retort.config") / SCHEMA_FILE).read_text(encoding="utf-8")
    schema: Schema = yaml.load(text, Loader=loader)
    return schema


def section_schema(section: str) -> Schema:
    """Return the schema of a section such as "training" or "teacher.generation"."""
    return schema_at(tuple(section.split(".")))


def is_section(schema: Schema) -> bool:
    """Return whether a schema describes a section, not one key."""
    return "properties" in schema


def fill_defaults(values: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """Return a section's values with defaults for missing keys, in the schema's order."""
    filled: dict[str, Any] = {}
    for name, sub in schema["properties"].items():
        if is_section(sub):
            filled[name] = fill_defaults(values.get(name, {}), sub)
        else:
            filled[name] = values[name] if name in values else sub["default"]
    return filled


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `overrides`: sections are merged, lists and other values replaced."""
    merged = dict(base)
    for name, value in overrides.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[name] = value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all keys in nested sections, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def leaves(schema: Schema | None = None, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Schema]]:
    """Yield the path and schema of every key but `runs`, in the schema's order."""
    for name, sub in (schema or load_schema())["properties"].items():
        if is_section(sub):
            yield from leaves(sub, (*path, name))
        elif name != "runs":
            yield (*path, name), sub


def schema_at(path: KeyPath) -> Schema:
    """Return the schema of a section, a key, or an item of a key's list."""
    schema = load_schema()
    for step in path:
        if is_section(schema):
            schema = schema["properties"][step]
        elif isinstance(schema.get("additionalProperties"), dict):
            schema = schema["additionalProperties"]
        elif "items" in schema:
            schema = schema["items"]
        schema = resolve(schema)
    return schema


def resolve(schema: Schema) -> Schema:
    """Return the schema that a `$ref` refers to, or the schema itself."""
    if "$ref" not in schema:
        return schema
    return schema_at((schema["$ref"].removeprefix("#/properties/"),))


def types_of(schema: Schema) -> set[str]:
    """Return the JSON types of a key."""
    types = schema["type"]
    return {types} if isinstance(types, str) else set(types)


def dotted(path: KeyPath) -> str:
    """Return a key's path as users write it: cache.temperatures[1]."""
    return "".join(
        f"[{p}]" if p.isdigit() and i > 1 else f".{p}" for i, p in enumerate(path)
    ).lstrip(".")


def show(value: Any) -> str:
    """Return a value as a config has it, at most 80 characters; API keys are not shown."""
    if isinstance(value, str) and value.startswith(KEY_PREFIXES):
        return "'***'"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def expected(schema: Schema) -> str:
    """Return a phrase for the values that a key takes."""
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return " or ".join(_expected_type(t, schema) for t in types)


def _expected_type(kind: str, schema: Schema) -> str:
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range(schema)
    if kind == "string":
        return str(schema.get("accepts", "text"))
    if kind == "array":
        items = schema["items"]
        plural = {"number": "numbers", "integer": "integers", "string": "texts"}[items["type"]]
        amount = " (at least one)" if "minItems" in schema else ""
        once = ", none twice" if schema.get("uniqueItems") else ""
        return f"a list of {plural}{_range(items)}{amount}{once}"
    return {"boolean": "true or false", "null": "null"}[kind]


def _range(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    parts = [f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema]
    return " " + " and ".join(parts) if parts else ""
