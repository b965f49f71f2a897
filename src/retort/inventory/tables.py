"""Tables for the terminal, and sizes and ages in words."""

import shutil
import textwrap
import time
from collections.abc import Sequence

from retort.io.units import format_bytes

_GAP = 2
_LEAST = 36  # columns that the last cell needs beside the others; with fewer it goes below them


def render_table(rows: Sequence[Sequence[str]], *, width: int) -> list[str]:
    """Return lines of at most `width` columns: cells aligned, the last one wrapped beside or below the others."""
    if not rows:
        return []
    *columns, _ = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    indent = 2 + sum(size + _GAP for size in widths)
    longest = max(len(row[-1]) for row in rows)
    is_below = width - indent < max(1, min(_LEAST, longest))
    lines = []
    for *cells, last in rows:
        head = "  " + "".join(
            f"{cell:<{size + _GAP}}" for cell, size in zip(cells, widths, strict=True)
        )
        start = 6 if is_below else indent
        wrapped = textwrap.wrap(last, width - start, break_on_hyphens=False, break_long_words=False)
        if is_below or not wrapped:
            lines += [head.rstrip(), *(" " * start + line for line in wrapped)]
        else:
            lines += [head + wrapped[0], *(" " * start + line for line in wrapped[1:])]
    return lines


def choose_width() -> int:
    """Return the columns of the terminal, from 80 to 120; 100 without one."""
    return min(120, max(80, shutil.get_terminal_size((100, 24)).columns))


def format_size(number: int) -> str:
    """Return a number of bytes in decimal units: 812 B, 3.4 MB, 1.2 TB."""
    return format_bytes(number, unit="B")


def describe_age(changed: float) -> str:
    """Return how long ago a file was written, by this machine's clock; 0 is that of no file."""
    return format_age(time.time() - changed) if changed else "empty"


def format_age(seconds: float) -> str:
    """Return a time span in its largest unit: 40 s, 5 min, 3 h, 12 d, 3 months."""
    value = max(0.0, seconds)
    for unit, size in (("s", 60), ("min", 60), ("h", 48), ("d", 90)):
        if value < size:
            return f"{value:.0f} {unit}"
        value /= 24 if unit == "h" else 60 if unit != "d" else 30.4
    return f"{value:.0f} months"
