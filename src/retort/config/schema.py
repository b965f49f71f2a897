"""Mistakes in a config, and how keys and values are written in messages."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Schema = Mapping[str, Any]  # the JSON schema of one key
KeyPath = tuple[str, ...]
Found = Iterator[str]  # messages of a check across keys; each begins with the key that it is about

# Prefixes of API keys, which must not be in a config, nor be shown.
KEY_PREFIXES = ("sk-", "hf_", "gsk_", "Bearer ")


class Problem(NamedTuple):
    """One mistake: where it is, and a message with the key, the value, what was expected, and what to do.

    `path` is that in the config as written: ("training", "alpha") or ("runs", "soft", "training", "alpha").
    """

    path: KeyPath
    message: str


def find_key(message: str) -> KeyPath:
    """Return the key that a message of a check across keys begins with."""
    key = re.match(r"[a-z_]+(\.[a-z_]+|\[\d+\])*\b", message)
    assert key is not None, message
    return tuple(re.findall(r"[a-z_]+|\d+", key[0]))


class ConfigError(ValueError):
    """Mistakes in the config: the message lists them all, `problems` has them with their keys."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        messages = [problem.message for problem in problems]
        several = "\n".join([f"The config has {len(messages)} mistakes:", *messages])
        super().__init__(messages[0] if len(messages) == 1 else several)


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `overrides`: sections are merged, lists and other values replaced.

    An empty section, whose keys are all commented out, changes nothing.
    """
    merged = dict(base)
    for name, value in overrides.items():
        below = merged.get(name)
        if isinstance(below, Mapping) and is_empty(value):
            continue
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[name] = value
    return merged


def is_empty(value: Any) -> bool:
    """Return whether a value is null, as YAML or a text says it."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "~", "null"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all keys in nested sections, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def dotted(path: Sequence[str | int]) -> str:
    """Return a key's path as users write it: cache.temperatures[1]."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def show(value: Any) -> str:
    """Return a value as a config has it, at most 80 characters; API keys are not shown."""
    if isinstance(value, str) and value.startswith(KEY_PREFIXES):
        return "'***'"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def expected(schema: Schema) -> str:
    """Return a phrase for the values that a key takes, given its JSON schema."""
    options = schema.get("anyOf", [schema])
    return " or ".join(_expected(option, schema.get("accepts")) for option in options)


def _expected(option: Schema, accepts: str | None = None) -> str:
    kind = option["type"]
    if kind == "string":
        choices = "one of " + ", ".join(option["enum"]) if "enum" in option else "text"
        return str(accepts or option.get("const", choices))
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range(option)
    if kind == "array":
        items = option["items"]
        known = {"number": "numbers", "integer": "integers", "string": "texts"}
        plural = known.get(items.get("type"), "sections")
        amount = " (at least one)" if "minItems" in option else ""
        once = ", none twice" if option.get("uniqueItems") else ""
        return f"a list of {plural}{_range(items)}{amount}{once}"
    return {"boolean": "true or false", "null": "null"}[kind]


def _range(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    parts = [f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema]
    return " " + " and ".join(parts) if parts else ""
