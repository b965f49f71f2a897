"""Properties of flags."""

import argparse
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.config.flags import add_section_flags, section_flags, section_from_args
from retort.config.load import read_key
from retort.config.schema import ConfigError, Schema
from retort.config.section import key_schemas, key_types
from retort.config.sections import section_at, section_paths

SECTIONS = [".".join(path) for path in section_paths()]


def values_of(schema: Schema) -> st.SearchStrategy[Any]:
    """Return a strategy for values as a user writes them, most of them valid."""
    if "anyOf" in schema:
        return st.one_of([values_of(option) for option in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if "pattern" in schema:
        return st.sampled_from(["interleaved", "contiguous", "my.module:assign", "A_KEY"])
    texts = st.text(min_size=1, max_size=9) | st.sampled_from(["-x", "--flag", "a b", "%s", "[a]"])
    drawn = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum", 0), schema.get("maximum", 2**40)),
        "number": st.floats(0, 1e6, allow_subnormal=False),
        "string": texts,
        "array": st.deferred(lambda: st.lists(values_of(schema["items"]), max_size=3)),
    }
    return drawn[schema["type"]]


@st.composite
def records(draw: st.DrawFn, section: str) -> Any:
    """Draw a section's record: some keys at their default, others at any valid value."""
    path = tuple(section.split("."))
    kind = section_at(path)
    assert kind is not None
    values = {}
    for key in key_types(kind):
        if draw(st.booleans()) and key != "num_workers":
            try:
                values[key] = read_key((*path, key), draw(values_of(key_schemas(kind)[key])))
            except ConfigError:
                continue
    return kind(**values)


@pytest.mark.parametrize("section", SECTIONS)
@settings(max_examples=60)
@given(data=st.data())
def test_flags_are_read_back_as_the_section(section: str, data: st.DataObject) -> None:
    record = data.draw(records(section))
    parser = argparse.ArgumentParser()
    add_section_flags(parser, section)
    assert section_from_args(parser.parse_args(section_flags(record)), section) == record
