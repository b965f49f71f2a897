"""Figures of settings: held-out loss and KL, sweeps, cost, reliability, learning curves.

A series has the colour of its setting; its seeds are small points, their mean is a large one.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from retort.evaluation.records import Scorecard
from retort.report import svg
from retort.report.comparisons import Comparisons, find_sweeps
from retort.report.runs import find_teachers

_WIDTH = 4.4  # inches of a panel, which fills a phone; a wide screen shows two side by side
# Behind text, so that no line runs through a word.
_HALO: dict[str, Any] = {"facecolor": svg.INKS["ground"][0], "edgecolor": "none", "pad": 1.2}
_DASHED: dict[str, Any] = {"linewidth": 1.3, "linestyle": (0, (4, 3)), "color": svg.INKS["ink"][0]}
_MAX_POINTS = 400  # of a curve: about as many as a panel has pixels

Legend = list[tuple[str, str]]  # names and swatches


@dataclass(frozen=True)
class Figures:
    """The figures of a group of settings, each a row of `group`.

    styles: the place of each setting in the report, which gives its colour. key: unique in the page, for ids.
    """

    found: Comparisons
    group: pd.DataFrame
    styles: Mapping[str, int]
    key: str

    def make_legend(self, settings: Iterable[str]) -> Legend:
        """Return the name and the swatch of each setting."""
        return [(s, _find_swatch(self.styles[s], f"{self.key}s")) for s in settings]

    def _write(self, axes: Axes, label: str) -> str:
        return svg.write_svg(axes, label=label, key=self.key + re.sub(r"\W+", "-", label))

    def _draw_points(
        self, axes: Axes, at: pd.Series, metric: str, styles: Mapping[str, int], *, on: str = "x"
    ) -> None:
        """Draw the seeds, the interval and the mean of a metric of settings, each at its place on the axis `on`."""
        rows = self.group.loc[at.index]
        for name, place in at.items():
            colour, marker, _ = svg.find_style(styles[name])
            seeds = self.found.values_of(name, metric)
            ends = rows.loc[name, [f"{metric}_low", f"{metric}_high"]].dropna()
            for values, look in (
                (ends, {"linewidth": 1.6, "alpha": 0.7}),
                (seeds, {"marker": "o", "markersize": 4, "linestyle": "none", "alpha": 0.55}),
                ([rows.loc[name, metric]], {"marker": marker, "markersize": 8, "zorder": 4}),
            ):
                if values is not seeds or len(seeds) > 1:
                    points = [place] * len(values), list(values)
                    axes.plot(*(points if on == "x" else points[::-1]), color=colour, **look)

    def _find_limits(
        self, metric: str, also: Sequence[float], settings: Sequence[str] = ()
    ) -> tuple[float, float]:
        """Return the ends of an axis: all values, and intervals as far as they leave the differences visible."""
        rows = self.group.loc[list(settings or self.group.index)]
        seeds = self.found.runs[metric][self.found.runs.setting.isin(rows.index)]
        values = pd.concat([rows[metric], seeds, pd.Series(also, dtype=float)])
        low, high = values.min(), values.max()
        span = max(high - low, 0.02)  # so that smaller differences look small
        low = max(np.nanmin([low, *rows[f"{metric}_low"]]), low - span)
        high = min(np.nanmax([high, *rows[f"{metric}_high"]]), high + span)
        return low - 0.06 * span, high + 0.06 * span

    @cached_property
    def _teacher_losses(self) -> list[float]:
        return list(find_teachers(self.group).loss.dropna())

    def draw_comparison(self) -> list[str]:
        """Return the held-out loss of the settings, and their KL to the teacher if defined, an SVG each."""
        labels = {"loss": "held-out loss", "kl_to_teacher": "KL to teacher"}
        is_known = self.group[list(labels)].notna().any()
        return [self._draw_rows(key, label) for key, label in labels.items() if is_known[key]]

    @svg.with_style
    def _draw_rows(self, metric: str, label: str) -> str:
        """Draw a row for each setting: its name and value, and below them its points."""
        axes = svg.make_axes(_WIDTH, 0.95 + 0.42 * len(self.group))
        teachers = self._teacher_losses if metric == "loss" else []
        low, high = self._find_limits(metric, teachers if metric == "loss" else [0.0])
        axes.set(xlim=(low if metric == "loss" else 0.0, high), xlabel=f"{label}, nats/token")
        axes.set(ylim=(len(self.group) - 0.55, -0.8), yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        look: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
        levels = pd.Series(range(len(self.group)), self.group.index)
        for name, value in self.group[metric].items():
            shown = "not defined" if pd.isna(value) else f"{value:.3f}"
            for x, text, side in ((0.01, _clip(name), "left"), (0.99, shown, "right")):
                axes.text(x, levels[name] - 0.22, text, ha=side, bbox=_HALO, **look)
        known = levels[self.group[metric].notna()]
        self._draw_points(axes, known, metric, self.styles, on="y")
        for height, loss in enumerate(teachers):  # below the names; their values are stacked
            sign, side = (-1, "left") if loss < (low + high) / 2 else (1, "right")
            axes.axvline(loss, zorder=1, **_DASHED)
            place: dict[str, Any] = {"xytext": (3 * sign, 3 + 12 * height), "ha": side}
            place |= {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(f"teacher {loss:.3f}", (loss, 1), **place)
        return self._write(axes, f"{label} of each setting")

    def _write_losses(self, axes: Axes, label: str, limits: tuple[float, float]) -> str:
        svg.finish_axes(axes, "held-out loss, nats/token", label, limits)
        return self._write(axes, f"held-out loss over {label}")

    def draw_sweeps(self) -> list[tuple[str, str, Legend]]:
        """Return (key, held-out loss over its values as SVG, a legend of its lines) for each sweep."""
        drawn = []
        for key, points in find_sweeps(self.found, self.group):
            lines = list(dict.fromkeys(points.sort_values("loss").line))
            legend = [(line, _find_swatch(i, self.key + key)) for i, line in enumerate(lines)]
            drawn.append((key, self._draw_sweep(key, points, lines), legend))
        return drawn

    @svg.with_style
    def _draw_sweep(self, key: str, points: pd.DataFrame, lines: Sequence[str]) -> str:
        axes = svg.make_axes(_WIDTH, 3.1)
        xs = np.unique(points.x)
        if xs[0] > 0 and xs[-1] >= 10 * xs[0]:
            axes.set_xscale("log")
        if len(xs) <= 7:
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.xaxis.set_minor_locator(NullLocator())
        levels: list[float] = []
        for style, line in enumerate(lines):
            rows = points[points.line == line]
            colour, _, dashes = svg.find_style(style)
            means = rows.groupby("x").loss.mean()
            axes.plot(means.index, means, color=colour, linestyle=dashes, linewidth=1.6)
            self._draw_points(axes, rows.x, "loss", dict.fromkeys(rows.index, style))
            # Cross-entropy, where the key has no meaning for it.
            for name in set(rows.baseline.dropna()) - set(points.index):
                levels.append(self.group.loss[name])
                axes.axhline(levels[-1], color=colour, linewidth=1.4, linestyle=(0, (1, 2)))
        limits = self._find_limits("loss", levels, list(points.index))
        return self._write_losses(axes, key, limits)

    def draw_costs(self) -> list[str]:
        """Return held-out loss over cost, an SVG each for stored bytes of the teacher and for training time.

        Empty for a single setting.
        """
        if len(self.group) < 2:
            return []
        # 0 for text only; missing for a live teacher.
        is_distilled = self.group.distillation_type != "output"
        stored = self.group.cache_bytes_per_position.where(is_distilled, 0.0)
        seconds = self.group.training_seconds
        unit, size = ("seconds", 1) if seconds.max() < 120 else ("minutes", 60)
        panels = {f"training time, {unit}": seconds / size}
        if stored.any():
            panels = {"stored teacher, bytes/position (0: text only)": stored} | panels
        return [self._draw_costs(costs, label) for label, costs in panels.items()]

    @svg.with_style
    def _draw_costs(self, costs: pd.Series, label: str) -> str:
        """Draw each setting's loss, with its interval, over its cost; lower and further left is better."""
        axes = svg.make_axes(_WIDTH, 3.1)
        most, at = costs.max(), costs.dropna()
        if len(costs) <= 8:
            # Settings of one cache cost the same: shifted a little, their intervals do not overlap.
            at = at + 0.012 * most * (np.arange(len(at)) - (len(costs) - 1) / 2)
        self._draw_points(axes, at, "loss", self.styles)
        for level in self._teacher_losses:
            axes.axhline(level, **_DASHED)
        axes.set_xlim(-0.06 * most, 1.08 * most)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return self._write_losses(axes, label, self._find_limits("loss", self._teacher_losses))

    def draw_reliability(self) -> Legend:
        """Return (name, SVG) of each teacher, then each setting: accuracy over confidence."""
        scores = {name: m.scores for name, m in self.found.results.metrics.items()}
        members = self.found.runs.groupby("setting").groups
        models: list[tuple[str, int | None, list[Scorecard | None]]] = [
            (name, None, [scores[members[setting][0]].teacher])
            for name, setting in find_teachers(self.group).of.items()
        ]
        models += [
            (name, self.styles[name], [scores[run].student for run in members[name]])
            for name in self.group.index
        ]
        drawn = []
        for number, (name, style, cards) in enumerate(models):
            if known := [card for card in cards if card and card.reliability]:
                drawn.append((name, _draw_reliability(known, style, f"{self.key}r{number}")))
        return drawn

    def draw_curves(self) -> list[str]:
        """Return hard loss over steps, an SVG for all steps and one for the second half; empty without logs."""
        curves = {name: thin_curve(log) for name, log in self.found.results.logs.items()}
        panels = {"all steps": 0.0} if curves else {}
        if max(map(len, self.found.results.logs.values()), default=0) >= 20:
            panels["the second half of the steps"] = 0.5
        return [self._draw_curves(curves, f"learning curves, {n}", s) for n, s in panels.items()]

    def draw_watched(self) -> list[str]:
        """Return the held-out loss during the trainings over their steps, as SVG; empty where none was measured."""
        return [self._draw_watched()] if self.found.results.watched else []

    @svg.with_style
    def _draw_watched(self) -> str:
        axes = svg.make_axes(_WIDTH, 3.1)
        curves = self.found.results.watched
        lasts = {curve.step.iloc[-1] for curve in curves.values()}
        for name, curve in curves.items():
            last, style = curve.step.iloc[-1], self.styles[self.found.runs.setting[name]]
            colour, marker, dashes = svg.find_style(style)
            steps = curve.step * (1.0 if len(lasts) == 1 else 100 / last)
            look: dict[str, Any] = {"linestyle": dashes, "linewidth": 1.4, "markersize": 4.5}
            axes.plot(steps, curve.eval_loss, color=colour, marker=marker, **look)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(0, 1.02 * (max(lasts) if len(lasts) == 1 else 100))
        x_label = "step" if len(lasts) == 1 else "share of the run's steps, %"
        svg.finish_axes(axes, "held-out loss, nats/token", x_label)
        return self._write(axes, "held-out loss during training")

    @svg.with_style
    def _draw_curves(self, curves: Mapping[str, pd.DataFrame], label: str, since: float) -> str:
        """Draw the logged and the smoothed curves from `since` (a share of a run's steps) on.

        Runs of different lengths share an axis in percent of their steps.
        """
        axes = svg.make_axes(_WIDTH, 3.1)
        lasts = {curve.step.iloc[-1] for curve in curves.values()}
        shown = []
        for name, curve in curves.items():
            last, style = curve.step.iloc[-1], self.styles[self.found.runs.setting[name]]
            steps = curve.step * (1.0 if len(lasts) == 1 else 100 / last)
            smooth = smooth_curve(curve.hard_loss)
            colour, marker, dashes = svg.find_style(style)
            every = max(1, len(smooth) // 10)
            look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.4}
            look |= {"marker": marker, "markersize": 4.5, "markevery": (style % every, every)}
            if len(curves) <= 6:
                axes.plot(steps, curve.hard_loss, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth, **look)
            shown.append(smooth[curve.step >= since * last])
        end = max(lasts) if len(lasts) == 1 else 100
        low, high = pd.concat(shown).min(), pd.concat(shown).max()
        margin = 0.08 * max(high - low, 1e-3)
        axes.set_xlim(since * end, 1.01 * end + 1e-9)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        x_label = "step" if len(lasts) == 1 else "share of the run's steps, %"
        svg.finish_axes(axes, "hard loss, nats/token", x_label, (low - margin, high + margin))
        return self._write(axes, label)


