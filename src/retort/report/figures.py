"""Figures of runs: held-out loss and KL, reliability, learning curves. Equal inputs give equal bytes.

A run has one colour, marker and dash in every figure. Figures for the page are SVG with real text,
whose colours are CSS variables (--ink, --grid, --series0 ...): one drawing serves light and dark.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from retort.evaluation.intervals import Estimate
from retort.report.records import Record, TrainingLog, find_teachers
from retort.report.scorecards import Scorecard

# (light, dark). Drawn in the light colours; `_to_page` turns those into CSS variables.
INKS = {
    "ground": ("#ffffff", "#14181d"),
    "ink": ("#1a2027", "#e8ebee"),
    "muted": ("#5b6672", "#a3adb8"),
    "grid": ("#dfe3e8", "#363d45"),
}
# Hues after Okabe and Ito, which colour-blind readers tell apart, at a contrast of 3 or more.
SERIES = (
    ("#0072b2", "#5ab4f0"),
    ("#d55e00", "#ff9a5c"),
    ("#008a65", "#3ccfa3"),
    ("#b4558c", "#eaa3cb"),
    ("#7a6a00", "#e6d24a"),
    ("#4b4fa8", "#a9adff"),
)
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_DRAWING: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "retort",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": INKS["muted"][0],
    "axes.labelcolor": INKS["muted"][0],
    "xtick.color": INKS["muted"][0],
    "ytick.color": INKS["muted"][0],
    "text.color": INKS["ink"][0],
    "grid.color": INKS["grid"][0],
}
# Behind text, so that no line runs through a word.
_HALO: dict[str, Any] = {"facecolor": INKS["ground"][0], "edgecolor": "none", "pad": 1.2}
_PANEL_INCHES = 4.4  # a panel fills a phone; a wide screen shows two side by side
_CURVE_POINTS = 400  # about as many as a panel has pixels

_Draw = Callable[[Axes], None]


def draw_comparison(records: Sequence[Record], styles: Sequence[int], *, key: str) -> list[str]:
    """Return figure 1 of one group, an SVG per panel; `styles` are the runs' places in the report.

    `key` must be unique in the page: ids inside the SVGs begin with it.
    """
    height = _dots_height(len(records))
    return [
        _to_page(draw, (_PANEL_INCHES, height), label=label, key=f"{key}{number}")
        for number, (label, draw) in enumerate(_comparison_panels(records, styles))
    ]


def draw_curves(logs: Sequence[TrainingLog | None], *, key: str) -> list[str]:
    """Return figure 2, hard loss over steps: all steps, and the second half; empty without logs."""
    if not any(logs):
        return []
    longest = max(len(log.steps) for log in logs if log)
    halves = {"all steps": 0.0} | ({"the second half of the steps": 0.5} if longest >= 20 else {})
    return [
        _to_page(
            lambda axes, since=since: _draw_curves(axes, logs, since=since),  # type: ignore[misc]
            (_PANEL_INCHES, 3.1),
            label=f"learning curves, {words}",
            key=f"{key}{number}",
        )
        for number, (words, since) in enumerate(halves.items())
    ]


def draw_reliability(
    group: Sequence[Record], styles: Sequence[int], *, key: str
) -> list[tuple[str, str]]:
    """Return (name, SVG) of each model: accuracy over confidence, with the intervals of the bins; teachers first."""
    teachers = find_teachers(group)
    cards: list[tuple[str, int | None, Scorecard]] = [
        ("teacher" if len(teachers) == 1 else f"teacher {t.teacher}", None, t.teacher_card)
        for t in teachers
        if t.teacher_card
    ]
    cards += [(r.name, style, r.card) for r, style in zip(group, styles, strict=True)]
    return [
        (
            name,
            _to_page(
                lambda axes, card=card, style=style: _draw_reliability(axes, card, style),  # type: ignore[misc]
                (2.9, 2.6),
                label="accuracy over confidence",
                key=f"{key}{number}",
            ),
        )
        for number, (name, style, card) in enumerate(cards)
        if card.reliability
    ]


def _draw_reliability(axes: Axes, card: Scorecard, style: int | None) -> None:
    """Draw one model's bins; a dot's size is its share of the positions. Below the diagonal is too sure."""
    colour, marker, _ = (INKS["ink"][0], "o", "-") if style is None else _style(style)
    axes.plot([0, 100], [0, 100], color=INKS["muted"][0], linewidth=1, linestyle=(0, (4, 3)))
    most = max(b.positions for b in card.reliability)
    for b in card.reliability:
        x, y = 100 * b.confidence, 100 * b.accuracy.value
        if b.accuracy.ends:
            axes.plot([x, x], [100 * end for end in b.accuracy.ends], color=colour, linewidth=1.2)
        size = 3 + 6 * math.sqrt(b.positions / most)
        axes.plot([x], [y], color=colour, marker=marker, markersize=size, linestyle="none")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xticks([0, 50, 100])
    axes.set_yticks([0, 50, 100])
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel("confidence, %")
    axes.set_title("right, %", loc="left", fontsize=10, color=INKS["muted"][0])


def draw_costs(group: Sequence[Record], styles: Sequence[int], *, key: str) -> list[str]:
    """Return held-out loss over what it cost, an SVG each: bytes of teacher a token, and training time.

    Empty where there is nothing to tell apart: a single run.
    """
    if len(group) < 2:
        return []
    losses = [record.card.metrics["loss"] for record in group]
    teachers = [t.teacher_loss for t in find_teachers(group) if t.teacher_loss is not None]
    seconds = [record.training_seconds for record in group]
    unit, size = ("seconds", 1) if max(seconds) < 120 else ("minutes", 60)
    panels: list[tuple[str, Sequence[float | None]]] = [
        ("stored teacher, bytes/token (0: from text alone)", [_stored_bytes(r) for r in group]),
        (f"training time, {unit}", [second / size for second in seconds]),
    ]
    if not any(panels[0][1]):
        del panels[0]
    return [
        _to_page(
            lambda axes, costs=costs, label=label: _draw_costs(  # type: ignore[misc]
                axes, costs, losses, styles, teachers=teachers, label=label
            ),
            (_PANEL_INCHES, 3.1),
            label=f"held-out loss over {label}",
            key=f"{key}{number}",
        )
        for number, (label, costs) in enumerate(panels)
    ]


def _stored_bytes(record: Record) -> float | None:
    """Return what a run reads of the teacher, bytes a token: none from text alone, unknown of a live teacher."""
    if not record.is_distilled:
        return 0.0
    return record.cache.bytes_per_position if record.cache else None


def _draw_costs(
    axes: Axes,
    costs: Sequence[float | None],
    losses: Sequence[Estimate],
    styles: Sequence[int],
    *,
    teachers: Sequence[float],
    label: str,
) -> None:
    """Draw each run's loss, with its interval, over its cost; further down and to the left is better."""
    known = [x for x in costs if x is not None]
    for place, (cost, loss, style) in enumerate(zip(costs, losses, styles, strict=True)):
        if cost is None:
            continue
        colour, marker, _ = _style(style)
        # Runs of one cache cost the same: a few points apart, their intervals can be told apart.
        aside = 4 * (place - (len(costs) - 1) / 2) if len(costs) <= 8 else 0
        at = offset_copy(axes.transData, axes.get_figure(root=True), x=aside, units="points")
        if loss.ends:
            axes.plot([cost, cost], loss.ends, color=colour, linewidth=1.4, transform=at)
        axes.plot(
            [cost], [loss.value], color=colour, marker=marker, markersize=7, ls="none", transform=at
        )
    levels = [*teachers, *(end for loss in losses for end in loss.ends or (loss.value,))]
    low, high = min(levels), max(levels)
    room = 0.08 * max(high - low, 0.02)
    axes.set_ylim(low - room, high + room)
    for level in teachers:
        axes.axhline(level, color=INKS["ink"][0], linewidth=1.3, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.04 * max(known), 1.08 * max(known))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel(label)
    axes.set_title("held-out loss, nats/token", loc="left", fontsize=10, color=INKS["muted"][0])


