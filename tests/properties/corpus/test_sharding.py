"""A document in no shard or in two is always detected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.corpus.sharding import Assignment, check_assignments


@given(size=st.integers(1, 40), change=st.integers(0, 39), shards=st.integers(2, 5))
def test_every_misassignment_is_detected(size: int, change: int, shards: int) -> None:
    assigned = [Assignment() for _ in range(shards)]
    for index in range(size):
        for shard, assignment in enumerate(assigned):
            owner = (index + (index == change % size)) % shards if shard == 0 else index % shards
            assignment.add(index.to_bytes(8, "little"), is_mine=owner == shard)
    moved = change % size
    if moved % shards == 0 or (moved + 1) % shards == 0:  # shard 0 lost it, or repeats it
        with pytest.raises(ValueError, match="to exactly one shard"):
            check_assignments(assigned, sharding="my_sharding:shard_of")
    else:
        check_assignments(assigned, sharding="my_sharding:shard_of")
