"""Rows and cells of the summary's and the page's tables."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retort.evaluation.formatting import format_metric
from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import MAX_PERPLEXITY
from retort.models.samples import Sample, SamplePrompt, Samples
from retort.report.estimated import compare_with_estimate
from retort.report.figures import Figures
from retort.report.findings import find_caches
from retort.report.runs import find_teachers, label_teachers
from retort.report.samples import REFERENCE, build_samples, mark_lines
from retort.report.tables import (
    COLUMNS,
    TABLES,
    Cell,
    Column,
    build_breakdowns,
    build_main_table,
    describe_settings,
)
from support.reports import (
    compare,
    find_rows,
    render_page,
    without_teacher,
    write_demo,
    write_run,
)


def test_what_is_not_defined_is_a_dash(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "alone", "output", **without_teacher())]
    ((name, cells),) = find_rows(paths).items()
    assert name == "alone"
    assert [*cells.values()] == ["3.294", "-", "1", "24.90", "-", "-", "output", "1", "-", "54,272"]


def test_cells_hold_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    rows = find_rows(write_demo(tmp_path))
    assert list(rows) == ["teacher", "hybrid", "logit", "output"]  # in the order of their loss
    teacher, output, hybrid = ([*rows[n].values()] for n in ("teacher", "output", "hybrid"))
    assert teacher == ["2.752", "-", "-", "15.67", *["-"] * 5, "1.312M"]
    assert output[:6] == ["3.294", "-", "1", "24.90", "0.500", "43.1"]
    assert output[6:] == ["output", "1", "-", "54,272"]
    assert hybrid[:2] == ["3.213", "-0.081"] and hybrid[6:9] == ["hybrid", "0.5", "2"]


@pytest.mark.parametrize(
    ("loss", "shown"), [(3.3, "+0.006"), (3.2944, "0.000"), (3.2936, "0.000"), (3.1, "-0.194")]
)
def test_margin_carries_its_sign_and_zero_carries_none(
    tmp_path: Path, loss: float, shown: str
) -> None:
    output = write_run(tmp_path, "output", "output")
    rows = find_rows([output, write_run(tmp_path, "hybrid", validation__loss=loss)])
    assert rows["hybrid"]["margin"] == shown


def test_teachers_that_differ_by_rounding_are_one_row(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    paths.append(write_run(tmp_path, "rounded", teacher_validation__loss=2.7520001))
    assert list(find_teachers(compare(paths).settings).index) == ["teacher"]
    paths.append(write_run(tmp_path, "big", teacher="models/big", teacher_validation__loss=2.5))
    names = ["teacher demo", "teacher models/big"]
    assert sorted(name for name in find_rows(paths) if "teacher" in name) == names


def test_two_teachers_of_one_path_have_a_row_and_a_curve_each(tmp_path: Path) -> None:
    """At two revisions, say; the second is the better one."""
    paths = write_demo(tmp_path)
    better: dict[str, Any] = {
        "teacher": "demo",
        "teacher_validation__loss": 2.5,
    }
    paths.append(write_run(tmp_path, "newer", **better))
    found = compare(paths)
    names = [
        f"teacher demo of {name}" for name in found.settings.index if name in ("newer", "hybrid")
    ]
    assert list(find_teachers(found.settings).index) == names
    figures = Figures(
        found, found.settings, {n: i for i, n in enumerate(found.settings.index)}, key="g"
    )
    assert [name for name, _ in figures.draw_reliability()][:2] == names
    labels = label_teachers(found.runs)
    assert (
        labels["newer"] == "teacher demo of newer" and labels["hybrid"] == "teacher demo of output"
    )
    sample = Samples(
        (SamplePrompt(ids=(1,), text="once", reference=None),), continued=(Sample("a", "b"),)
    )
    samples = {run: {"teacher": sample} for run in ("newer", "hybrid")}
    (block,) = build_samples(samples, dict(labels))
    assert [line.name for line in block.lines] == [labels["newer"], labels["hybrid"]]


def test_each_class_has_a_row_with_every_runs_loss(tmp_path: Path) -> None:
    found = compare(write_demo(tmp_path))
    place, language = build_breakdowns(found, found.settings)
    assert place.title.startswith("By place in the document")
    assert language.heads == ["class", "positions", "teacher", "hybrid", "logit", "output"]
    name, _, cells = language.rows[1]
    assert (name, [cell.text for cell in cells]) == ("en", ["32,768", "2.900", *["3.400"] * 3])
    assert cells[-1].below == "KL 0.400"


def test_a_note_that_is_not_defined_is_empty() -> None:
    """As the KL of every class where there is no teacher."""
    row = pd.Series({"loss": 1.5, "kl": float("nan")})
    assert Column("loss", "loss", ".3f", note="kl").make_cell(row) == Cell("1.500", "", "1.5")


def test_samples_are_grouped_by_prompt_text_then_teacher_then_runs(tmp_path: Path) -> None:
    runs = ("output", "logit", "hybrid")
    prompts = (SamplePrompt((1,), "once", " upon"), SamplePrompt((2,), "twice", None))
    teacher = Samples(prompts, (Sample("t1", "T1"), Sample("t2", "T2")))
    students = [
        {"teacher": teacher, "student": Samples(prompts, (Sample("a1", ""), Sample("a2", "")))},
        {"teacher": teacher, "student": Samples(prompts, missing="it cannot")},
        {},
    ]
    found: dict[str, dict[str, Samples]] = dict(zip(runs, students, strict=True))
    teachers = dict.fromkeys(runs, "demo")
    first, second = build_samples(found, teachers)
    assert [line.name for line in first.lines] == [REFERENCE, "teacher", "output", "logit"]
    assert (first.prompt, first.lines[0].greedy, first.lines[0].sampled) == ("once", " upon", None)
    assert (first.lines[1].greedy, first.lines[1].sampled) == ("t1", "T1")
    assert [(line.name, line.greedy) for line in second.lines] == [
        ("teacher", "t2"),
        ("output", "a2"),
        ("logit", ""),
    ]
    assert second.lines[-1].missing == "it cannot"
    assert build_samples({run: {} for run in runs}, teachers) == []


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


def test_a_perplexity_beyond_all_numbers_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path, "output", "output", validation__perplexity=MAX_PERPLEXITY)
    found = compare([path])
    texts = {
        cell.text for _, _, cells in build_main_table(found, found.settings).rows for cell in cells
    }
    assert "> 1e304" in texts
    shown = format_metric("perplexity", Estimate(1e12, 3.0, MAX_PERPLEXITY))
    assert shown == ("1.00e+12", "3.000 to > 1e304")


def test_every_declared_column_is_shown_and_every_table_has_its_columns(tmp_path: Path) -> None:
    found = compare(write_demo(tmp_path))
    frames = {"main": found.settings, "metrics": found.settings, "caches": find_caches(found.runs)}
    frames["estimated"] = compare_with_estimate(None, {})
    for name, columns in TABLES.items():
        assert {column.key for column in columns} <= set(frames.get(name, found.runs))
    shown = {column.key for columns in TABLES.values() for column in columns}
    assert {column.key for column in COLUMNS} - shown == {"hard_loss"}  # of the learning curves
    page = render_page(tmp_path, [write_run(tmp_path, "one")])
    assert all(f"<dt>{column.term}</dt>" in page for column in COLUMNS if column.term)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"trained_parameters": 54_272}, ""),
        ({"trained_parameters": 1_234}, "1,234 trained"),
        (
            {"trained_parameters": 1_234, "trained": {"training": {"lora": {"rank": 4}}}},
            "LoRA rank 4: 1,234",
        ),
    ],
)
def test_what_is_trained_of_a_student_is_below_its_size(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    found = compare([write_run(tmp_path, "hybrid", **changes)])
    _, (_, _, cells) = build_main_table(found, found.settings).rows
    assert [cell.below for cell in cells if cell.text == "54,272"] == [said]


def test_cells_are_sorted_by_their_numbers(tmp_path: Path) -> None:
    path = write_run(tmp_path, "hybrid", student_parameters=1_234_567)
    changes = {"student_parameters": 1_234_567, "validation__perplexity": 12_300_000.0}
    output = write_run(tmp_path, "output", "output", **changes)
    found = compare([path, output])
    _, hybrid, text = build_main_table(found, found.settings).rows
    shown = {cell.text: cell.key for _, _, cells in (hybrid, text) for cell in cells}
    assert (shown["1.235M"], shown["1.23e+07"]) == ("1234567.0", "12300000.0")
    assert float(shown["-0.081"]) == pytest.approx(-0.081)
    assert (shown["-"], shown["hybrid"]) == ("", "hybrid")


def test_where_students_started_is_said_where_one_is_part_of_a_model(tmp_path: Path) -> None:
    sizes = {"layers": 4, "layer_indices": None, "calibration_samples": 256}
    sections: dict[str, Any] = {
        "random": {
            "config": "a.json",
            "model_path": None,
            "from_teacher": sizes | {"layers": None},
        },
        "part": {"config": None, "model_path": None, "from_teacher": sizes},
        "weights": {"config": None, "model_path": "somebody/small"},
    }
    trained = {name: {"student": student} for name, student in sections.items()}
    paths = {name: write_run(tmp_path, name, trained=trained[name]) for name in trained}
    _shared, differing = describe_settings(compare([*paths.values()]))
    assert differing.frame.start.to_dict() == {
        "random": "random weights",
        "part": "part of demo: layers 4",
        "weights": "somebody/small",
    }
    shared, differing = describe_settings(compare([paths["part"]]))
    assert shared["start"] == "part of demo: layers 4" and "start" not in differing.frame
    shared, _differing = describe_settings(compare([paths["random"], paths["weights"]]))
    assert "start" not in shared
