"""What all benchmarks share: the command line, progress lines, opponents that cannot run here, figures."""

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

REPOSITORY = Path(__file__).resolve().parents[1]


class UnavailableError(Exception):
    """An opponent cannot run here. The message says why, and how to install it."""


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m module`, whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def log(line: str) -> None:
    """Print a progress line with the processor seconds so far."""
    print(f"[{time.process_time():6.0f} s CPU] {line}", flush=True)


def format_not_run(name: str, reason: str, *, width: int) -> str:
    """Return the line of a table for an opponent that did not run; the name is padded to `width`."""
    return f"{name:{width}}not run ({reason})"


def import_opponent(module: str, *, install: str) -> Any:
    """Import an opponent's module. Raises UnavailableError with `install` when it or what it imports is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise UnavailableError(f"{missing} cannot be imported; {install}") from error


def checkout_of(repository: str, *, holds: str) -> Callable[[str], Path]:
    """Return the argparse type of a checkout of github.com/`repository`, which has a folder `holds`."""

    def convert(text: str) -> Path:
        if not (Path(text) / holds).is_dir():
            message = f"{text!r} is not a checkout of {repository}: it has no folder {holds}"
            raise argparse.ArgumentTypeError(message)
        return Path(text)

    return convert


def require_checkout(checkout: Path | None, *, repository: str, flag: str) -> Path:
    """Return the checkout. Raises UnavailableError with what to do when none was given."""
    if checkout is None:
        raise UnavailableError(f"git clone https://github.com/{repository} and give {flag} PATH")
    return checkout


def set_figure_style() -> None:
    """Make figures small in print, and SVG files the same from run to run."""
    matplotlib.rcParams.update({"svg.hashsalt": "retort", "font.size": 9})


def label_log_axis(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def finish_panel(panel: Axes) -> None:
    """Add grid and legend."""
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; an SVG file holds no date."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
