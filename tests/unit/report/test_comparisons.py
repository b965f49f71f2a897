"""Margins and their intervals, from the losses on each document."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from retort.report.comparisons import compare_with_baseline, find_best, find_full
from retort.report.findings import describe_outcome
from retort.report.page import make_report, render_summary
from retort.report.records import load_metrics
from retort.report.tables import build_rows
from support.records import make_estimate
from support.reports import (
    MARGIN,
    find_all_warnings,
    render_page,
    write_demo,
    write_measured,
    write_run,
)


def test_a_margin_has_the_interval_of_the_same_documents(tmp_path: Path) -> None:
    records = load_metrics(write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1}))
    found = compare_with_baseline(records[1], records)
    assert found is not None and found.margin.ends is not None
    low, high = found.margin.ends
    assert -0.11 < low < found.margin.value < high < -0.09  # although documents differ by 0.4
    row = build_rows(records)[-1]
    assert re.fullmatch(r"-0\.\d{3}±0\.00\d", row.cells[MARGIN]) and row.is_better
    message = describe_outcome(records)
    assert re.search(r"hybrid: .* \(0\.09\d to 0\.10\d\) below cross-entropy", message), message


def test_a_margin_whose_interval_contains_zero_is_no_gain(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.004}, noise=0.05)
    records = load_metrics(paths)
    assert not build_rows(records)[-1].is_better
    message = describe_outcome(records)
    assert "did not beat cross-entropy" in message and "not clearly different" in message
    assert 'class="better"' not in render_page(tmp_path, paths)


def test_the_share_of_the_gap_to_full_distillation_is_shown(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.15, "full": 0.2})
    records = load_metrics(paths)
    full = find_full(records[1], records)
    assert full is not None and full.name == "full"
    found = compare_with_baseline(records[1], records)
    assert found is not None and found.gap_closed is not None and found.gap_closed.ends is not None
    assert 0.7 < found.gap_closed.ends[0] < 0.75 < found.gap_closed.ends[1] < 0.8
    summary = render_summary(records, report_path=Path("r.html"))
    assert re.search(r"hybrid closes 7\d % \(7\d to 7\d\) of the gap", summary), summary
    page = render_page(tmp_path, paths)
    assert "gap closed, %" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert float(rows[1]["gap_closed"]) == found.gap_closed.value
    assert float(rows[1]["margin_low"]) < float(rows[1]["margin"]) < float(rows[1]["margin_high"])
    without = load_metrics(paths[:2])
    assert find_full(without[1], without) is None
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
    records = load_metrics(paths)
    assert find_full(records[0], records) is None


def test_runs_are_compared_by_their_losses_document_by_document(tmp_path: Path) -> None:
    records = load_metrics(write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "other": 0.05}))
    best = find_best(records, "loss")
    assert best is not None and best.name == "hybrid"
    paths = write_measured(tmp_path / "b", {"output": 0.0, "hybrid": 0.1, "other": 0.1})
    assert find_best(load_metrics(paths), "loss") is None


def test_in_other_metrics_the_best_runs_interval_must_not_overlap(tmp_path: Path) -> None:
    def agreeing(name: str, value: float) -> Path:
        return write_run(tmp_path, name, validation__agreement=make_estimate(value, width=0.01))

    paths = [agreeing("a", 0.40), agreeing("b", 0.43), agreeing("c", 0.415)]
    records = load_metrics(paths)
    assert find_best(records, "agreement") is None
    best = find_best(records[:2], "agreement")
    assert best is not None and best.name == "b"
    assert find_best(records[:1], "agreement") is None


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
