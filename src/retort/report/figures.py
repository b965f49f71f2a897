"""Figures of runs: held-out loss and KL, reliability, and loss over cost."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from retort.evaluation.intervals import Estimate
from retort.evaluation.records import Scorecard
from retort.report.records import Record, find_teachers, name_teacher
from retort.report.svg import INKS, PANEL_INCHES, Draw, find_style, finish_axes, render_svg

# Behind text, so that no line runs through a word.
_HALO: dict[str, Any] = {"facecolor": INKS["ground"][0], "edgecolor": "none", "pad": 1.2}
_TEACHER_LINE: dict[str, Any] = {
    "color": INKS["ink"][0],
    "linewidth": 1.3,
    "linestyle": (0, (4, 3)),
}


def draw_comparison(group: Sequence[Record], styles: Sequence[int], *, key: str) -> list[str]:
    """Return the held-out loss of the runs of a group, and their KL to the teacher if defined, an SVG each.

    `styles` are the runs' places in the report. `key` must be unique in the page.
    """
    height = 0.95 + 0.42 * len(group)
    return [
        render_svg(draw, (PANEL_INCHES, height), label=label, key=f"{key}{number}")
        for number, (label, draw) in enumerate(_comparison_panels(group, styles))
    ]


def _comparison_panels(group: Sequence[Record], styles: Sequence[int]) -> list[tuple[str, Draw]]:
    """Return (label, drawing) of the losses, and of KL if any run has it."""
    names = [r.name for r in group]

    def draw_losses(axes: Axes) -> None:
        _draw_dots(axes, names, styles, [r.loss for r in group], teachers=_teacher_losses(group))
        axes.set_xlabel("held-out loss, nats/token")

    def draw_divergences(axes: Axes) -> None:
        _draw_dots(axes, names, styles, [r.kl_to_teacher for r in group], from_zero=True)
        axes.set_xlabel("KL to teacher, nats/token")

    panels: list[tuple[str, Draw]] = [("held-out loss of each run", draw_losses)]
    if any(r.kl_to_teacher is not None for r in group):
        panels.append(("KL to the teacher of each run", draw_divergences))
    return panels


def _teacher_losses(group: Sequence[Record]) -> list[float]:
    return [t.teacher_loss for t in find_teachers(group) if t.teacher_loss is not None]


def _draw_dots(
    axes: Axes,
    names: Sequence[str],
    styles: Sequence[int],
    values: Sequence[float | None],
    *,
    teachers: Sequence[float] = (),
    from_zero: bool = False,
) -> None:
    """Draw a dot per run below its name, with a stem if the axis begins at zero."""
    known = [v for v in values if v is not None] + list(teachers)
    low, high = (0.0 if from_zero else min(known)), max(known)
    span = max(high - low, 0.02)  # so that smaller differences look small
    axes.set_xlim(low - (0 if from_zero else 0.08 * span), high + 0.25 * span)
    axes.set_ylim(len(names) - 0.55, -0.8)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    left = axes.get_yaxis_transform()
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        colour, marker, _ = find_style(styles[row])
        axes.text(0.01, row - 0.24, _clip(name), transform=left, va="bottom", bbox=_HALO)
        if value is None:
            axes.text(0.01, row, "not defined", transform=left, va="center", color=INKS["muted"][0])
            continue
        if from_zero:
            axes.hlines(row, 0, value, color=colour, linewidth=2)
        point: dict[str, Any] = {"marker": marker, "markersize": 8, "linestyle": "none"}
        axes.plot([value], [row], color=colour, clip_on=False, **point)
        axes.annotate(
            f"{value:.3f}",
            (value, row),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            bbox=_HALO,
        )
    for level, loss in enumerate(teachers):
        _draw_teacher(axes, loss, level=level, is_left=loss < low + span / 2)


def _draw_teacher(axes: Axes, loss: float, *, level: int, is_left: bool) -> None:
    """Draw a teacher's loss as a line with its value above; `level` stacks the values of several teachers."""
    axes.axvline(loss, zorder=1, **_TEACHER_LINE)  # below the names of the runs
    axes.annotate(
        f"teacher {loss:.3f}",
        (loss, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-3 if is_left else 3, 3 + 12 * level),
        textcoords="offset points",
        ha="left" if is_left else "right",
    )


