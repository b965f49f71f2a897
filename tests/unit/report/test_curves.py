"""Learning curves: thinned and smoothed."""

import pytest

from support.curves import check_smoothing, check_thinning


@pytest.mark.parametrize("count", [1, 400, 401, 1200])
def test_curves_are_thinned_without_moving_their_mean_or_their_end(count: int) -> None:
    check_thinning([100 / (1 + i) for i in range(count)])


@pytest.mark.parametrize(("slope", "count"), [(1.5, 1), (-0.5, 39), (2.0, 300)])
def test_smoothing_keeps_straight_lines_away_from_the_ends(slope: float, count: int) -> None:
    check_smoothing(slope, count)
