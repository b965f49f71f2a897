"""Learning curves, for any losses."""

from hypothesis import given
from hypothesis import strategies as st

from support.curves import check_smoothing, check_thinning


@given(st.lists(st.floats(0, 100), min_size=1, max_size=1500))
def test_curves_are_thinned_without_moving_their_mean_or_their_end(losses: list[float]) -> None:
    check_thinning(losses)


@given(st.floats(-5, 5), st.integers(1, 300))
def test_smoothing_keeps_straight_lines_away_from_the_ends(slope: float, count: int) -> None:
    check_smoothing(slope, count)
