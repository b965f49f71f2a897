"""Means over seeds, and over the logged losses of a run, and their differences, with 95 % intervals.

The intervals are Student's: mean +- t s / sqrt(n), with t the quantile of n - 1 degrees of freedom (Student: The
probable error of a mean, 1908). They account for the choice of seeds, those of single runs for the choice of documents.
"""

import math
import statistics

import numpy as np
import pandas as pd

from retort.evaluation.intervals import Estimate

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


def student_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t for degrees of freedom; beyond the table, by a normal expansion.

    The expansion: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.5, to the second order.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def average(values: pd.Series) -> Estimate:
    """Return the mean of the values of two or more seeds."""
    half = student_quantile(len(values) - 1) * float(values.sem())
    return _centre(float(values.mean()), half)


def _centre(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def compare_means(one: pd.Series, other: pd.Series) -> Estimate:
    """Return the difference of two means over seeds; the index of the values is their seed.

    With the same seeds, the mean of the differences of each seed; else with Welch's interval (The generalization of
    Student's problem, 1947), degrees of freedom rounded down; without an interval where one has a single seed.
    """
    value = float(one.mean() - other.mean())
    if min(len(one), len(other)) < 2:
        return Estimate(value, None, None)
    if set(one.index) == set(other.index):
        return average(one - other)
    variances = np.array([one.sem() ** 2, other.sem() ** 2])
    total = variances.sum()
    if total == 0:
        return _centre(value, 0.0)
    freedom = total**2 / (variances**2 / [len(one) - 1, len(other) - 1]).sum()
    return _centre(value, student_quantile(int(freedom)) * math.sqrt(total))


def find_last_change(log: pd.DataFrame) -> Estimate | None:
    """Return the change of the hard loss at the end of a training log, None for fewer than 8 logged losses.

    Of the last fifth of them, 8 at least, the mean of the second half minus that of the first, with Welch's interval:
    below zero, the loss still fell by more than its noise from batch to batch.
    """
    last = log.hard_loss.reset_index(drop=True).iloc[-max(8, len(log) // 5) :]
    half = len(last) // 2
    return compare_means(last.iloc[half:], last.iloc[:half]) if half >= 4 else None


def compute_share(gains: pd.Series, gaps: pd.Series) -> Estimate | None:
    """Return mean gain / mean gap of two or more seeds, None unless both are clearly positive.

    The interval is that of a ratio estimator (Cochran: Sampling Techniques, 1977, 6.4), with Student's quantile.
    """
    if any((average(v).low or 0.0) <= 0 for v in (gains, gaps)):
        return None
    share = float(gains.mean() / gaps.mean())
    half = student_quantile(len(gains) - 1) * float((gains - share * gaps).sem() / gaps.mean())
    return _centre(share, half)
