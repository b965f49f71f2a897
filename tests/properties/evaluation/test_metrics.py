"""Metrics at positions, for any vocabulary and distributions."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from support.logprobs import check_comparison, check_own_metrics


@given(st.integers(2, 60), st.integers(0, 1000), st.data())
def test_comparisons_are_those_of_sums_written_out(width: int, seed: int, data: Any) -> None:
    check_comparison(width, seed, masked=data.draw(st.integers(0, width - 1)))


@given(st.integers(2, 60), st.integers(0, 1000))
def test_a_models_own_measures_are_those_of_sums_written_out(width: int, seed: int) -> None:
    check_own_metrics(width, seed)
