"""Figures of settings: held-out loss and KL, sweeps, cost, reliability, learning curves.

A series has the colour of its setting; its seeds are small points, their mean is a large one.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from retort.evaluation.records import Scorecard
from retort.report.comparisons import (
    HELD_OUT,
    SEED,
    SIZE,
    STUDENT,
    TEXT,
    UNKNOWN,
    WEIGHTS,
    Comparisons,
)
from retort.report.runs import find_teachers, get_estimate
from retort.report.svg import (
    INKS,
    PANEL_INCHES,
    Draw,
    draw_swatch,
    find_style,
    finish_axes,
    render_svg,
)

# Behind text, so that no line runs through a word.
_HALO: dict[str, Any] = {"facecolor": INKS["ground"][0], "edgecolor": "none", "pad": 1.2}
_DASHED: dict[str, Any] = {"linewidth": 1.3, "linestyle": (0, (4, 3))}
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
        return [
            (s, draw_swatch(self.styles[s], key=f"{self.key}s{self.styles[s]}")) for s in settings
        ]

    def _render(self, draw: Draw, label: str, *, height: float = 3.1) -> str:
        key = self.key + re.sub(r"\W+", "-", label)
        return render_svg(draw, (PANEL_INCHES, height), label=label, key=key)

    def _draw_point(
        self, axes: Axes, at: float, name: str, metric: str, style: int, *, is_level: bool = False
    ) -> None:
        """Draw the seeds, the interval and the mean of a setting's metric at a place on the other axis."""
        colour, marker, _ = find_style(style)
        found = get_estimate(self.group.loc[name], metric)
        seeds = self.found.values_of(name, metric)
        assert found is not None

        def plot(values: Sequence[float], **look: Any) -> None:
            points = [at] * len(values), values
            axes.plot(*(points[::-1] if is_level else points), color=colour, **look)

        plot(found.ends or (), linewidth=1.6, alpha=0.7)
        if len(seeds) > 1:
            plot(list(seeds), marker="o", markersize=4, linestyle="none", alpha=0.55)
        plot([found.value], marker=marker, markersize=8, zorder=4)

    def _find_limits(
        self, metric: str, also: Sequence[float], settings: Sequence[str] = ()
    ) -> tuple[float, float]:
        """Return the ends of an axis: all values, and intervals as far as they leave the differences visible."""
        rows = self.group.loc[list(settings or self.group.index)]
        seeds = self.found.runs[self.found.runs.setting.isin(rows.index)][metric]
        values = [*rows[metric].dropna(), *seeds.dropna(), *also]
        low, high = min(values), max(values)
        span = max(high - low, 0.02)  # so that smaller differences look small
        low = max(np.nanmin([low, *rows[f"{metric}_low"]]), low - span)
        high = min(np.nanmax([high, *rows[f"{metric}_high"]]), high + span)
        return low - 0.06 * span, high + 0.06 * span

    @cached_property
    def _teacher_losses(self) -> list[float]:
        return list(find_teachers(self.group).loss.dropna())

    def draw_comparison(self) -> list[str]:
        """Return the held-out loss of the settings, and their KL to the teacher if defined, an SVG each."""
        drawn = []
        for metric, label in {"loss": "held-out loss", "kl_to_teacher": "KL to teacher"}.items():
            if self.group[metric].notna().any():
                draw = partial(self._draw_rows, metric=metric, label=label)
                height = 0.95 + 0.42 * len(self.group)
                drawn.append(self._render(draw, f"{label} of each setting", height=height))
        return drawn

    def _draw_rows(self, axes: Axes, metric: str, label: str) -> None:
        """Draw a row for each setting: its name and value, and below them its points."""
        teachers = self._teacher_losses if metric == "loss" else []
        low, high = self._find_limits(metric, teachers if metric == "loss" else [0.0])
        axes.set_xlim(low if metric == "loss" else 0.0, high)
        axes.set_ylim(len(self.group) - 0.55, -0.8)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{label}, nats/token")
        left = axes.get_yaxis_transform()
        for level, (name, value) in enumerate(self.group[metric].items()):
            shown = "not defined" if pd.isna(value) else f"{value:.3f}"
            for x, text, side in ((0.01, _clip(name), "left"), (0.99, shown, "right")):
                axes.text(x, level - 0.22, text, transform=left, va="bottom", ha=side, bbox=_HALO)
            if pd.notna(value):
                self._draw_point(axes, level, name, metric, self.styles[name], is_level=True)
        for height, loss in enumerate(teachers):  # below the names; their values are stacked
            is_left = loss < (low + high) / 2
            axes.axvline(loss, zorder=1, color=INKS["ink"][0], **_DASHED)
            axes.annotate(
                f"teacher {loss:.3f}",
                (loss, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-3 if is_left else 3, 3 + 12 * height),
                textcoords="offset points",
                ha="left" if is_left else "right",
            )

    def draw_sweeps(self) -> list[tuple[str, str, Legend]]:
        """Return (key, held-out loss over its values as SVG, a legend of its lines) for each sweep."""
        drawn = []
        for key, points in find_sweeps(self.found, self.group):
            lines = list(dict.fromkeys(points.sort_values("loss").line))
            draw = partial(self._draw_sweep, key=key, points=points, lines=lines)
            swatches = [draw_swatch(i, key=f"{self.key}{key}{i}") for i in range(len(lines))]
            svg = self._render(draw, f"held-out loss over {key}")
            drawn.append((key, svg, list(zip(lines, swatches, strict=True))))
        return drawn

    def _draw_sweep(self, axes: Axes, key: str, points: pd.DataFrame, lines: Sequence[str]) -> None:
        xs = np.unique(points.x)
        if xs[0] > 0 and xs[-1] >= 10 * xs[0]:
            axes.set_xscale("log")
        if len(xs) <= 7:
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.xaxis.set_minor_locator(NullLocator())
        levels: list[float] = []
        for style, line in enumerate(lines):
            rows = points[points.line == line]
            colour, _, dashes = find_style(style)
            means = rows.groupby("x").loss.mean()
            axes.plot(means.index, means, color=colour, linestyle=dashes, linewidth=1.6)
            for name, x in rows.x.items():
                self._draw_point(axes, x, name, "loss", style)
            # Cross-entropy, where the key has no meaning for it.
            for name in set(rows.baseline.dropna()) - set(points.index):
                levels.append(self.group.loss[name])
                axes.axhline(levels[-1], color=colour, linewidth=1.4, linestyle=(0, (1, 2)))
        self._finish(axes, key, self._find_limits("loss", levels, list(points.index)))

    def _finish(self, axes: Axes, label: str, limits: tuple[float, float]) -> None:
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(label)
        finish_axes(axes, "held-out loss, nats/token")

    def draw_costs(self) -> list[str]:
        """Return held-out loss over cost, an SVG each for stored bytes of the teacher and for training time.

        Empty for a single setting.
        """
        if len(self.group) < 2:
            return []
        # 0 for text only; missing for a live teacher.
        stored = self.group.cache_bytes_per_position.where(
            self.group.distillation_type != "output", 0.0
        )
        seconds = self.group.training_seconds
        unit, size = ("seconds", 1) if seconds.max() < 120 else ("minutes", 60)
        panels = {f"training time, {unit}": seconds / size}
        if stored.any():
            panels = {"stored teacher, bytes/position (0: text only)": stored} | panels
        drawn = []
        for label, costs in panels.items():
            draw = partial(self._draw_costs, costs=costs, label=label)
            drawn.append(self._render(draw, f"held-out loss over {label}"))
        return drawn

    def _draw_costs(self, axes: Axes, costs: pd.Series, label: str) -> None:
        """Draw each setting's loss, with its interval, over its cost; lower and further left is better."""
        most = costs.max()
        for index, (name, cost) in enumerate(costs.dropna().items()):
            # Settings of one cache cost the same: shifted a little, their intervals do not overlap.
            shift = 0.012 * most * (index - (len(costs) - 1) / 2) if len(costs) <= 8 else 0
            self._draw_point(axes, cost + shift, name, "loss", self.styles[name])
        for level in self._teacher_losses:
            axes.axhline(level, color=INKS["ink"][0], **_DASHED)
        axes.set_xlim(-0.06 * most, 1.08 * most)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        self._finish(axes, label, self._find_limits("loss", self._teacher_losses))

    def draw_reliability(self) -> Legend:
        """Return (name, SVG) of each teacher, then each setting: accuracy over confidence."""
        runs, metrics = self.found.runs, self.found.results.metrics
        runs = runs[runs.setting.isin(self.group.index)]
        drawn: list[tuple[str, int | None, list[Scorecard | None]]] = []
        for name, setting in find_teachers(self.group).of.items():
            first = runs.index[runs.setting == setting][0]
            drawn.append((name, None, [metrics[first].scores.teacher]))
        for name in self.group.index:
            seeds = runs.index[runs.setting == name]
            drawn.append((name, self.styles[name], [metrics[s].scores.student for s in seeds]))
        found = []
        for number, (name, style, cards) in enumerate(drawn):
            known = [card for card in cards if card and card.reliability]
            draw = partial(_draw_reliability, cards=known, style=style)
            label, key = "accuracy over confidence", f"{self.key}r{number}"
            if known:
                found.append((name, render_svg(draw, (2.9, 2.6), label=label, key=key)))
        return found

    def draw_curves(self) -> list[str]:
        """Return hard loss over steps, an SVG for all steps and one for the second half; empty without logs."""
        logs = self.found.results.logs
        if not logs:
            return []
        panels = {"all steps": 0.0}
        if max(map(len, logs.values())) >= 20:
            panels["the second half of the steps"] = 0.5
        return [
            self._render(partial(self._draw_curves, since=since), f"learning curves, {label}")
            for label, since in panels.items()
        ]

    def _draw_curves(self, axes: Axes, since: float) -> None:
        """Draw the logged and the smoothed curves from `since` (a share of a run's steps) on.

        Runs of different lengths share an axis in percent of their steps.
        """
        curves = {name: thin_curve(log) for name, log in self.found.results.logs.items()}
        lasts = {curve.step.iloc[-1] for curve in curves.values()}
        shown: list[float] = []
        for name, curve in curves.items():
            last, style = curve.step.iloc[-1], self.styles[self.found.runs.setting[name]]
            steps = curve.step * (1.0 if len(lasts) == 1 else 100 / last)
            smooth = smooth_curve(curve.hard_loss)
            colour, marker, dashes = find_style(style)
            every = max(1, len(smooth) // 10)
            look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.4}
            look |= {"marker": marker, "markersize": 4.5, "markevery": (style % every, every)}
            if len(curves) <= 6:
                axes.plot(steps, curve.hard_loss, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smooth, **look)
            shown += list(smooth[curve.step >= since * last])
        end = max(lasts) if len(lasts) == 1 else 100
        span = max(max(shown) - min(shown), 1e-3)
        axes.set_xlim(since * end, 1.01 * end + 1e-9)
        axes.set_ylim(min(shown) - 0.08 * span, max(shown) + 0.08 * span)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("step" if len(lasts) == 1 else "share of the run's steps, %")
        finish_axes(axes, "hard loss, nats/token")