def _find_swatch(style: int, key: str) -> str:
    """Return a swatch whose ids begin with a key that is unique with its style."""
    return svg.draw_swatch(style).replace("swatch-", f"{key}{style}-")


def _clip(name: str, *, longest: int = 38) -> str:
    """Return a name that fits in a figure; the tables show it in full."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


@svg.with_style
def _draw_reliability(cards: Sequence[Scorecard], style: int | None, key: str) -> str:
    """Draw the bins of each seed; the size of a dot is its share of positions. Below the diagonal is overconfident."""
    axes = svg.make_axes(2.9, 2.6)
    colour, marker, _ = (svg.INKS["ink"][0], "o", "-") if style is None else svg.find_style(style)
    axes.plot([0, 100], [0, 100], color=svg.INKS["muted"][0], linewidth=1, linestyle=(0, (4, 3)))
    for card in cards:
        most = max(b.positions for b in card.reliability)
        for b in card.reliability:
            x, ends = 100 * b.confidence, [100 * end for end in b.accuracy.ends or ()]
            if ends:
                axes.plot([x, x], ends, color=colour, linewidth=1.2)
            look: dict[str, Any] = {"marker": marker, "linestyle": "none"}
            look["markersize"] = 3 + 6 * math.sqrt(b.positions / most)
            axes.plot([x], [100 * b.accuracy.value], color=colour, **look)
    axes.set(xlim=(0, 100), ylim=(0, 100), xticks=[0, 50, 100], yticks=[0, 50, 100])
    svg.finish_axes(axes, "accuracy, %", "confidence, %")
    return svg.write_svg(axes, label="accuracy over confidence", key=key)


def thin_curve(log: pd.DataFrame) -> pd.DataFrame:
    """Return a curve of at most 400 points, each the mean of equally many logged ones, at the step of the last one."""
    block = np.arange(len(log)) // math.ceil(len(log) / _MAX_POINTS)
    return log.groupby(block).agg({"step": "last", "hard_loss": "mean"})


def smooth_curve(losses: pd.Series) -> pd.Series:
    """Return the centred running mean over a twentieth of the curve."""
    return losses.rolling(2 * (len(losses) // 40) + 1, center=True, min_periods=1).mean()
