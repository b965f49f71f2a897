"""Properties of thinned and smoothed learning curves."""

import math

import pytest

from retort.report.curves import smooth_curve, thin_curve
from retort.report.records import TrainingLog


def check_thinning(losses: list[float]) -> None:
    """Check that a thinned curve has at most 400 points, the same end and, if blocks are equal, the same mean."""
    thin = thin_curve(TrainingLog(tuple(range(1, len(losses) + 1)), tuple(losses)))
    assert len(thin.steps) <= 400
    assert thin.steps[-1] == len(losses)
    if len(losses) % len(thin.steps) == 0:
        assert math.isclose(
            sum(thin.hard_loss) / len(thin.steps), sum(losses) / len(losses), abs_tol=1e-9
        )


def check_smoothing(slope: float, count: int) -> None:
    """Check that smoothing does not change a straight line, except near its ends."""
    line = [slope * i for i in range(count)]
    radius = count // 40
    smooth = smooth_curve(line)
    assert len(smooth) == count
    middle = slice(radius, count - radius)
    assert smooth[middle] == pytest.approx(line[middle], abs=1e-6)
