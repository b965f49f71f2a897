"""Comparisons of runs, for any losses."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retort.evaluation.scores import compare_losses


@given(st.integers(2, 30), st.integers(0, 99))
def test_a_run_beside_itself_has_no_margin(size: int, seed: int) -> None:
    losses = np.random.default_rng(seed).gamma(2, 2, size)
    found = compare_losses({"plain": losses, "run": losses}, np.ones(size))["margin"]
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
