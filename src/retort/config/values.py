"""Reading values by the schema: types and ranges; checks across keys are in `checks`.

Every mistake is one `ConfigError`: the key, the value found, what was expected, what to do. A key's type decides how
text is read, because Snakemake passes nested `--config` values as text, and YAML reads `1e-4` as text: `'10'` is a
number for a key that takes one.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

import jsonschema
import yaml

from retort.config.schema import (
    ConfigError,
    KeyPath,
    Schema,
    dotted,
    expected,
    is_section,
    load_schema,
    resolve,
    schema_at,
    show,
    types_of,
)
from retort.config.suggestions import not_a_section, unknown_key

_INTEGER = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_NULLS = ("", "~", "null", "none")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `raw` in the types of their keys, without defaults.

    Raises ConfigError for an unknown key, a wrong type or a value out of range.
    """
    values: dict[str, Any] = _read_section(raw, load_schema(), ())
    errors = jsonschema.Draft202012Validator(load_schema()).iter_errors(values)
    for error in sorted(errors, key=lambda e: [str(p) for p in e.absolute_path]):
        path = tuple(str(p) for p in error.absolute_path)
        raise _bad_value(path, error.instance, schema_at(path))
    return values


def read_value(key: KeyPath, value: Any) -> Any:
    """Return one key's value in the key's type. Raises ConfigError when it is not valid."""
    schema = schema_at(key)
    value = read_leaf(value, schema, key)
    if not jsonschema.Draft202012Validator(schema).is_valid(value):
        raise _bad_value(key, value, schema)
    return value


def _read_section(value: Any, schema: Schema, path: KeyPath) -> dict[str, Any]:
    value = parse_text(value) if isinstance(value, str) else value
    if value is None or value == "":  # all keys of the section are commented out
        return {}
    if not isinstance(value, Mapping):
        raise not_a_section(path, value)
    if path == ("runs",):
        return {str(name): _read_run(str(name), item) for name, item in value.items()}
    read: dict[str, Any] = {}
    for key, item in value.items():
        name = str(key)
        if name not in schema["properties"]:
            raise unknown_key((*path, name), parse_text(item) if isinstance(item, str) else item)
        sub = resolve(schema["properties"][name])
        below = _read_section if is_section(sub) or name == "runs" else read_leaf
        read[name] = below(item, sub, (*path, name))
    return read


def _read_run(name: str, overrides: Any) -> dict[str, Any]:
    schema = load_schema()["properties"]["runs"]
    if not re.fullmatch(schema["propertyNames"]["pattern"], name) or name != name.strip():
        raise ConfigError(
            f"runs.{name!r} is not a valid name: it becomes a folder's name, so it takes letters, digits, "
            "'.', '_' and '-', and begins with a letter or a digit. Rename the run, for "
            f"instance to {re.sub('[^A-Za-z0-9._-]+', '_', name).strip('._-') or 'run1'!r}."
        )
    if isinstance(overrides, Mapping) and "output" in overrides:
        raise ConfigError(
            f"runs.{name}.output is set, but runs share folders, because they share results. Set output "
            "at the top of the config, for all runs."
        )
    return _read_section(overrides, schema["additionalProperties"], ("runs", name))


def read_leaf(value: Any, schema: Schema, path: KeyPath) -> Any:
    """Return a value in its key's type if it can be converted, without checking it.

    Raises ConfigError for values that no key takes: NaN, infinity and '--'.
    """
    types = types_of(schema)
    if isinstance(value, date):  # YAML reads 2026-05-31 as a date
        value = value.isoformat()
    if isinstance(value, str):
        value = _read_text(value, types)
    if value == "--":  # argparse drops it
        raise ConfigError(
            f"{dotted(path)} is '--', which command lines cannot pass on. Write another value, for a path './--'."
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
    """Return the value of a text for a key of these types, the text itself if it is none of them."""
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
    """Return the value of JSON, or of YAML with every scalar as text; the text itself if it is neither."""
    try:
        return json.loads(text)  # YAML would split surrogate pairs of JSON's escapes
    except ValueError:
        pass
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text


def _bad_value(path: KeyPath, value: Any, schema: Schema) -> ConfigError:
    owner = schema_at(path[:-1]) if path[-1].isdigit() and len(path) > 1 else schema
    owner = owner if "description" in owner else schema
    close = difflib.get_close_matches(str(value), schema.get("enum", []), n=1)
    fix = f"Did you mean {close[0]}?" if close else "Correct the value"
    default = f"leave the key out for its default ({show(owner['default'])})."
    return ConfigError(
        f"{dotted(path)} is {show(value)}, but {expected(schema)} is expected. "
        f"{owner['description']} " + (f"{fix} Or {default}" if close else f"{fix}, or {default}")
    )
