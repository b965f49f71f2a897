"""Config sections to command-line flags, and back."""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from retort.config.schema import (
    ConfigError,
    Schema,
    expected,
    fill_defaults,
    is_section,
    section_schema,
    show,
)
from retort.config.sections import (
    Teacher,
    build_section,
    freeze,
    is_default,
    section_name,
)
from retort.config.values import read_value

# Sections whose flags have the section's name as prefix, so that one script can take several sections.
_PREFIXED = ("dataset", "teacher", "cache", "student", "evaluation", "synthesis")
# A setting of the workflow, not of one job.
_NO_FLAG = ("teacher.generation.num_workers",)
# Other names of flags that users know.
_ALIAS = {"training.dataloader_num_workers": "--num-workers"}


def add_section_flags(parser: argparse.ArgumentParser, section: str) -> None:
    """Add one flag per key of a section, with the schema's type, default and description.

    "teacher" and "teacher.generation" are separate sections here.
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
    """Return a section's record from parsed flags; keys without a flag have their default."""
    values = fill_defaults({}, section_schema(section))
    given = vars(args)
    values |= {key: given[f"{section}.{key}"] for key, _ in _flag_keys(section)}
    record = build_section(section, values)
    if section == "teacher" and any(dest.startswith("teacher.generation.") for dest in given):
        generation = section_from_args(args, "teacher.generation")
        return Teacher(**{**vars(record), "generation": generation})
    return record


def section_flags(section: Any) -> list[str]:
    """Return the flags from which `section_from_args` makes this record; keys at their default are left out.

    The flags of a Teacher do not include its `generation`, which is a separate section.
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
