"""Means over runs that differ only in their seed, with confidence intervals.

The interval is Student's: mean +- t s / sqrt(n), with t the quantile of n - 1 degrees of freedom (Student: The probable
error of a mean, 1908). It accounts for the choice of seeds; the intervals of single runs, for the choice of documents.
The margin of each run is against the baseline of its own seed.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from retort.evaluation.intervals import Estimate
from retort.report.comparisons import compare_with_baseline
from retort.report.records import Record, group_runs

AVERAGED_METRICS = ("loss", "bits_per_byte", "kl_to_teacher", "agreement")
_SEED = "training.seed"
# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True)
class SeedMean:
    """Runs that differ only in their seed: their name without the seed, and means by metric."""

    name: str
    runs: tuple[Record, ...]
    means: dict[str, Estimate]  # of AVERAGED_METRICS and "margin"; without those that a run lacks

    @property
    def num_seeds(self) -> int:
        """The number of seeds."""
        return len(self.runs)


def average_seeds(records: Sequence[Record]) -> list[SeedMean]:
    """Return the means of all runs that differ only in their seed, if there are two seeds or more."""
    alike: dict[str, list[Record]] = {}
    for group in group_runs(records):
        for record in group:
            alike.setdefault(_settings(record), []).append(record)
    return [_average(runs, records) for runs in alike.values() if len({r.seed for r in runs}) > 1]


def _settings(record: Record) -> str:
    """Return all settings that a run's result depends on, except its seed, as one string."""
    config = {
        k: v
        for k, v in record.trained.items()
        if k.startswith(("student.", "training.")) and k != _SEED
    }
    if not config:  # settings are unknown: do not average with any other run
        return record.id
    rest = (record.content, record.positions, record.teacher, record.steps, str(record.cache))
    return json.dumps([config, rest], sort_keys=True, default=str)


def _average(runs: Sequence[Record], records: Sequence[Record]) -> SeedMean:
    first_of_seed = {record.seed: record for record in reversed(runs)}
    chosen = tuple(sorted(first_of_seed.values(), key=lambda r: r.seed))
    means = {}
    for name in AVERAGED_METRICS:
        if all(name in r.card.metrics for r in chosen):
            means[name] = average([r.card.metrics[name].value for r in chosen])
    margins = [compare_with_baseline(r, records) for r in chosen]
    if all(margins):
        means["margin"] = average([found.margin.value for found in margins if found])
    return SeedMean(_name(chosen), chosen, means)


def _name(runs: Sequence[Record]) -> str:
    """Return the names without a sweep's `-seed_3`; if they still differ, the first and the last name."""
    names = {re.sub(r"-(training\.)?seed_\d+(?=-|$)", "", r.name) for r in runs}
    return names.pop() if len(names) == 1 else f"{runs[0].name} ... {runs[-1].name}"


def average(values: Sequence[float]) -> Estimate:
    """Return the mean of two or more values, with its 95 % interval."""
    mean = statistics.fmean(values)
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


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