def _clip(name: str, *, longest: int = 44) -> str:
    """Return a name that fits in a figure; the tables show it in full."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def draw_reliability(
    group: Sequence[Record], styles: Sequence[int], *, key: str
) -> list[tuple[str, str]]:
    """Return (name, SVG) of each model, teachers first: accuracy over confidence, with the intervals of the bins."""
    teachers = find_teachers(group)
    cards: list[tuple[str, int | None, Scorecard]] = [
        (name_teacher(t, teachers), None, t.teacher_card) for t in teachers if t.teacher_card
    ]
    cards += [(r.name, style, r.card) for r, style in zip(group, styles, strict=True)]
    return [
        (
            name,
            render_svg(
                partial(_draw_reliability, card=card, style=style),
                (2.9, 2.6),
                label="accuracy over confidence",
                key=f"{key}{number}",
            ),
        )
        for number, (name, style, card) in enumerate(cards)
        if card.reliability
    ]


def _draw_reliability(axes: Axes, card: Scorecard, style: int | None) -> None:
    """Draw one model's bins; the size of a dot is its share of positions. Below the diagonal is overconfident."""
    colour, marker, _ = (INKS["ink"][0], "o", "-") if style is None else find_style(style)
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
    axes.set_xlabel("confidence, %")
    finish_axes(axes, "accuracy, %")


def draw_costs(group: Sequence[Record], styles: Sequence[int], *, key: str) -> list[str]:
    """Return held-out loss over cost, an SVG each for stored bytes of the teacher and for training time.

    Empty for a single run.
    """
    if len(group) < 2:
        return []
    losses = [record.card.metrics["loss"] for record in group]
    seconds = [record.training_seconds for record in group]
    unit, size = ("seconds", 1) if max(seconds) < 120 else ("minutes", 60)
    panels: list[tuple[str, Sequence[float | None]]] = [
        ("stored teacher, bytes/token (0: text only)", [_stored_bytes(r) for r in group]),
        (f"training time, {unit}", [second / size for second in seconds]),
    ]
    if not any(panels[0][1]):
        del panels[0]
    teachers = _teacher_losses(group)
    return [
        render_svg(
            partial(
                _draw_costs,
                costs=costs,
                losses=losses,
                styles=styles,
                teachers=teachers,
                label=label,
            ),
            (PANEL_INCHES, 3.1),
            label=f"held-out loss over {label}",
            key=f"{key}{number}",
        )
        for number, (label, costs) in enumerate(panels)
    ]


def _stored_bytes(record: Record) -> float | None:
    """Return the bytes per token that a run reads of its teacher: 0 for text only, None for a live teacher."""
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
    """Draw each run's loss, with its interval, over its cost; lower and further left is better."""
    known = [x for x in costs if x is not None]
    for index, (cost, loss, style) in enumerate(zip(costs, losses, styles, strict=True)):
        if cost is None:
            continue
        colour, marker, _ = find_style(style)
        # Runs of one cache cost the same: shifted by a few points, their intervals do not overlap.
        shift = 4 * (index - (len(costs) - 1) / 2) if len(costs) <= 8 else 0
        at = offset_copy(axes.transData, axes.get_figure(root=True), x=shift, units="points")
        if loss.ends:
            axes.plot([cost, cost], loss.ends, color=colour, linewidth=1.4, transform=at)
        axes.plot(
            [cost], [loss.value], color=colour, marker=marker, markersize=7, ls="none", transform=at
        )
    levels = [*teachers, *(end for loss in losses for end in loss.ends or (loss.value,))]
    low, high = min(levels), max(levels)
    margin = 0.08 * max(high - low, 0.02)
    axes.set_ylim(low - margin, high + margin)
    for level in teachers:
        axes.axhline(level, **_TEACHER_LINE)
    axes.set_xlim(-0.04 * max(known), 1.08 * max(known))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)
    finish_axes(axes, "held-out loss, nats/token")
