"""Figures and their colours."""

from dataclasses import replace
from pathlib import Path

import pytest

from retort.report.figures import draw_costs
from retort.report.records import load_metrics
from retort.report.svg import INKS, SERIES
from support.reports import write_demo


def test_costs_are_drawn_for_two_or_more_runs_and_bytes_only_for_stored_teachers(
    tmp_path: Path,
) -> None:
    records = load_metrics(write_demo(tmp_path))
    styles = range(len(records))
    bytes_used, times = draw_costs(records, styles, key="k")
    assert "stored teacher, bytes/token (0: text only)" in bytes_used
    assert "training time, seconds" in times
    assert draw_costs(records[:1], styles, key="k") == []
    live = [replace(record, cache=None, training_seconds=900.0) for record in records]
    (alone,) = draw_costs(live, styles, key="k")
    assert "training time, minutes" in alone


def contrast(one: str, other: str) -> float:
    """Return the contrast of two #rrggbb colours as WCAG 2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_contrast_with_the_background(mode: int) -> None:
    ground = INKS["ground"][mode]
    assert all(contrast(INKS[name][mode], ground) >= 4.5 for name in ("ink", "muted"))
    assert all(contrast(pair[mode], ground) >= 3 for pair in SERIES)