def draw_swatch(style: int, *, key: str) -> str:
    """Return a short piece of a run's curve, for a legend."""
    return _draw_swatch(style).replace("swatch-", f"{key}-")


@cache
def _draw_swatch(style: int) -> str:
    """Draw it once, however many legends it is in: each drawing takes some 20 ms."""

    def draw(axes: Axes) -> None:
        colour, marker, dashes = _style(style)
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.plot([0, 1], [0, 0], color=colour, linestyle=dashes, linewidth=1.8)
        axes.plot([0.5], [0], color=colour, marker=marker, markersize=6)

    return _to_page(draw, (0.5, 0.16), label="", key="swatch")


def _to_page(draw: _Draw, size: tuple[float, float], *, label: str, key: str) -> str:
    """Return a drawing as <svg>: own ids, CSS variables for colours, no size, no metadata."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_DRAWING):
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr, call-arg]
        draw(figure.subplots())
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    hidden = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg {hidden} viewBox="\1">', svg, count=1
    )
    for colour, variable in _variables().items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("xlink:href", "href")


def _variables() -> Mapping[str, str]:
    """Return the CSS variable of each light colour."""
    inks = {light: name for name, (light, _) in INKS.items()}
    return inks | {light: f"series{index}" for index, (light, _) in enumerate(SERIES)}


def _style(index: int) -> tuple[str, str, Any]:
    """Return (colour, marker, dashes) of a run; no two of the first 42 look alike."""
    dashes = _DASHES[index // len(SERIES) % len(_DASHES)]
    return SERIES[index % len(SERIES)][0], _MARKERS[index % len(_MARKERS)], dashes


def _dots_height(num_runs: int) -> float:
    return 0.95 + 0.42 * num_runs


def _comparison_panels(group: Sequence[Record], styles: Sequence[int]) -> list[tuple[str, _Draw]]:
    """Return the panels of figure 1: losses, and KL where any run has it."""
    teachers = [t.teacher_loss for t in find_teachers(group) if t.teacher_loss is not None]
    names = [r.name for r in group]

    def draw_losses(axes: Axes) -> None:
        _draw_dots(axes, names, styles, [r.loss for r in group], teachers=teachers)
        axes.set_xlabel("held-out loss, nats/token")

    def draw_divergences(axes: Axes) -> None:
        _draw_dots(axes, names, styles, [r.kl_to_teacher for r in group], from_zero=True)
        axes.set_xlabel("KL to teacher, nats/token")

    panels: list[tuple[str, _Draw]] = [("held-out loss of each run", draw_losses)]
    if any(r.kl_to_teacher is not None for r in group):
        panels.append(("KL to the teacher of each run", draw_divergences))
    return panels


def _draw_dots(
    axes: Axes,
    names: Sequence[str],
    styles: Sequence[int],
    values: Sequence[float | None],
    *,
    teachers: Sequence[float] = (),
    from_zero: bool = False,
) -> None:
    """Draw a dot per run under its name, and a stem only where the axis begins at zero."""
    known = [v for v in values if v is not None] + list(teachers)
    low, high = (0.0 if from_zero else min(known)), max(known)
    room = max(high - low, 0.02)  # differences smaller than that shall look small
    axes.set_xlim(low - (0 if from_zero else 0.08 * room), high + 0.25 * room)
    axes.set_ylim(len(names) - 0.55, -0.8)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    left = axes.get_yaxis_transform()
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        colour, marker, _ = _style(styles[row])
        axes.text(0.01, row - 0.24, _clip(name), transform=left, va="bottom", bbox=_HALO)
        if value is None:
            axes.text(0.01, row, "not defined", transform=left, va="center", color=INKS["muted"][0])
            continue
        if from_zero:
            axes.hlines(row, 0, value, color=colour, linewidth=2)
        axes.plot(
            [value],
            [row],
            color=colour,
            marker=marker,
            markersize=8,
            linestyle="none",
            clip_on=False,
        )
        axes.annotate(
            f"{value:.3f}",
            (value, row),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            bbox=_HALO,
        )
    for level, loss in enumerate(teachers):
        _draw_teacher(axes, loss, level=level, is_left=loss < low + room / 2)


def _draw_teacher(axes: Axes, loss: float, *, level: int, is_left: bool) -> None:
    """Draw a teacher's loss as a line, named above; `level` stacks the names of several."""
    # Below the names, whose ground would else be crossed.
    axes.axvline(loss, color=INKS["ink"][0], linewidth=1.3, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"teacher {loss:.3f}",
        (loss, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-3 if is_left else 3, 3 + 12 * level),
        textcoords="offset points",
        ha="left" if is_left else "right",
    )


