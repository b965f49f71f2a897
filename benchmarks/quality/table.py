"""What the quality benchmark prints and draws."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from benchmarks.common import finish_panel, label_log_axis, save_figure, set_figure_style
from benchmarks.quality.experiment import WAYS, Experiment

# Student's t: how many standard errors the 95 % interval of a mean of n values reaches, by n - 1.
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds, and half the width of its 95 % interval (Student's t); nan for one seed."""

    value: float
    reach: float

    @classmethod
    def over(cls, values: NDArray[np.float64]) -> "Mean":
        """Return the mean of independent values."""
        if len(values) == 1:
            return cls(float(values[0]), math.nan)
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
        return cls(float(values.mean()), T_975[len(values) - 1] * error)

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} +- {self.reach:{spec}}"


def compute_gain(
    experiment: Experiment, way: str, seeds: list[int], metric: str
) -> NDArray[np.float64]:
    """Return by how much a way's students are better than CE's of the same seed."""
    found = experiment.results
    return np.array([found["CE", s][metric] - found[way, s][metric] for s in seeds])


HEADS = ("bytes", "loss", "above FullKD", "share of gain", "KL", "share of its gain")
WIDTHS = (8, 8, 17, 18, 8, 19, 7, 8, 7, 7, 7)
Points = dict[str, tuple[float, Mean]]


def print_table(
    experiment: Experiment, angles: dict[str, dict[str, float]], *, num_seeds: int
) -> Points:
    """Print a line for each way; return bytes and share of the gain of those that store something.

    `angles` holds, by state of FullKD's student and way, the degrees between the way's gradient and FullKD's.
    """

    def print_line(name: str, cells: list[str]) -> None:
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        print(f"{name:22}{line}")

    print_line("", [*HEADS, "ECE", "accept", *angles, "seeds"])
    points: Points = {}
    for way in WAYS:
        done = [
            {seed for w, seed in experiment.results if w == name} for name in ("CE", "FullKD", way)
        ]
        seeds = sorted(set.intersection(*done) & set(range(num_seeds)))
        if not seeds:
            continue
        gains = {m: compute_gain(experiment, way, seeds, m) for m in ("loss", "kl")}
        exact = {m: compute_gain(experiment, "FullKD", seeds, m) for m in ("loss", "kl")}
        shares = {m: Mean.over(gains[m] / exact[m]) for m in gains}
        targets = experiment.load_targets(way)
        if targets:
            points[way] = (targets.bytes_per_position, shares["loss"])
        rows = [experiment.results[way, seed] for seed in seeds]
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        cells = [
            f"{targets.bytes_per_position:.1f}" if targets else "-",
            f"{mean['loss']:.3f}",
            f"{Mean.over(exact['loss'] - gains['loss']):.3f}",
            f"{shares['loss']:.1%}",
            f"{mean['kl']:.3f}",
            f"{shares['kl']:.1%}",
            f"{mean['ece']:.1%}",
            f"{mean['acceptance']:.1%}",
            *(f"{of_state.get(way, math.nan):.1f}" for of_state in angles.values()),
            f"{len(rows)}",
        ]
        print_line(way, cells)
    return points


def draw_figure(path: Path, points: Points) -> None:
    """Draw the share of the gain over bytes a position."""
    set_figure_style()
    figure, panel = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    groups: dict[str, list[tuple[float, Mean]]] = {}
    for way, point in points.items():
        group = "top-12, 50, 64 renormalised" if way.startswith("top-") else way.split(" 0.")[0]
        groups.setdefault(group, []).append(point)
    for (group, found), marker in zip(groups.items(), "os^D", strict=True):
        xs, shares = zip(*found, strict=True)
        ys, reaches = [s.value for s in shares], [s.reach for s in shares]
        panel.errorbar(xs, ys, reaches, marker=marker, capsize=3, label=group)
    panel.axhline(0.95, color="gray", linewidth=0.8, linestyle=":")
    title = "share of the gain from CE to FullKD, 95 % intervals"
    panel.set(xscale="log", xlabel="bytes per position", title=title)
    label_log_axis(panel.xaxis)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    finish_panel(panel)
    save_figure(figure, path)
