"""Rows and cells of the summary's and the page's tables."""

from pathlib import Path

import pytest

from retort.models.samples import Sample, SamplePrompt, Samples
from retort.report.records import find_teachers, load_metrics
from retort.report.tables import (
    REFERENCE,
    build_breakdowns,
    build_rows,
    build_samples,
    mark_lines,
    sort_key,
)
from support.reports import MARGIN, without_teacher, write_demo, write_run


def test_what_is_not_defined_is_a_dash(tmp_path: Path) -> None:
    records = load_metrics([write_run(tmp_path, "alone", "output", **without_teacher())])
    (row,) = build_rows(records)
    assert not row.is_teacher
    assert row.cells == ("output", "1", "-", "54,272", "3.294", "24.90", "-", "-", "-")


def test_cells_hold_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    teacher, output, _, hybrid = build_rows(load_metrics(write_demo(tmp_path)))
    assert teacher.cells == ("-", "-", "-", "1.312M", "2.752", "15.67", "-", "-", "-")
    assert output.cells == ("output", "1", "-", "54,272", "3.294", "24.90", "0.500", "43.1", "-")
    assert hybrid.cells[:5] == ("hybrid", "0.5", "2", "54,272", "3.213")
    assert hybrid.cells[MARGIN] == "-0.081"


@pytest.mark.parametrize(
    ("loss", "shown"), [(3.3, "+0.006"), (3.2944, "0.000"), (3.2936, "0.000"), (3.1, "-0.194")]
)
def test_margin_carries_its_sign_and_zero_carries_none(
    tmp_path: Path, loss: float, shown: str
) -> None:
    output = write_run(tmp_path, "output", "output")
    records = load_metrics([output, write_run(tmp_path, "hybrid", validation__loss=loss)])
    assert build_rows(records)[-1].cells[MARGIN] == shown


def test_teachers_that_differ_by_rounding_are_one_row(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    paths.append(write_run(tmp_path, "rounded", teacher_validation__loss=2.7520001))
    assert len(find_teachers(load_metrics(paths))) == 1
    paths.append(write_run(tmp_path, "big", teacher="models/big", teacher_validation__loss=2.5))
    rows = build_rows(load_metrics(paths))
    assert [r.name for r in rows if r.is_teacher] == ["teacher demo", "teacher models/big"]


def test_each_class_has_a_row_with_every_runs_loss(tmp_path: Path) -> None:
    place, language = build_breakdowns(load_metrics(write_demo(tmp_path)))
    assert place.title.startswith("By place in the document")
    assert language.heads == ("class", "positions", "teacher", "output", "logit", "hybrid")
    name, _, cells = language.rows[1]
    assert (name, [cell.text for cell in cells]) == ("en", ["32,768", "2.900", *["3.400"] * 3])
    assert cells[-1].below == "KL 0.400"


def test_samples_are_grouped_by_prompt_text_then_teacher_then_runs(tmp_path: Path) -> None:
    records = load_metrics(write_demo(tmp_path))
    prompts = (SamplePrompt((1,), "once", " upon"), SamplePrompt((2,), "twice", None))
    teacher = Samples(prompts, (Sample("t1", "T1"), Sample("t2", "T2")))
    found: list[dict[str, Samples]] = [
        {"teacher": teacher, "student": Samples(prompts, (Sample("a1", ""), Sample("a2", "")))},
        {"teacher": teacher, "student": Samples(prompts, missing="it cannot")},
        {},
    ]
    first, second = build_samples(records, found)
    assert [line.name for line in first.lines] == [REFERENCE, "teacher", "output", "logit"]
    assert (first.prompt, first.lines[0].greedy, first.lines[0].sampled) == ("once", " upon", None)
    assert (first.lines[1].greedy, first.lines[1].sampled) == ("t1", "T1")
    assert [(line.name, line.greedy) for line in second.lines] == [
        ("teacher", "t2"),
        ("output", "a2"),
        ("logit", ""),
    ]
    assert second.lines[-1].missing == "it cannot"
    assert build_samples(records, [{}, {}, {}]) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "(nothing)"),
        ("a\nb", "a\nb"),
        ("a\n\n\nb\n", "a\u23ce\u23ce\nb\u23ce"),
        ("a\n" + "\n" * 60, "a\u23ce\u00d760\u23ce"),
    ],
)
def test_empty_lines_become_signs(text: str, shown: str) -> None:
    assert mark_lines(text) == shown


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *[("3.213\u00b10.020", "3.213"), ("-0.572\u00b10.085", "-0.572"), ("918,656", "918656.0")],
        *[("1.235M", "1235000.0"), ("7.1B", "7100000000.0"), ("1.23e+07", "12300000.0")],
        *[("-", ""), ("hybrid", "hybrid"), ("+0.001", "0.001")],
    ],
)
def test_cells_are_sorted_by_their_numbers(text: str, key: str) -> None:
    assert sort_key(text) == key
