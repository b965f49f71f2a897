"""Batches of sequences of any lengths."""

from hypothesis import given
from hypothesis import strategies as st

from support.scoring import check_batches


@given(lengths=st.lists(st.integers(2, 40), max_size=30), batch_size=st.integers(1, 9))
def test_batches_cover_every_sequence_once_in_order_of_length(
    lengths: list[int], batch_size: int
) -> None:
    check_batches(lengths, batch_size)
