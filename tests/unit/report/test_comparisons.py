"""Margins and their intervals, from the losses on each document."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retort.report.comparisons import find_best
from retort.report.findings import describe_outcome
from retort.report.page import make_report
from retort.report.runs import get_estimate
from support.records import make_estimate, make_manifest
from support.reports import (
    compare,
    find_all_warnings,
    find_rows,
    render_page,
    summarise,
    write_demo,
    write_measured,
    write_run,
)


def test_a_margin_has_the_interval_of_the_same_documents(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1})
    found = compare(paths)
    margin = get_estimate(found.runs.loc["hybrid"], "margin")
    assert margin is not None and margin.ends is not None
    low, high = margin.ends
    assert margin.value == pytest.approx(found.runs.loss["hybrid"] - found.runs.loss["output"])
    assert -0.11 < low < margin.value < high < -0.09  # although documents differ by 0.4
    assert re.fullmatch(r"-0\.\d{3}±0\.00\d", find_rows(paths)["hybrid"]["margin"])
    message = describe_outcome(found, found.settings)
    interval = r"\(95 % over documents: 0\.09\d to 0\.10\d\)"
    assert re.search(rf"hybrid \(one seed\): .* {interval} below cross-entropy", message), message


def test_a_margin_whose_interval_contains_zero_is_no_gain(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.004}, noise=0.05)
    found = compare(paths)
    message = describe_outcome(found, found.settings)
    assert "did not clearly beat cross-entropy" in message and "not clearly different" in message
    assert 'class="better"' not in render_page(tmp_path, paths)


def test_the_share_of_the_gap_to_full_distillation_is_shown(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.15, "full": 0.2})
    runs = compare(paths).runs
    assert runs.full["hybrid"] == "full"
    share = get_estimate(runs.loc["hybrid"], "gap_closed")
    assert share is not None and share.ends is not None
    gains = runs.loss["output"] - runs.loss
    assert share.value == pytest.approx(gains["hybrid"] / gains["full"])
    assert 0.7 < share.ends[0] < 0.75 < share.ends[1] < 0.8
    summary = " ".join(summarise(paths).split())
    assert re.search(r"hybrid closes 7\d % \(95 % over documents: 7\d to 7\d\) of the gap", summary)
    page = render_page(tmp_path, paths)
    assert "gap closed, %" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert float(rows[1]["gap_closed"]) == share.value
    assert float(rows[1]["margin_low"]) < float(rows[1]["margin"]) < float(rows[1]["margin_high"])
    assert compare(paths[:2]).runs.full.isna().all()
    assert "gap closed, %" not in render_page(tmp_path / "two", paths[:2])


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 2.0},
        {"seed": 1},
        {"cache__tail_mass": 0.01},
        {"trained": {"training": {"divergence": "reverse_kl"}}},
        {"trained": {"training": {"learning_rate": 0.5}}},
    ],
)
def test_full_distillation_is_under_the_same_conditions(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    full = {"cache__tail_mass": 0.0, "temperature": 1.0}
    paths = [
        write_run(tmp_path, "hybrid", temperature=1.0),
        write_run(tmp_path, "full", "logit", **(full | changes)),
    ]
    assert pd.isna(compare(paths).runs.full["hybrid"])


OTHER_TEACHERS = [
    {"teacher_weights": "beef"},
    {"trained": {"training": {"alpha": 0.5}, "teacher": {"revision": "v2"}}},
    {"trained": {"training": {"alpha": 0.5}, "teacher": {"dtype": "bfloat16"}}},
    {"trained": {"training": {"alpha": 0.5}, "teacher": {"attn_implementation": "eager"}}},
]


@pytest.mark.parametrize("changes", OTHER_TEACHERS)
def test_teachers_of_one_name_that_differ_are_not_one(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    full: dict[str, Any] = {"cache__tail_mass": 0.0, "kind": "logit"}
    paths = [
        write_run(tmp_path, "hybrid"),
        write_run(tmp_path, "again", seed=1, **changes),
        write_run(tmp_path, "full", **(full | changes)),
        write_run(tmp_path, "output", "output"),
    ]
    found = compare(paths)
    assert found.settings.seeds.max() == 1
    assert pd.isna(found.runs.full["hybrid"])
    assert found.runs.baseline["hybrid"] == found.runs.baseline["full"] == "output"
    paths = [
        write_run(tmp_path / "same", name, seed=seed, **changes)
        for seed, name in enumerate(("hybrid-seed_0", "hybrid-seed_1"))
    ]
    assert compare(paths).settings.seeds["hybrid"] == 2


def test_a_student_with_other_content_is_another_one(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path, "output", "output", student="0123456789ab"),
        write_run(tmp_path, "hybrid"),
        write_run(tmp_path, "again", seed=1, student="0123456789ab"),
    ]
    found = compare(paths)
    assert found.runs.baseline.isna().all() and found.settings.seeds.max() == 1
    assert "one with the same student." in find_all_warnings(paths[:2])
    assert (
        compare([*paths, write_run(tmp_path, "plain", "output")]).runs.baseline["hybrid"] == "plain"
    )


def test_the_share_of_the_distance_to_the_teacher_is_shown(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.2, "hybrid": 0.35, "worse": 0.1})
    for path in paths:  # a teacher that is 0.3 below cross-entropy on every document
        file = path.with_name("documents.csv")
        table, plain = pd.read_csv(file), pd.read_csv(paths[0].with_name("documents.csv"))
        table["teacher_loss"] = plain.loss - 0.3 * plain.positions
        table.to_csv(file, index=False)
    runs = compare(paths).runs
    share = get_estimate(runs.loc["hybrid"], "distance_closed")
    assert share is not None and share.ends is not None
    assert share.value == pytest.approx((runs.loss["output"] - runs.loss["hybrid"]) / 0.3)
    assert share.ends[0] < share.value < share.ends[1]
    assert pd.isna(runs.distance_closed["worse"])  # a loss is no share
    assert find_rows(paths)["hybrid"]["distance_closed"] == "50"
    summary = summarise(paths, 120)
    assert "closed %" in summary and "share of the distance" in summary
    assert "distance to teacher closed, %" in render_page(tmp_path, paths)
    assert "closed %" not in summarise(write_demo(tmp_path / "single"))


def test_a_share_is_shown_only_where_both_gains_are_clear(tmp_path: Path) -> None:
    for number, gains in enumerate([(0.15, 0.002), (-0.4, 0.2), (0.002, 0.2)]):
        gains_of = dict(
            zip(("output", "hybrid", "full"), (0.5, *(0.5 + g for g in gains)), strict=True)
        )
        paths = write_measured(tmp_path / str(number), gains_of, noise=0.05)
        runs = compare(paths).runs
        assert runs.full["hybrid"] == "full" and pd.isna(runs.gap_closed["hybrid"])
        assert "of the gap" not in summarise(paths)


def test_a_cache_whose_tail_was_not_measured_is_not_the_whole_distribution(tmp_path: Path) -> None:
    unmeasured = make_manifest().model_copy(update={"fidelity": None})
    paths = [
        write_run(tmp_path, "hybrid"),
        write_run(tmp_path, "top", "logit", cache=unmeasured),
        write_run(tmp_path, "live", "logit", cache=None),
    ]
    assert compare(paths).runs.full["hybrid"] == "live"
    assert compare(paths[:2]).runs.full.isna().all()


def test_runs_are_compared_by_their_losses_document_by_document(tmp_path: Path) -> None:
    found = compare(write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "other": 0.05}))
    assert find_best(found, found.settings, "loss") == "hybrid"
    paths = write_measured(tmp_path / "b", {"output": 0.0, "hybrid": 0.1, "other": 0.1})
    found = compare(paths)
    assert find_best(found, found.settings, "loss") is None


def test_in_other_metrics_the_best_runs_interval_must_not_overlap(tmp_path: Path) -> None:
    def agreeing(name: str, value: float) -> Path:
        return write_run(tmp_path, name, validation__agreement=make_estimate(value, width=0.01))

    paths = [agreeing("a", 0.40), agreeing("b", 0.43), agreeing("c", 0.415)]
    found = compare(paths)
    assert find_best(found, found.settings, "agreement") is None
    assert find_best(found, found.settings.drop("c"), "agreement") == "b"
    assert find_best(found, found.settings.loc[["a"]], "agreement") is None


def test_different_documents_are_refused(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1})
    file = paths[1].with_name("documents.csv")
    file.write_text(file.read_text().replace("\n7,", "\n77,"))
    with pytest.raises(ValueError, match="have different documents"):
        make_report(paths, tmp_path / "report.html")


def test_documents_of_another_run_are_refused_and_missing_ones_warned_of(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "other": 0.3})
    files = [path.with_name("documents.csv") for path in paths]
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(
        ValueError, match=r"gives a loss of 2\.\d+, but metrics\.json .*another run's"
    ):
        make_report(paths, tmp_path / "report.html")
    files[1].unlink()
    text = find_all_warnings(paths)
    assert "No documents.csv beside the metrics of hybrid: their margins have no intervals" in text


def test_csv_keeps_all_digits_and_leaves_empty_what_is_not_defined(tmp_path: Path) -> None:
    paths = [*write_demo(tmp_path), write_run(tmp_path, "x", validation__loss=3.2130000001)]
    make_report(paths, tmp_path / "report.html")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert float(rows[3]["margin"]) == 3.2130000001 - 3.294
    assert rows[0]["margin"] == "" and rows[0]["cache_dial"] == ""
    assert rows[1]["cache_fidelity_kl"] == "3.1e-05"
