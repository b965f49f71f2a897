"""Config sections to command-line flags, and back."""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from retort.config.load import is_default, read_key
from retort.config.schema import ConfigError, Schema, expected, show
from retort.config.section import Section, key_schemas, key_types
from retort.config.sections import section_at, section_paths

# Sections whose flags have the section's name as prefix, so that one script can take several sections.
_PREFIXED = ("dataset", "teacher", "cache", "student", "evaluation", "synthesis")
_IN_EVALUATION = ("evaluation.samples", "evaluation.benchmarks", "evaluation.humaneval")
# A setting of the workflow, not of one job.
_NO_FLAG = ("teacher.generation.num_workers",)
# Other names of flags that users know.
_ALIAS = {"training.dataloader_num_workers": "--num-workers"}


def add_section_flags(parser: argparse.ArgumentParser, section: str) -> None:
    """Add one flag per key of a section, with the schema's type, default and description.

    "teacher" and "teacher.generation" are separate sections here; "evaluation" includes its sections.
    """
    if section == "evaluation":
        for below in _IN_EVALUATION:
            add_section_flags(parser, below)
    group = parser.add_argument_group(section, _class_of(section).__doc__)
    for key, sub in _flag_keys(section):
        dest = f"{section}.{key}"
        names = [_flag(section, key), *([_ALIAS[dest]] if dest in _ALIAS else [])]
        text = f"{sub['description']} Default: {show(sub['default'])}."
        default = _class_of(section).model_fields[key].default
        if sub.get("type") == "boolean":
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
    kind = _class_of(section)
    given = vars(args)
    record = kind().model_copy(
        update={key: given[f"{section}.{key}"] for key, _ in _flag_keys(section)}
    )
    if section == "evaluation":
        below = {name.split(".")[1]: section_from_args(args, name) for name in _IN_EVALUATION}
        return record.model_copy(update=below)
    if section == "teacher" and any(dest.startswith("teacher.generation.") for dest in given):
        generation = section_from_args(args, "teacher.generation")
        return record.model_copy(update={"generation": generation})
    return record


def section_flags(section: Any) -> list[str]:
    """Return the flags from which `section_from_args` makes this record; keys at their default are left out.

    The flags of a Teacher do not include its `generation`, which is a separate section.
    """
    name = next(".".join(p) for p in section_paths() if section_at(p) is type(section))
    argv: list[str] = []
    if name == "evaluation":
        argv = [
            word
            for n in _IN_EVALUATION
            for word in section_flags(getattr(section, n.split(".")[1]))
        ]
    for key, sub in _flag_keys(name):
        value, flag = getattr(section, key), _flag(name, key)
        if is_default(section, key):
            continue
        if sub.get("type") == "boolean":
            argv.append(flag if value else "--no-" + flag.removeprefix("--"))
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        argv += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return argv


def _class_of(section: str) -> type[Section]:
    kind = section_at(tuple(section.split(".")))
    assert kind is not None, section
    return kind


def _flag_keys(section: str) -> Iterator[tuple[str, Schema]]:
    kind = _class_of(section)
    for key in key_types(kind):
        if f"{section}.{key}" not in _NO_FLAG:
            yield key, key_schemas(kind)[key]


def _flag(section: str, key: str) -> str:
    prefix = f"{section}-" if section in (*_PREFIXED, *_IN_EVALUATION) else ""
    return f"--{prefix}{key}".replace("_", "-").replace(".", "-")


def _read_flag(section: str, key: str, text: str) -> Any:
    try:
        return read_key((*section.split("."), key), text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _escape(text: str) -> str:
    return text.replace("%", "%%")
