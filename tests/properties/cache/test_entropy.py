"""Entropy coding: any integers come back, in as many bits as their statistics allow."""

from hypothesis import given
from hypothesis import strategies as st

from support.coded import check_integers


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**21 - 1)), max_size=200))
def test_any_integers_take_what_their_statistics_allow(pairs: list[tuple[int, int]]) -> None:
    check_integers(pairs)
