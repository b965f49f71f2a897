"""Sections of the config for tests: at their defaults, and changed."""

import dataclasses
from typing import Any, TypeVar

from retort.config.section import Section
from retort.config.sections import section_at

_T = TypeVar("_T")


def section(name: str, /, **values: Any) -> Any:
    """Return a section such as "training": the defaults but for `values`."""
    kind = section_at(tuple(name.split(".")))
    assert kind is not None, name
    return kind(**values)


def replace(record: _T, **values: Any) -> _T:
    """Return a copy of a section, or of a dataclass, with other values, which are not checked."""
    if isinstance(record, Section):
        return record.model_copy(update=values)
    changed: _T = dataclasses.replace(record, **values)  # type: ignore[type-var]
    return changed
