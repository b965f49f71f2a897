"""Properties of digests."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from retort.io.digests import digest

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


def reorder(value: Any) -> Any:
    """Return the same value with the keys of every dictionary in another order."""
    if isinstance(value, dict):
        return {key: reorder(value[key]) for key in reversed(list(value))}
    return [reorder(item) for item in value] if isinstance(value, list) else value


@given(values)
def test_equal_values_have_equal_digests_whatever_the_order_of_their_keys(value: Any) -> None:
    assert digest(value) == digest(reorder(value))
    assert digest(value) == digest(json.loads(json.dumps(value)))
    assert len(digest(value)) == 12


@given(values, values)
def test_different_values_have_different_digests(one: Any, other: Any) -> None:
    assert (json.dumps(reorder(one), sort_keys=True) == json.dumps(other, sort_keys=True)) == (
        digest(one) == digest(other)
    )
