"""Comparisons of runs, for any losses."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from retort.report.comparisons import find_gain, sum_documents


@given(st.integers(2, 30), st.integers(0, 99))
def test_a_run_beside_itself_has_no_margin(size: int, seed: int) -> None:
    losses = np.random.default_rng(seed).gamma(2, 2, size)
    table = pd.DataFrame({"positions": np.ones(size), "loss": losses})
    found = find_gain(sum_documents({"plain": table, "run": table}), "run", "plain")
    assert found is not None and found[0] == 0.0 and (found[1] == 0.0).all()
