"""The config's schema, and reading values by it: names, types, ranges, defaults; no cross-checks.

Every mistake is one `ConfigError` that says which key, what was found, what was expected, what to
do. Values are read by the schema's type, because Snakemake hands nested `--config` values over
as text and YAML takes `1e-4` for text: `'10'` is a number where a number belongs.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml

SCHEMA_FILE = "config.schema.yaml"  # in the package

Schema = dict[str, Any]
KeyPath = tuple[str, ...]

_INTEGER = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# How API keys begin, which must not stand in a config, nor in what is said of it.
KEY_PREFIXES = ("sk-", "hf_", "gsk_", "Bearer ")
_NULLS = ("", "~", "null", "none")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# Names that users know from elsewhere, whichever section they stood in, and their place now.
_MOVED = {
    "bf16": ("training.mixed_precision_dtype",),
    "benchmark": ("evaluation.benchmarks",),
    "custom_shard": ("dataset.sharding",),
    "dataset_config": ("dataset.config_name",),
    "dataset_config_name": ("dataset.config_name",),
    "dataset_name": ("dataset.name",),
    "device": ("teacher.device", "training.device"),
    "devices": ("teacher.generation.gpus",),
    "epochs": ("training.num_epochs",),
    "fp16": ("training.mixed_precision_dtype",),
    "gpu_ids": ("teacher.generation.gpus",),
    "gpu_list": ("teacher.generation.gpus",),
    "gradient_checkpointing": ("training.use_gradient_checkpointing",),
    "loss_type": ("training.distillation_type",),
    "lr": ("training.learning_rate",),
    "max_seq_length": ("dataset.max_length",),
    "num_train_epochs": ("training.num_epochs",),
    "output_dir": ("output.results_dir",),
    "student_config": ("student.config",),
    "student_model": ("student.model_path",),
    "teacher_model": ("teacher.model_path",),
    "teacher_model_path": ("teacher.model_path",),
    "total_workers": ("teacher.generation.num_workers",),
    "train_data": ("dataset.data_files",),
    "train_file": ("dataset.data_files",),
    "distillation.type": ("training.distillation_type",),
    "teacher_logits.model": ("teacher.model_path",),
    "teacher_logits.output_dir": ("output.cache_dir",),
    "training.num_workers": ("training.dataloader_num_workers",),
}
# What a section given as one word was probably meant to set.
_SHORTHAND = {
    "dataset": "dataset.name",
    "student": "student.config",
    "teacher": "teacher.model_path",
}


class ConfigError(ValueError):
    """A mistake in the config: the key, the value found, what was expected, what to do."""


@cache
def load_schema() -> Schema:
    """Return the parsed schema; do not change it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (files("retort.config") / SCHEMA_FILE).read_text(encoding="utf-8")
    schema: Schema = yaml.load(text, Loader=loader)
    return schema


def section_schema(section: str) -> Schema:
    """Return the schema of a section such as "training" or "teacher.generation"."""
    return _schema_at(tuple(section.split(".")))


def is_section(schema: Schema) -> bool:
    """Say whether a schema describes a section of keys, not one key."""
    return "properties" in schema


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `raw` in their proper types, nothing filled in.

    Raises ConfigError for an unknown key, a wrong type or a value out of range.
    """
    values: dict[str, Any] = _read_section(raw, load_schema(), ())
    errors = jsonschema.Draft202012Validator(load_schema()).iter_errors(values)
    for error in sorted(errors, key=lambda e: [str(p) for p in e.absolute_path]):
        path = tuple(str(p) for p in error.absolute_path)
        raise _bad_value(path, error.instance, _schema_at(path))
    return values


def read_value(key: KeyPath, value: Any) -> Any:
    """Return one key's value in its proper type; raises ConfigError when it is not legal."""
    schema = _schema_at(key)
    value = read_leaf(value, schema, key)
    if not jsonschema.Draft202012Validator(schema).is_valid(value):
        raise _bad_value(key, value, schema)
    return value


