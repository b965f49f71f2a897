"""top_p and sampled: what is decoded is what was selected, for any distribution."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.coded import METHODS, check_round_trip


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**31), num_positions=st.integers(1, 40), is_wide=st.booleans())
@settings(max_examples=25)
def test_what_is_decoded_is_what_was_selected(
    method: str, seed: int, num_positions: int, is_wide: bool
) -> None:
    check_round_trip(method, seed=seed, num_positions=num_positions, is_wide=is_wide)
