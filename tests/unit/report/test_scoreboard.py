"""Table of tasks: teachers first, a dash where a task was not run, a note where only some examples were."""

from pathlib import Path
from typing import Any

import pytest

from retort.evaluation.records import Score
from retort.report.scoreboard import read_scoreboard
from retort.report.tables import build_task_table
from support.records import make_benchmark, make_run_record, make_score
from support.reports import summarise, write_run


def write(path: Path, task: str, scores: list[Score], **values: Any) -> Path:
    make_benchmark(task, scores, **values).write(path)
    return path


def test_two_teachers_of_one_path_are_two_models(tmp_path: Path) -> None:
    folders = [
        tmp_path / "teachers" / f"{n}123456789ab" / "benchmarks" / "arc" / "id" for n in "05"
    ]
    paths = [
        write(folder / "benchmark.json", "arc", [make_score("arc", score)], teacher="big")
        for folder, score in zip(folders, (0.5, 0.75), strict=True)
    ]
    rows = build_task_table(read_scoreboard(paths)).rows
    assert [name for name, _, _ in rows] == ["teacher big 012345", "teacher big 512345"]


def test_models_are_rows_with_teachers_first(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", "arc", [make_score("arc", 0.5)], run="small"),
        write(tmp_path / "b", "arc", [make_score("arc", 0.75, None)], teacher="big"),
        write(
            tmp_path / "c",
            "wiki",
            [make_score("wiki", 9.0, is_less_better=True)],
            run="small",
            examples=10,
        ),
    ]
    summary = summarise([write_run(tmp_path, "small")], 120, paths).splitlines()
    start = next(i for i, line in enumerate(summary) if line.startswith("arc"))
    assert summary[start : start + 4] == [
        "arc, acc: teacher big 0.750, small 0.500\u00b10.020",
        "wiki, acc (less is better), 10 of 100 examples: small 9.000\u00b10.020",
        "not a full result, on some examples only: wiki: 10 of 100 examples",
        "",
    ]
    table = build_task_table(read_scoreboard(paths))
    assert [(name, is_teacher) for name, is_teacher, _ in table.rows] == [
        ("teacher big", True),
        ("small", False),
    ]
    assert [[cell.text for cell in cells] for _, _, cells in table.rows] == [
        ["0.750", "-"],
        ["0.500", "9.000"],
    ]
    assert table.rows[1][2][0].below == "0.480 to 0.520"


def test_a_group_shows_its_own_score_or_those_of_all_its_subtasks(tmp_path: Path) -> None:
    subtasks = [make_score("one", 0.1), make_score("two", 0.2)]
    group = write(tmp_path / "a", "mmlu", [make_score("mmlu", 0.3), *subtasks], run="r")
    collection = write(tmp_path / "b", "tag", subtasks, run="r")
    metrics = list(read_scoreboard([group, collection]).metric)
    assert metrics == ["mmlu, acc", "one, acc", "two, acc"]


def test_without_files_there_is_no_table_and_other_files_are_refused(tmp_path: Path) -> None:
    assert read_scoreboard([]).empty and not build_task_table(read_scoreboard([])).columns
    make_run_record().write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"another kind of file.* run the benchmark again"):
        read_scoreboard([tmp_path / "a"])
    with pytest.raises(ValueError, match="does not exist"):
        read_scoreboard([tmp_path / "missing"])