def fill_defaults(values: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """Return a section's values with every missing key at its default, in the schema's order."""
    filled: dict[str, Any] = {}
    for name, sub in schema["properties"].items():
        if is_section(sub):
            filled[name] = fill_defaults(values.get(name, {}), sub)
        else:
            filled[name] = values[name] if name in values else sub["default"]
    return filled


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `overrides` laid over it: sections merged, lists and values replaced."""
    merged = dict(base)
    for name, value in overrides.items():
        below = merged.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[name] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested sections, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def leaves(schema: Schema | None = None, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Schema]]:
    """Yield every key with its schema, in the schema's order; `runs` is not one."""
    for name, sub in (schema or load_schema())["properties"].items():
        if is_section(sub):
            yield from leaves(sub, (*path, name))
        elif name != "runs":
            yield (*path, name), sub


def _schema_at(path: KeyPath) -> Schema:
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
    """Return what a schema refers to, itself where it refers to nothing."""
    if "$ref" not in schema:
        return schema
    return _schema_at((schema["$ref"].removeprefix("#/properties/"),))


def _read_section(value: Any, schema: Schema, path: KeyPath) -> dict[str, Any]:
    value = parse_text(value) if isinstance(value, str) else value
    if value is None or value == "":  # every key of the section is commented out
        return {}
    if not isinstance(value, Mapping):
        raise _no_section(path, value)
    if path == ("runs",):
        return {str(name): _read_run(str(name), item) for name, item in value.items()}
    read: dict[str, Any] = {}
    for key, item in value.items():
        name = str(key)
        if name not in schema["properties"]:
            raise _unknown_key((*path, name), item)
        sub = resolve(schema["properties"][name])
        below = _read_section if is_section(sub) or name == "runs" else read_leaf
        read[name] = below(item, sub, (*path, name))
    return read


def _read_run(name: str, overrides: Any) -> dict[str, Any]:
    schema = load_schema()["properties"]["runs"]
    if not re.fullmatch(schema["propertyNames"]["pattern"], name) or name != name.strip():
        raise ConfigError(
            f"runs.{name!r} is no name for a run: it becomes a folder's name, so letters, digits, "
            "'.', '_' and '-' are expected, the first a letter or a digit. Rename the run, for "
            f"instance to {re.sub('[^A-Za-z0-9._-]+', '_', name).strip('._-') or 'run1'!r}."
        )
    if isinstance(overrides, Mapping) and "output" in overrides:
        raise ConfigError(
            f"runs.{name}.output is set, but a run cannot have folders of its own: runs share "
            "whatever they have in common. Set output at the top of the config, for all runs."
        )
    return _read_section(overrides, schema["additionalProperties"], ("runs", name))


def read_leaf(value: Any, schema: Schema, path: KeyPath) -> Any:
    """Return a value in the type that its key takes, as far as it can be one; whether it is legal is not asked."""
    types = types_of(schema)
    if isinstance(value, date):  # YAML reads 2026-05-31 as a date
        value = value.isoformat()
    if isinstance(value, str):
        value = _read_text(value, types)
    if value == "--":  # argparse drops it, so scripts would not get it
        raise ConfigError(
            f"{dotted(path)} is '--', which no command line can hand on. Write another value, for a path './--'."
        )
    if isinstance(value, int) and not isinstance(value, bool) and "integer" not in types:
        if "number" in types:
            value = float(value)
        elif "string" in types and value >= 0:
            value = str(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _bad_value(path, value, schema)
        if "number" not in types and "integer" in types and value.is_integer():
            value = int(value)
    elif isinstance(value, list | tuple) and "items" in schema:
        value = [read_leaf(v, schema["items"], (*path, str(i))) for i, v in enumerate(value)]
    return value


def _read_text(text: str, types: set[str]) -> Any:
    """Return what a text means for a key of these types; the text itself where that is legal."""
    word = text.strip()
    if "null" in types and word.lower() in _NULLS:
        return None
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if "boolean" in types and "string" not in types and word.lower() in _BOOLEANS:
        return _BOOLEANS[word.lower()]
    if "integer" in types and _INTEGER.fullmatch(word):
        return int(word)
    if types & {"integer", "number"} and _NUMBER.fullmatch(word):
        return float(word)
    if "array" in types and word.startswith("[") and word.endswith("]"):
        parsed = parse_text(word)
        return parsed if isinstance(parsed, list) else text
    return text


def parse_text(text: str) -> Any:
    """Parse JSON, or YAML with every scalar as text; what is neither comes back as it is."""
    try:
        return json.loads(text)  # YAML would take JSON's escapes of rare characters apart
    except ValueError:
        pass
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text


def types_of(schema: Schema) -> set[str]:
    """Return the JSON types that a key takes."""
    types = schema["type"]
    return {types} if isinstance(types, str) else set(types)


def dotted(path: KeyPath) -> str:
    """Write a key's path the way people do: cache.temperatures[1]."""
    return "".join(
        f"[{p}]" if p.isdigit() and i > 1 else f".{p}" for i, p in enumerate(path)
    ).lstrip(".")


def show(value: Any) -> str:
    """Write a value the way the config does, shortened; what looks like an API key is not shown."""
    if isinstance(value, str) and value.startswith(KEY_PREFIXES):
        return "'***'"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def expected(schema: Schema) -> str:
    """Say in words what a key takes."""
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
        plural = {"number": "numbers", "integer": "whole numbers", "string": "texts"}[items["type"]]
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


def _bad_value(path: KeyPath, value: Any, schema: Schema) -> ConfigError:
    owner = _schema_at(path[:-1]) if path[-1].isdigit() and len(path) > 1 else schema
    owner = owner if "description" in owner else schema
    close = difflib.get_close_matches(str(value), schema.get("enum", []), n=1)
    fix = f"Did you mean {close[0]}?" if close else "Correct the value"
    default = f"leave the key out for its default ({show(owner['default'])})."
    return ConfigError(
        f"{dotted(path)} is {show(value)}, but {expected(schema)} is expected. "
        f"{owner['description']} " + (f"{fix} Or {default}" if close else f"{fix}, or {default}")
    )


def _no_section(path: KeyPath, value: Any) -> ConfigError:
    name = dotted(path) or "the config"
    prefix, inner = _split_run(path)
    meant = _SHORTHAND.get(".".join(inner))
    known = ", ".join(_schema_at(inner).get("properties", {})) if inner != ("runs",) else ""
    hint = (
        f"Did you mean {prefix}{meant}: {value}?"
        if meant
        else f"It has the keys {known}."
        if known
        else ""
    )
    if path == ("runs",):
        hint = "Write one entry per student, such as runs: {soft: {training: {alpha: 0.2}}}."
    return ConfigError(
        f"{name} is {show(value)}, but a section of 'key: value' lines is expected. {hint}"
    )


def _unknown_key(path: KeyPath, value: Any) -> ConfigError:
    prefix, inner = _split_run(path)
    sections = _schema_at(path[:2] if prefix else ())["properties"]
    close = difflib.get_close_matches(inner[0], sections, n=1, cutoff=0.75)
    value = parse_text(value) if isinstance(value, str) else value
    is_section = value is None or isinstance(value, Mapping)
    if inner[-1] == "api_key" or (isinstance(value, str) and value.startswith(KEY_PREFIXES)):
        hint = (
            "A key never stands in a config, which is recorded and shared. Put it into the environment: export "
            "OPENAI_API_KEY=..., or the variable that synthesis.api_key_variable names."
        )
    elif inner[-1] == "worker_id":
        hint = (
            "Workers number themselves; say how many there are with "
            "teacher.generation.num_workers, or leave that out too for one per GPU group."
        )
    elif len(inner) == 1 and close and (is_section or not _new_places(inner)):
        hint = f"Did you mean {prefix}{close[0]}?"
    elif len(inner) == 1 and isinstance(value, Mapping):
        found = {str(key): _places((*inner, str(key)), prefix, sections) for key in value}
        moves = [f"{key} -> {places}" for key, places in found.items() if places]
        hint = f"Its keys live elsewhere now: {'; '.join(moves)}." if moves else ""
    else:
        places = _places(inner, prefix, sections)
        is_plain = isinstance(value, str | int | float) and " or " not in places
        hint = f"Write it as {places}{f': {show(value)}' if is_plain else ''}." if places else ""
    return ConfigError(
        f"{dotted(path)} is no key of the config. {hint or 'config/README.md lists all keys.'}"
    )


def _places(inner: KeyPath, prefix: str, sections: Schema) -> str:
    """Return what to write instead of an unknown key: "a.b or c.d"; a run has not every section."""
    places = _new_places(inner)
    return " or ".join((prefix if p.split(".")[0] in sections else "") + p for p in places)


def _new_places(inner: KeyPath) -> list[str]:
    """Return the keys that an unknown one probably means, as dotted paths, best guess only."""
    name = inner[-1]
    if moved := _MOVED.get(".".join(inner)) or _MOVED.get(name):
        return list(moved)
    keys = [path for path, _ in leaves()]
    same = [path for path in keys if path[-1] == name]
    if near := [path for path in same if path[0] == inner[0]]:
        same = near
    if not same:
        siblings = {path[-1]: path for path in keys if path[:-1] == inner[:-1]}
        everywhere = {path[-1]: path for path in reversed(keys)}
        close = difflib.get_close_matches(name, siblings, n=1) or difflib.get_close_matches(
            name, everywhere, n=1, cutoff=0.75
        )
        same = [siblings.get(c) or everywhere[c] for c in close]
    return [".".join(path) for path in same]


def _split_run(path: KeyPath) -> tuple[str, KeyPath]:
    """Return ("runs.<name>.", the rest) for a key inside a run, ("", path) for one outside."""
    if path[:1] == ("runs",) and len(path) > 2:
        return f"runs.{path[1]}.", path[2:]
    return "", path
