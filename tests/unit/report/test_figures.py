"""Figures and their colours."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retort.report.comparisons import Comparisons, find_sweeps
from retort.report.figures import Figures
from retort.report.runs import find_folder
from retort.report.svg import INKS, SERIES
from support.records import make_manifest
from support.reports import compare, render_page, write_demo, write_run, write_trained


def make_figures(found: Comparisons) -> Figures:
    styles = {name: index for index, name in enumerate(found.settings.index)}
    return Figures(found, found.settings, styles, key="k")


def test_costs_are_drawn_for_two_or_more_runs_and_bytes_only_for_stored_teachers(
    tmp_path: Path,
) -> None:
    found = compare(write_demo(tmp_path))
    bytes_used, times = make_figures(found).draw_costs()
    assert "stored teacher, bytes/position (0: text only)" in bytes_used
    assert "training time, seconds" in times
    assert replace(make_figures(found), group=found.settings[:1]).draw_costs() == []
    paths = [
        write_run(tmp_path / "b", kind, kind, cache=None, training_seconds=900.0)
        for kind in ("output", "logit", "hybrid")
    ]
    (alone,) = make_figures(compare(paths)).draw_costs()
    assert "training time, minutes" in alone


def write_sweep(folder: Path) -> list[Path]:
    """Write cross-entropy, and hybrid at three rates and two temperatures, from two seeds each."""
    paths = []
    for rate in (0.001, 0.004, 0.02):
        for seed in (0, 1):
            options = {"learning_rate": rate, "seed": seed}
            paths.append(write_seed(folder, f"hard-rate_{rate}", "output", 3.5, **options))
            for temperature in (1.0, 2.0):
                name = f"soft-rate_{rate}-temperature_{temperature:g}"
                paths.append(
                    write_seed(folder, name, "hybrid", 3.2, temperature=temperature, **options)
                )
    return paths


def write_seed(folder: Path, name: str, kind: str, loss: float, **training: Any) -> Path:
    values = {key: training[key] for key in ("temperature", "seed") if key in training}
    loss += 0.01 * training["seed"]
    name = f"{name}-seed_{training['seed']}"
    return write_run(
        folder, name, kind, validation__loss=loss, trained={"training": training}, **values
    )


def test_each_key_that_differs_alone_is_a_sweep_with_a_line_for_each_setting_of_the_rest(
    tmp_path: Path,
) -> None:
    found = compare(write_sweep(tmp_path))
    sweeps = dict(find_sweeps(found, found.settings))
    assert list(sweeps) == ["training.learning_rate", "training.temperature"]  # and not the seed
    rates = sweeps["training.learning_rate"]
    assert sorted(set(rates.x)) == [0.001, 0.004, 0.02]
    assert set(rates.line) == {"output", "hybrid, temperature 1", "hybrid, temperature 2"}
    key, svg, legend = make_figures(found).draw_sweeps()[0]
    assert key == "training.learning_rate" and svg.count(">0.004<") == 1
    assert [name for name, _ in legend][2] == "output"
    # Cross-entropy has no temperature: each line has its own as a reference.
    temperatures = sweeps["training.temperature"]
    assert set(temperatures.line) == {
        f"hybrid, learning_rate {rate}" for rate in (0.001, 0.004, 0.02)
    }
    assert not set(temperatures.index) & {"hard-rate_0.001", "hard-rate_0.004", "hard-rate_0.02"}


def test_runs_that_differ_in_two_keys_are_no_sweep(tmp_path: Path) -> None:
    paths = [
        write_trained(tmp_path, "a", learning_rate=0.1, batch_size=4),
        write_trained(tmp_path, "b", learning_rate=0.2, batch_size=8),
    ]
    found = compare(paths)
    assert find_sweeps(found, found.settings) == []


def test_the_size_of_the_cache_can_be_swept(tmp_path: Path) -> None:
    caches = [make_manifest(top_k=k, bytes_per_position=2.0 * k) for k in (8, 64)]
    paths = [write_run(tmp_path, f"k_{c.top_k}", "logit", cache=c) for c in caches]
    found = compare([*paths, write_run(tmp_path, "output", "output")])
    ((key, points),) = find_sweeps(found, found.settings)
    assert key == "cache.top_k" and dict(points.x) == {"k_8": 8, "k_64": 64}


def test_a_series_has_the_colour_of_its_setting_and_not_of_its_seed(tmp_path: Path) -> None:
    found = compare(write_sweep(tmp_path)[:6])  # three settings, two seeds each
    assert len(found.settings) == 3
    curves, _ = make_figures(found).draw_curves()
    assert set(re.findall(r"--series(\d)", curves)) == {"0", "1", "2"}


def test_the_held_out_loss_during_training_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    paths = write_sweep(tmp_path)[:4]
    assert make_figures(compare(paths)).draw_watched() == []
    for path in paths[:3]:
        log = find_folder(path) / "training_log.csv"
        head, *rows = log.read_text().splitlines()
        watched = [
            f"{row},{5 - number / 40 if number % 8 == 7 else ''}" for number, row in enumerate(rows)
        ]
        log.write_text("\n".join([f"{head},eval_loss", *watched]) + "\n")
    found = compare(paths)
    assert {name: len(log) for name, log in found.results.watched.items()} == dict.fromkeys(
        found.runs.index[:3], 5
    )
    assert list(found.results.watched[found.runs.index[0]].step) == [80, 160, 240, 320, 400]
    (drawn,) = make_figures(found).draw_watched()
    assert "held-out loss, nats/token" in drawn
    assert set(re.findall(r"--series(\d)", drawn)) == {"0", "1", "2"}, "a setting each"
    page = render_page(tmp_path, paths)
    assert page.count("held-out loss during training") and "then hard loss on training text" in page


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
