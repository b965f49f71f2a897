"""What the cache benchmark prints and draws.

Legend: P positions, V vocabulary.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot

from benchmarks.cache.ours import Ours, make_codec, measure_ours
from benchmarks.common import (
    finish_panel,
    format_not_run,
    label_log_axis,
    save_figure,
    set_figure_style,
)
from benchmarks.distributions.build import Distributions

Curves = dict[str, list[tuple[float, float]]]  # by name: (bytes a position, error)

_NAME_WIDTH = 36
_COLUMNS = {
    "bytes": 8,
    "ids": 7,
    "head KL": 10,
    "shape KL": 10,
    "full KL": 10,
    "sq. error": 10,
    "sum > 1": 9,
    "enc M/s": 8,
    "dec M/s": 8,
    "read": 8,
}
_KLS = ("head_kl", "shape_kl", "full_kl")


def format_heads() -> str:
    """Return the table's first line."""
    return " " * _NAME_WIDTH + "".join(f"{head:>{width}}" for head, width in _COLUMNS.items())


def format_row(name: str, row: dict[str, float], ours: Ours | None = None) -> str:
    """Return a line of the table; speeds are measured of Retort alone."""
    cells = [f"{row['bytes']:.1f}", f"{row['ids']:.1f}"]
    cells += [f"{row[key]:.2e}" if key in row else "-" for key in _KLS]
    cells += [f"{row['squared_error']:.2e}", f"{row['above_one']:.1%}"]
    if ours:
        speeds = (ours.encoded_per_second, ours.decoded_per_second, ours.read_per_second)
        cells += [f"{speed / 1e6:.2f}" for speed in speeds]
    widths = list(_COLUMNS.values())[: len(cells)]
    return f"{name:<{_NAME_WIDTH}}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
    )


def format_opponent_not_run(name: str, reason: str) -> str:
    """Return the line of an opponent that did not run."""
    return format_not_run(name, reason, width=_NAME_WIDTH)


def print_ratios(ours: list[tuple[float, float]], others: Curves, error: str) -> None:
    """Print how many bytes Retort takes for each opponent's error, interpolating its own settings by a power law."""
    sizes, errors = map(np.log, zip(*sorted(ours), strict=True))
    for name, points in others.items():
        for size, theirs in points:
            if not math.exp(errors.min()) <= theirs <= math.exp(errors.max()):
                continue
            mine = math.exp(np.interp(-math.log(theirs), -errors, sizes))
            print(
                f"  {name:{_NAME_WIDTH}} {error} {theirs:.2e}: {size:6.1f} B, Retort {mine:5.1f} B ({size / mine:.1f}x)"
            )


def print_temperatures(data: Distributions) -> None:
    """Print what other temperatures cost, and why samples serve one only."""
    print("\nbytes a position of top_p 0.003 with the tail at temperatures")
    for temperatures in ((1.0,), (1.0, 2.0), (1.0, 2.0, 4.0)):
        stored = measure_ours(data, make_codec("top_p", 0.003, data, temperatures)).stored
        names = ", ".join(f"{t:g}" for t in temperatures)
        print(f"  {names:10} {stored.bytes_per_position:.1f} (top_k: 4 each before zstd)")
    threshold = 0.05
    logprobs_PV = torch.from_numpy(np.array(data.logprobs[:2048]))
    is_tail_PV = logprobs_PV < math.log(threshold)
    sampled_PV = torch.where(is_tail_PV, logprobs_PV, -torch.inf).softmax(dim=-1).nan_to_num()
    for temperature in (1.0, 2.0):
        probs_PV = (logprobs_PV / temperature).softmax(dim=-1)
        tail_PV = torch.where(is_tail_PV, probs_PV, 0.0)
        mass_P1 = tail_PV.sum(dim=-1, keepdim=True)
        bias = (mass_P1 * sampled_PV - tail_PV).abs().sum(dim=-1).mean() / 2
        print(
            f"  sampled {threshold:g} at temperature {temperature:g}: the tail holds {mass_P1.mean():.2f}; samples "
            f"taken at 1 and used at {temperature:g} put {bias:.3f} of the mass on other tokens"
        )


def draw_figure(path: Path, kl: Curves, error: Curves) -> None:
    """Draw bytes against error: truncations by their KL, unbiased methods by their variance."""
    set_figure_style()
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = (
        "KL(teacher || stored), nats, tail by frequency",
        "variance: mean squared error, summed over ids",
    )
    for panel, curves, label in zip(panels, (kl, error), labels, strict=True):
        for (name, points), marker in zip(curves.items(), "os^Dvx*", strict=False):
            style = "-" if name.startswith("Retort") else "none"
            xs, ys = zip(*sorted(points), strict=True)
            panel.plot(xs, ys, marker=marker, linestyle=style, label=name)
        panel.set(xscale="log", yscale="log", xlabel="bytes per position", title=label)
        label_log_axis(panel.xaxis)
        label_log_axis(panel.yaxis)
        finish_panel(panel)
    save_figure(figure, path)
