"""Properties of thinned and smoothed learning curves."""

import math

import pandas as pd
import pytest

from retort.report.figures import smooth_curve, thin_curve


def check_thinning(losses: list[float]) -> None:
    """Check that a thinned curve has at most 400 points, the same end and, if blocks are equal, the same mean."""
    thin = thin_curve(pd.DataFrame({"step": range(1, len(losses) + 1), "hard_loss": losses}))
    assert len(thin) <= 400
    assert thin.step.iloc[-1] == len(losses)
    if len(losses) % len(thin) == 0:
        assert math.isclose(thin.hard_loss.mean(), sum(losses) / len(losses), abs_tol=1e-9)


def check_smoothing(slope: float, count: int) -> None:
    """Check that smoothing does not change a straight line, except near its ends."""
    line = [slope * i for i in range(count)]
    radius = count // 40
    smooth = list(smooth_curve(pd.Series(line)))
    assert len(smooth) == count
    middle = slice(radius, count - radius)
    assert smooth[middle] == pytest.approx(line[middle], abs=1e-6)
