"""Properties of flags."""

import argparse
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.config.flags import add_section_flags, section_flags, section_from_args
from retort.config.schema import (
    ConfigError,
    Schema,
    fill_defaults,
    is_section,
    section_schema,
)
from retort.config.sections import SECTIONS, build_section, freeze
from retort.config.values import read_value


def values_of(schema: Schema) -> st.SearchStrategy[Any]:
    """Return a strategy for values as a user writes them, most of them valid."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "accepts" in schema:
        words = ["full", "interleaved", "contiguous", "my.module:assign"]
        return st.sampled_from(words) | st.integers(1, 99)
    texts = st.text(min_size=1, max_size=9) | st.sampled_from(["-x", "--flag", "a b", "%s", "[a]"])
    drawn = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum", 0), schema.get("maximum", 2**40)),
        "number": st.floats(0, 1e6, allow_subnormal=False),
        "string": texts,
        "array": st.deferred(lambda: st.lists(values_of(schema["items"]), max_size=3)),
    }
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return st.one_of([drawn[kind] for kind in kinds])


@st.composite
def records(draw: st.DrawFn, section: str) -> Any:
    """Draw a section's record: some keys at their default, others at any valid value."""
    schema = section_schema(section)
    values = fill_defaults({}, schema)
    for key, sub in schema["properties"].items():
        if is_section(sub) or (section, key) == ("teacher.generation", "num_workers"):
            continue
        if draw(st.booleans()):
            try:
                path = (*section.split("."), key)
                values[key] = freeze(read_value(path, draw(values_of(sub))))
            except ConfigError:
                continue
    return build_section(section, values)


@pytest.mark.parametrize("section", SECTIONS)
@settings(max_examples=60)
@given(data=st.data())
def test_flags_are_read_back_as_the_section(section: str, data: st.DataObject) -> None:
    record = data.draw(records(section))
    parser = argparse.ArgumentParser()
    add_section_flags(parser, section)
    assert section_from_args(parser.parse_args(section_flags(record)), section) == record