def _clip(name: str, *, longest: int = 44) -> str:
    """Return a name that fits in a figure; the tables have it whole."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def _draw_curves(axes: Axes, logs: Sequence[TrainingLog | None], *, since: float) -> None:
    """Draw the curves from `since` (a share of a run's steps) on: as logged, and smoothed.

    Runs of unequal length share an axis in percent of their steps.
    """
    lasts = {log.steps[-1] for log in logs if log}
    scale = {last: 1.0 if len(lasts) == 1 else 100 / last for last in lasts}
    shown: list[float] = []
    for index, log in enumerate(logs):
        if log is None:
            continue
        last, thinned = log.steps[-1], _thin(log)
        steps = [step * scale[last] for step in thinned.steps]
        smooth = _smooth(thinned.hard_loss)
        colour, marker, dashes = _style(index)
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
    room = max(max(shown) - min(shown), 1e-3)
    axes.set_xlim(since * end, 1.01 * end + 1e-9)
    axes.set_ylim(min(shown) - 0.08 * room, max(shown) + 0.08 * room)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_xlabel("step" if len(lasts) == 1 else "share of the run's steps, %")
    axes.set_title("hard loss, nats/token", loc="left", fontsize=10, color=INKS["muted"][0])


def _thin(log: TrainingLog) -> TrainingLog:
    """Return a curve of at most _CURVE_POINTS points, each the mean of equally many logged ones."""
    size = math.ceil(len(log.steps) / _CURVE_POINTS)
    blocks = [slice(start, start + size) for start in range(0, len(log.steps), size)]
    means = tuple(sum(log.hard_loss[b]) / len(log.hard_loss[b]) for b in blocks)
    return TrainingLog(tuple(log.steps[b][-1] for b in blocks), means)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean over a twentieth of the curve, centred: it never lags."""
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
