"""Properties of GPU groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.cluster.gpus import parse_groups


@given(count=st.integers(1, 16), per_model=st.integers(1, 16))
def test_groups_are_disjoint_and_full(count: int, per_model: int) -> None:
    ids = tuple(str(i) for i in range(count))
    if count < per_model:
        with pytest.raises(ValueError, match=f"gpus_per_model is {per_model}, but .* {count} GPUs"):
            parse_groups(None, gpus_per_model=per_model, detected=ids)
        return
    found = parse_groups(None, gpus_per_model=per_model, detected=ids)
    used = [g for group in found.groups for g in group]
    assert len(set(used)) == len(used)
    assert {len(group) for group in found.groups} == {per_model}
    assert sorted([*used, *found.left_over]) == sorted(ids)
