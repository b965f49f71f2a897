"""Text that stands for a value, read by the type of its key.

Snakemake passes nested `--config` values as text, and YAML reads `1e-4` as text: `'10'` is a number for a key that
takes one.
"""

import json
import re
import types
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

# No leading zero: 010 is eight in YAML 1.1, ten in YAML 1.2.
_INTEGER = re.compile(r"[-+]?(0|[1-9](_?\d)*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9](_?\d)*)(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
_NULLS = ("~", "null", "none")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Types:
    """The types that a key takes; `items` are those of the items, if it takes a list. A Literal is no type here."""

    kinds: frozenset[type]
    items: "Types | None" = None

    def __or__(self, other: "Types") -> "Types":
        return Types(self.kinds | other.kinds, self.items or other.items)


def types_of(annotation: Any) -> Types:
    """Return the types of a field's annotation."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return types_of(args[0])
    if origin in (Union, types.UnionType):
        found = Types(frozenset())
        for arg in args:
            found |= types_of(arg)
        return found
    if origin is tuple:
        return Types(frozenset({tuple}), types_of(args[0]))
    return Types(frozenset() if origin is Literal else frozenset({annotation}))


def read_value(value: Any, key: Types) -> Any:
    """Return a value in its key's type if it can be converted, without checking it; lists as tuples.

    Null, for a key that does not take it, is returned as None: it stands for the key's default.
    """
    kinds = key.kinds
    if isinstance(value, date):  # YAML reads 2026-05-31 as a date
        value = value.isoformat()
    if isinstance(value, str):
        value = _read_text(value, kinds)
    if isinstance(value, int) and not isinstance(value, bool) and int not in kinds:
        if float in kinds:
            return float(value)
        return str(value) if str in kinds and value >= 0 else value
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple) and key.items:
        return tuple(read_value(item, key.items) for item in value)
    return value


def _read_text(text: str, kinds: frozenset[type]) -> Any:
    """Return the value of a text for a key of these types, the text itself if it is none of them."""
    word = text.strip()
    is_null = word.lower() in _NULLS or (word == "" and types.NoneType in kinds)
    if is_null and (types.NoneType in kinds or str not in kinds):
        return None
    if bool in kinds and word.lower() in _BOOLEANS:
        return _BOOLEANS[word.lower()]
    if int in kinds and _INTEGER.fullmatch(word):
        with suppress(ValueError):  # more digits than Python reads
            return int(word)
    if kinds & {int, float} and _NUMBER.fullmatch(word):
        with suppress(ValueError):  # 1.__
            return float(word)
    if tuple in kinds and word.startswith("[") and word.endswith("]"):
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
