"""benchmark.json of students and teachers -> a row for each model and metric of a task, teachers first."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from retort.evaluation.formatting import format_plus_minus
from retort.evaluation.records import BenchmarkRecord
from retort.report.runs import get_estimate

_Z = 1.96  # standard errors over examples in half a 95 % interval
_COLUMNS = ["model", "is_teacher", "metric", "trial", "value", "value_low", "value_high"]


def read_scoreboard(paths: Sequence[Path]) -> pd.DataFrame:
    """Read files of benchmark.json, in the order given; `trial` says of how many examples a part was used, else "".

    Of a group of tasks without a score of its own, all subtasks are in the table.
    Raises ValueError when a file is missing or is something else.
    """
    rows = []
    records = {path: BenchmarkRecord.read(path) for path in map(Path, paths)}
    teachers = {(r.teacher, _find_id(path)) for path, r in records.items()}
    counts = Counter(name for name, _ in teachers)
    for path, record in records.items():
        model = record.run or f"teacher {record.teacher}"
        if record.run is None and counts[record.teacher] > 1:
            model += f" {_find_id(path)[:6]}"
        result = record.result
        trial = f"{result.examples:,} of {result.examples_in_all:,} examples"
        trial = "" if result.examples == result.examples_in_all else trial
        for score in [s for s in result.scores if s.task == record.task] or result.scores:
            direction = " (less is better)" if score.is_less_better else ""
            half = float("nan") if score.standard_error is None else _Z * score.standard_error
            rows.append(
                {
                    "model": model,
                    "is_teacher": record.run is None,
                    "metric": f"{score.task}, {score.metric}{direction}" + (trial and f", {trial}"),
                    "trial": trial and f"{record.task}: {trial}",
                    "value": score.value,
                    "value_low": score.value - half,
                    "value_high": score.value + half,
                }
            )
    board = pd.DataFrame(rows, columns=_COLUMNS).astype({"is_teacher": bool})
    return board.sort_values("is_teacher", ascending=False, kind="stable")


def _find_id(path: Path) -> str:
    """Return the id of the teacher of teachers/<id>/benchmarks/<task>/<id>/benchmark.json."""
    return "/".join(path.parts[-5:-4])


def find_trials(board: pd.DataFrame) -> list[str]:
    """Return the tasks that were run on some of their examples only, with the numbers."""
    return sorted(set(board.trial) - {""})


def render_scoreboard(board: pd.DataFrame) -> list[str]:
    """Return the lines for the summary: one for each metric with every model's score."""
    lines = []
    for metric, rows in board.groupby("metric", sort=False):
        scores = [
            f"{row.model} {format_plus_minus(get_estimate(row, 'value'))}"
            for _, row in rows.iterrows()
        ]
        lines.append(f"{metric}: {', '.join(scores)}")
    trials = find_trials(board)
    return [*lines, *(f"not a full result, on some examples only: {trial}" for trial in trials)]
