"""Means over seeds: which runs are averaged, and how often the interval contains the mean."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retort.report.page import make_report, render_summary
from retort.report.records import load_metrics
from retort.report.seeds import average, average_seeds, student_quantile
from support.reports import write_run


def write(folder: Path, name: str, seed: int, kind: str = "logit", **training: Any) -> Path:
    loss = training.pop("loss", 3.2 + 0.01 * seed)
    config = {"training": {"seed": seed, "learning_rate": 1e-3} | training, "student": {}}
    return write_run(
        folder, name, kind, seed=seed, validation__loss=loss, trained={"commit": name} | config
    )


def write_sweep(folder: Path) -> list[Path]:
    hard = [write(folder, f"hard-seed_{s}", s, "output", loss=3.5 + 0.02 * s) for s in range(3)]
    soft = [write(folder, f"soft-temperature_2-seed_{s}", s) for s in range(3)]
    return [*hard, *soft, write(folder, "other", 0, learning_rate=2e-3)]


def test_runs_that_differ_in_their_seed_alone_are_averaged(tmp_path: Path) -> None:
    hard, soft = average_seeds(load_metrics(write_sweep(tmp_path)))
    assert (hard.name, soft.name) == ("hard", "soft-temperature_2")
    assert [r.seed for r in soft.runs] == [0, 1, 2]
    loss, margin = soft.means["loss"], soft.means["margin"]
    half = 4.3027 * 0.01 / 3**0.5  # the deviation of 3.20, 3.21, 3.22 is 0.01
    assert [loss.value, loss.high] == pytest.approx([3.21, 3.21 + half])
    # Against each seed's own baseline: -0.30, -0.31, -0.32.
    assert [margin.value, margin.low] == pytest.approx([-0.31, -0.31 - half])
    assert "margin" not in hard.means


def test_one_seed_has_no_mean_and_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a", 0), write(tmp_path, "b", 0)]
    assert average_seeds(load_metrics(paths)) == []
    (mean,) = average_seeds(load_metrics([*paths, write(tmp_path, "c", 1)]))
    assert mean.num_seeds == 2


@pytest.mark.slow
def test_means_are_in_the_summary_and_on_the_page(tmp_path: Path) -> None:
    paths = write_sweep(tmp_path)
    summary = " ".join(render_summary(load_metrics(paths), report_path=tmp_path / "r.html").split())
    assert (
        "soft-temperature_2, mean of 3 seeds: held-out loss 3.210±0.025, margin -0.310±" in summary
    )
    make_report(paths, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Means over seeds</h2>" in page and ">soft-temperature_2<" in page
    make_report(paths[:1], tmp_path / "one.html")
    assert "Means over seeds</h2>" not in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 30, 200])
def test_the_probability_above_the_quantile_is_a_fortieth(freedom: int) -> None:
    """By numerical integration of the density."""
    quantile = student_quantile(freedom)
    # t = tan(u) maps the infinite tail to a finite range.
    u = np.linspace(np.arctan(quantile), np.pi / 2, 400_001)[:-1]
    density = (1 + np.tan(u) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(u) ** 2
    whole = np.linspace(-np.pi / 2, np.pi / 2, 800_001)[1:-1]
    all_of_it = (1 + np.tan(whole) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(whole) ** 2
    share = np.trapezoid(density, u) / np.trapezoid(all_of_it, whole)
    assert share == pytest.approx(0.025, rel=2e-3)


def test_the_interval_of_few_seeds_contains_the_mean_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    found = [average(rng.normal(5.0, 2.0, size=3).tolist()).ends for _ in range(4000)]
    share = np.mean([ends[0] <= 5.0 <= ends[1] for ends in found if ends])
    assert abs(share - 0.95) < 0.012  # 3.5 standard errors
