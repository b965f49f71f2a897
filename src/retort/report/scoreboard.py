"""benchmark.json of students and teachers -> a row for each model and metric of a task, teachers first."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from retort.evaluation.formatting import format_plus_minus
from retort.evaluation.records import BenchmarkRecord
from retort.report.runs import get_estimate

_Z = 1.96  # standard errors over examples in half a 95 % interval
_TYPES = {
    "model": str,
    "is_teacher": bool,
    "metric": str,
    "trial": str,
    "value": float,
    "half": float,
}


def read_scoreboard(paths: Sequence[Path]) -> pd.DataFrame:
    """Read files of benchmark.json, in the order given; `trial` says of how many examples a part was used, else "".

    Of a group of tasks without a score of its own, all subtasks are in the table; `text` is a score with its interval.
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
        part = f"{result.examples:,} of {result.examples_in_all:,} examples"
        part = "" if result.examples == result.examples_in_all else part
        trial = part and f"{record.task}: {part}"
        for score in [s for s in result.scores if s.task == record.task] or result.scores:
            direction = " (less is better)" if score.is_less_better else ""
            metric = f"{score.task}, {score.metric}{direction}" + (part and f", {part}")
            half = None if score.standard_error is None else _Z * score.standard_error
            rows.append((model, record.run is None, metric, trial, score.value, half))
    board = pd.DataFrame(rows, columns=list(_TYPES)).astype(_TYPES)
    board["value_low"], board["value_high"] = board.value - board.half, board.value + board.half
    estimates = [get_estimate(row, "value") for _, row in board.iterrows()]
    board["text"] = pd.Series(map(format_plus_minus, estimates), board.index, dtype=str)
    return board.sort_values("is_teacher", ascending=False, kind="stable")


def _find_id(path: Path) -> str:
    """Return the id of the teacher of teachers/<id>/benchmarks/<task>/<id>/benchmark.json."""
    return "/".join(path.parts[-5:-4])