def _clip(name: str, *, longest: int = 38) -> str:
    """Return a name that fits in a figure; the tables show it in full."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _draw_reliability(axes: Axes, cards: Sequence[Scorecard], style: int | None) -> None:
    """Draw the bins of each seed; the size of a dot is its share of positions. Below the diagonal is overconfident."""
    colour, marker, _ = (INKS["ink"][0], "o", "-") if style is None else find_style(style)
    axes.plot([0, 100], [0, 100], color=INKS["muted"][0], linewidth=1, linestyle=(0, (4, 3)))
    for card in cards:
        most = max((b.positions for b in card.reliability), default=1)
        for b in card.reliability:
            x, y = 100 * b.confidence, 100 * b.accuracy.value
            if b.accuracy.ends:
                axes.plot(
                    [x, x], [100 * end for end in b.accuracy.ends], color=colour, linewidth=1.2
                )
            size = 3 + 6 * math.sqrt(b.positions / most)
            axes.plot([x], [y], color=colour, marker=marker, markersize=size, linestyle="none")
    axes.set(xlim=(0, 100), ylim=(0, 100), xticks=[0, 50, 100], yticks=[0, 50, 100])
    axes.set_xlabel("confidence, %")
    finish_axes(axes, "accuracy, %")


def find_sweeps(found: Comparisons, group: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the keys that differ alone between settings of a group, and those settings with `x`, the key's value, and
    `line`, what distinguishes them from the other lines."""
    first = found.runs[found.runs.setting.isin(group.index)].drop_duplicates("setting")
    texts = pd.concat([found.conditions, found.learning], axis=1).loc[first.index]
    texts = (
        texts.set_axis(first.setting).drop(columns=[SEED, HELD_OUT, TEXT, UNKNOWN]).loc[group.index]
    )
    sweeps = []
    for key in texts.columns.drop(["teacher", STUDENT, WEIGHTS]):  # a digest may look like a number
        # The size of a student is a number, the config that it follows from is none.
        follows = [c for c in texts if c == key or (key == SIZE and c.startswith("student"))]
        rest = texts.drop(columns=follows)
        x = pd.to_numeric(texts[key], errors="coerce")
        points = group.assign(x=x, line=rest.agg("\n".join, axis=1))[x.notna()]
        points = points[points.groupby("line").x.transform("nunique") > 1].sort_values("x")
        if len(points):
            sweeps.append((key, points.assign(line=_name_lines(rest.loc[points.index]))))
    return sweeps


