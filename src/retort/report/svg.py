"""Drawings as SVG for the page, and the colour, marker and dash of each run in all of them.

The text of an SVG is text, and its colours are CSS variables (--ink, --grid, --series0 ...): one drawing serves light
and dark mode. Equal inputs give equal bytes.
"""

import io
import re
from functools import cache
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# (light, dark). Drawings use the light colours; `write_svg` turns those into CSS variables.
INKS = {
    "ground": ("#ffffff", "#14181d"),
    "ink": ("#1a2027", "#e8ebee"),
    "muted": ("#5b6672", "#a3adb8"),
    "grid": ("#dfe3e8", "#363d45"),
}
# Hues after Okabe and Ito, which colour-blind readers can tell apart, at a contrast of 3 or more.
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
_VARIABLES = {light: name for name, (light, _) in INKS.items()}
_VARIABLES |= {light: f"series{index}" for index, (light, _) in enumerate(SERIES)}
_RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "retort",
    "text.parse_math": False,
    "text.color": INKS["ink"][0],
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.formatter.useoffset": False,
    "grid.color": INKS["grid"][0],
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor"), INKS["muted"][0]),
    **dict.fromkeys(("xtick.color", "ytick.color"), INKS["muted"][0]),
}
# Decorates what draws: from the first axes to the text of the SVG.
with_style = matplotlib.rc_context(_RC_PARAMS)


def find_style(index: int) -> tuple[str, str, Any]:
    """Return (colour, marker, dashes) of the run at a place in the report; the first 42 all differ."""
    dashes = _DASHES[index // len(SERIES) % len(_DASHES)]
    return SERIES[index % len(SERIES)][0], _MARKERS[index % len(_MARKERS)], dashes


def make_axes(width: float, height: float) -> Axes:
    """Return the axes of a drawing of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr, call-arg]  # stubs too wide
    return figure.subplots()


def finish_axes(
    axes: Axes, title: str, label: str, limits: tuple[float, float] | None = None
) -> None:
    """Draw the grid below the data, no ticks, the title of the y axis at the top left, and the label of the x axis.

    limits: the ends of the y axis.
    """
    if limits:
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=10, color=INKS["muted"][0])
    axes.set_xlabel(label)


def write_svg(axes: Axes, *, label: str, key: str) -> str:
    """Return a drawing as <svg>: CSS variables for colours, no size, no metadata.

    `key` must be unique in the page: the ids inside the SVG begin with it. Without a `label` it is decoration.
    """
    figure, text = axes.get_figure(root=True), io.StringIO()
    assert figure is not None
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    role = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg {role} viewBox="\1">', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("xlink:href", "href")


@cache  # for all legends: each drawing takes some 20 ms
@with_style
def draw_swatch(style: int) -> str:
    """Return a short piece of a run's curve as SVG, for a legend."""
    axes = make_axes(0.5, 0.16)
    colour, marker, dashes = find_style(style)
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.plot([0, 1], [0, 0], color=colour, linestyle=dashes, linewidth=1.8)
    axes.plot([0.5], [0], color=colour, marker=marker, markersize=6)
    return write_svg(axes, label="", key="swatch")
