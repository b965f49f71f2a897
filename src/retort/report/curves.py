"""Learning curves: hard loss over steps, thinned and smoothed."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from retort.report.records import TrainingLog
from retort.report.svg import PANEL_INCHES, find_style, finish_axes, render_svg

_MAX_POINTS = 400  # of a curve: about as many as a panel has pixels


def draw_curves(logs: Sequence[TrainingLog | None], *, key: str) -> list[str]:
    """Return hard loss over steps, an SVG for all steps and one for the second half; empty without logs.

    `key` must be unique in the page.
    """
    if not any(logs):
        return []
    longest = max(len(log.steps) for log in logs if log)
    panels = {"all steps": 0.0} | ({"the second half of the steps": 0.5} if longest >= 20 else {})
    return [
        render_svg(
            partial(_draw_curves, logs=logs, since=since),
            (PANEL_INCHES, 3.1),
            label=f"learning curves, {label}",
            key=f"{key}{number}",
        )
        for number, (label, since) in enumerate(panels.items())
    ]


def _draw_curves(axes: Axes, logs: Sequence[TrainingLog | None], since: float) -> None:
    """Draw the logged and the smoothed curves from `since` (a share of a run's steps) on.

    Runs of different lengths share an axis in percent of their steps.
    """
    lasts = {log.steps[-1] for log in logs if log}
    scale = {last: 1.0 if len(lasts) == 1 else 100 / last for last in lasts}
    shown: list[float] = []
    for index, log in enumerate(logs):
        if log is None:
            continue
        last, thinned = log.steps[-1], thin_curve(log)
        steps = [step * scale[last] for step in thinned.steps]
        smooth = smooth_curve(thinned.hard_loss)
        colour, marker, dashes = find_style(index)
        every = max(1, len(smooth) // 10)
        marks: dict[str, Any] = {
            "marker": marker,
            "markersize": 5,
            "markevery": (index % every, every),
        }
        axes.plot(steps, thinned.hard_loss, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=colour, linewidth=1.6, linestyle=dashes, **marks)
        shown += [y for x, y in zip(thinned.steps, smooth, strict=True) if x >= since * last]
    end = max(last * scale[last] for last in lasts)
    span = max(max(shown) - min(shown), 1e-3)
    axes.set_xlim(since * end, 1.01 * end + 1e-9)
    axes.set_ylim(min(shown) - 0.08 * span, max(shown) + 0.08 * span)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("step" if len(lasts) == 1 else "share of the run's steps, %")
    finish_axes(axes, "hard loss, nats/token")


def thin_curve(log: TrainingLog) -> TrainingLog:
    """Return a curve of at most 400 points, each the mean of equally many logged ones."""
    size = math.ceil(len(log.steps) / _MAX_POINTS)
    blocks = [slice(start, start + size) for start in range(0, len(log.steps), size)]
    means = tuple(sum(log.hard_loss[b]) / len(log.hard_loss[b]) for b in blocks)
    return TrainingLog(tuple(log.steps[b][-1] for b in blocks), means)


def smooth_curve(values: Sequence[float]) -> list[float]:
    """Return the centred running mean over a twentieth of the curve."""
    radius = len(values) // 40
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
