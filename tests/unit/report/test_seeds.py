"""Means over seeds: which runs are averaged, and how often their intervals contain the truth."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retort.evaluation.intervals import Estimate
from retort.report.comparisons import find_best
from retort.report.findings import describe_next_best, describe_outcome
from retort.report.page import make_report
from retort.report.runs import get_estimate
from retort.report.seeds import average, compare_means, compute_share, student_quantile
from support.reports import compare, find_all_warnings, find_table, summarise, write_run


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
    paths = write_sweep(tmp_path)
    for order in (paths, paths[::-1]):
        settings = compare(order).settings
        assert dict(settings.seeds) == {"other": 1, "soft-temperature_2": 3, "hard": 3}
        assert list(settings.index) == ["other", "soft-temperature_2", "hard"]  # by their mean loss
        loss, margin = (
            get_estimate(settings.loc["soft-temperature_2"], n) for n in ("loss", "margin")
        )
        assert loss and margin
        half = 4.3027 * 0.01 / 3**0.5  # the deviation of 3.20, 3.21, 3.22 is 0.01
        assert [loss.value, loss.high] == pytest.approx([3.21, 3.21 + half])
        # Against each seed's own baseline: -0.30, -0.31, -0.32.
        assert [margin.value, margin.low] == pytest.approx([-0.31, -0.31 - half])
        assert settings.perplexity["soft-temperature_2"] == pytest.approx(np.exp(3.21))
        assert pd.isna(settings.margin["hard"])
        share = get_estimate(settings.loc["soft-temperature_2"], "distance_closed")
        assert share and share.low and share.low > 0.3  # the teacher's loss is 2.752
        assert share.value == pytest.approx(0.31 / (3.52 - 2.752))


def test_a_mean_over_seeds_has_a_margin_only_if_each_seed_has_a_baseline(tmp_path: Path) -> None:
    paths = write_sweep(tmp_path)[1:]  # no cross-entropy of seed 0
    assert pd.isna(compare(paths).settings.margin["soft-temperature_2"])
    assert (
        "No margin for soft-temperature_2-seed_0: no matching cross-entropy run; add one with training.seed: 0 ("
        in (find_all_warnings(paths))
    )


def test_one_seed_has_no_mean_and_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a", 0), write(tmp_path, "b", 0)]
    assert dict(compare(paths).settings.seeds) == {"a": 1, "b": 1}
    paths.append(write(tmp_path, "c", 1))
    assert dict(compare(paths).settings.seeds) == {"a ... c": 2, "b": 1}


def test_the_outcome_is_of_means_over_seeds_and_says_so(tmp_path: Path) -> None:
    """A run of a lucky seed is no result: its own seeds say that the margin may be zero."""
    paths = [write(tmp_path, f"hard-seed_{s}", s, "output", loss=3.5) for s in range(3)]
    losses = (3.26, 3.9, 2.9)  # the second seed lost by more than the first won
    paths += [write(tmp_path, f"soft-seed_{s}", s, loss=x) for s, x in enumerate(losses)]
    found = compare(paths)
    outcome = describe_outcome(found, found.settings)
    assert outcome.startswith(
        "Distillation did not clearly beat cross-entropy: of the distilled runs, soft (mean of 3 seeds) has the lowest "
        "held-out loss, 3.353, not clearly different (-0.147; 95 % over seeds: -1.405 to +1.112) from cross-entropy "
        "(hard, 3.500)"
    )
    assert "soft-seed" not in outcome and find_best(found, found.settings, "loss") is None
    one = compare([paths[0], paths[5]])
    assert describe_outcome(one, one.settings).startswith("soft-seed_2 (one seed): ")
    assert "With one seed, the intervals of hard-seed_0 account" in find_all_warnings(
        paths[:1] + paths[4:]
    )


def test_settings_whose_seeds_overlap_are_tied(tmp_path: Path) -> None:
    def write_three(name: str, losses: tuple[float, ...], **training: Any) -> list[Path]:
        return [
            write(tmp_path, f"{name}-seed_{s}", s, loss=x, **training) for s, x in enumerate(losses)
        ]

    paths = write_three("a", (3.20, 3.22, 3.24), learning_rate=0.1)
    paths += write_three("b", (3.23, 3.21, 3.25), learning_rate=0.2)
    paths += write_three("c", (3.40, 3.42, 3.44), learning_rate=0.3)
    found = compare(paths)
    assert describe_outcome(found, found.settings).startswith(
        "a (mean of 3 seeds; tied with b): held-out loss 3.220"
    )
    assert describe_next_best(found, found.settings) == (
        "a is tied with b (+0.010; 95 % over seeds: -0.040 to +0.060): this difference may be chance."
    )
    assert find_best(found, found.settings, "loss") is None
    clear = compare(paths[:3] + paths[6:])
    assert describe_next_best(clear, clear.settings) == (
        "a is 0.200 (95 % over seeds: 0.200 to 0.200) below the next best, c (3.420)."
    )
    assert find_best(clear, clear.settings, "loss") == "a"
    # One seed of c tells nothing about its other seeds, however narrow its interval over documents is.
    single = write(tmp_path, "d", 0, learning_rate=0.4, loss=Estimate(3.40, 3.39, 3.41))
    mixed = compare([*paths[:3], single])
    assert find_best(mixed, mixed.settings, "loss") is None


@pytest.mark.slow
def test_means_are_in_the_summary_and_on_the_page(tmp_path: Path) -> None:
    paths = write_sweep(tmp_path)
    rows = {line.split()[0]: line.split()[1:4] for line in find_table(summarise(paths))}
    assert rows["soft-temperature_2"] == ["3.210\u00b10.025", "-0.310\u00b10.025", "3"]
    assert rows["other"] == ["3.200", "no", "match"]
    make_report(paths, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Each run</h2>" in page and ">soft-temperature_2-seed_1<" in page
    make_report(paths[:1], tmp_path / "one.html")
    assert "Small points: seeds" not in (tmp_path / "one.html").read_text()


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
    found = [average(pd.Series(rng.normal(5.0, 2.0, size=3))).ends for _ in range(4000)]
    share = np.mean([ends[0] <= 5.0 <= ends[1] for ends in found if ends])
    assert abs(share - 0.95) < 0.012  # 3.5 standard errors


def test_differences_of_equal_seeds_are_paired_and_of_others_are_not() -> None:
    noise = np.random.default_rng(0).normal(0, 0.5, 4)  # of the seed, the same for both settings
    one, other = pd.Series(3 + noise), pd.Series(3.1 + noise)
    paired, welch = (
        compare_means(one, other),
        compare_means(one, other.rename(lambda seed: seed + 4)),
    )
    assert paired.value == pytest.approx(-0.1) and welch.value == pytest.approx(-0.1)
    assert paired.high == pytest.approx(-0.1) and welch.high is not None and welch.high > 0.1
    assert compare_means(one, other[:1]).ends is None


@pytest.mark.parametrize("sizes", [(3, 3), (3, 6)])
def test_the_interval_of_a_difference_contains_it_as_often_as_stated(
    sizes: tuple[int, int],
) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        one, other = (
            pd.Series(rng.normal(m, s, n)) for m, s, n in zip((5, 4), (1, 3), sizes, strict=True)
        )
        found.append(compare_means(one, other).ends)
    share = np.mean([ends[0] <= 1 <= ends[1] for ends in found if ends])
    assert (
        share > 0.95 - 0.017
    )  # 3.5 standard errors; rounding the degrees of freedom down widens it


def test_a_share_of_a_gain_needs_a_gain_that_is_clear() -> None:
    gains, gaps = pd.Series([0.09, 0.10, 0.11]), pd.Series([0.19, 0.20, 0.21])
    share = compute_share(gains, gaps)
    assert share is not None and share.ends is not None
    assert share.value == pytest.approx(0.5) and 0.4 < share.ends[0] < 0.5 < share.ends[1] < 0.6
    assert compute_share(gains, pd.Series([0.01, -0.05, 0.02])) is None  # 100 to -1,000 % of it
    assert (
        compute_share(pd.Series([-0.5, -0.4, -0.6]), gaps) is None
    )  # a loss is no share of a gain
    assert compute_share(pd.Series([0.1, -0.1, 0.2]), gaps) is None