def _name_lines(rest: pd.DataFrame) -> pd.Series:
    """Return for each setting what differs between the lines, as "hybrid, temperature 2"."""
    kind = "training.distillation_type"
    used = rest.drop(columns=kind).mask(lambda texts: texts == "-")
    names = rest[kind]
    plain = rest.drop(columns=[STUDENT, WEIGHTS], errors="ignore")
    if len(plain.drop_duplicates()) == len(rest.drop_duplicates()):
        used = used.drop(columns=[STUDENT, WEIGHTS], errors="ignore")  # they tell nothing more
    for key in used.columns[used.nunique() > 1]:
        label = f", {key.rpartition('.')[2]} {{}}".format
        names += used[key].map(label, na_action="ignore").fillna("")
    return names


def thin_curve(log: pd.DataFrame) -> pd.DataFrame:
    """Return a curve of at most 400 points, each the mean of equally many logged ones, at the step of the last one."""
    block = np.arange(len(log)) // math.ceil(len(log) / _MAX_POINTS)
    return log.groupby(block).agg({"step": "last", "hard_loss": "mean"})


def smooth_curve(losses: pd.Series) -> pd.Series:
    """Return the centred running mean over a twentieth of the curve."""
    return losses.rolling(2 * (len(losses) // 40) + 1, center=True, min_periods=1).mean()
