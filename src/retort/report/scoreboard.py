"""benchmark.json of students and teachers -> a table with a row for each model and a column for each task's metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retort.evaluation.intervals import Estimate
from retort.evaluation.records import BenchmarkRecord

_Z = 1.96  # standard errors over examples in half a 95 % interval


@dataclass(frozen=True)
class TaskMetric:
    """A column of the table: a metric of a task, or of a subtask in a group, and the number of examples used."""

    task: str
    subtask: str
    metric: str
    examples: int
    examples_in_all: int
    is_less_better: bool

    @property
    def title(self) -> str:
        """The subtask and the metric, with a note if less is better."""
        return f"{self.subtask}, {self.metric}{' (less is better)' if self.is_less_better else ''}"

    @property
    def is_complete(self) -> bool:
        """Whether all examples of the task were used."""
        return self.examples == self.examples_in_all


@dataclass(frozen=True)
class Scoreboard:
    """The columns, and each model's scores in them, None where the task was not run; teachers first."""

    columns: tuple[TaskMetric, ...]
    rows: tuple[tuple[str, bool, tuple[Estimate | None, ...]], ...]  # name, is it a teacher, scores

    @property
    def trials(self) -> list[str]:
        """The tasks that were run on some of their examples only, with the numbers."""
        found = {
            f"{c.task}: {c.examples:,} of {c.examples_in_all:,} examples"
            for c in self.columns
            if not c.is_complete
        }
        return sorted(found)


def read_scoreboard(paths: Sequence[Path]) -> Scoreboard:
    """Read files of benchmark.json, in the order given. Raises ValueError as `Record.read` does."""
    scores: dict[tuple[str, bool], dict[TaskMetric, Estimate]] = {}
    for path in paths:
        record = BenchmarkRecord.read(path)
        model = (record.run or f"teacher {record.teacher}", record.run is None)
        scores.setdefault(model, {}).update(_list_columns(record))
    columns = tuple(dict.fromkeys(column for found in scores.values() for column in found))
    models = sorted(scores, key=lambda model: not model[1])  # stable: teachers first
    rows = ((name, is_t, tuple(map(scores[name, is_t].get, columns))) for name, is_t in models)
    return Scoreboard(columns, tuple(rows))


def _list_columns(record: BenchmarkRecord) -> dict[TaskMetric, Estimate]:
    """Return the scores of a task; of a group without a score of its own, those of all its subtasks."""
    result = record.result
    own = [s for s in result.scores if s.task == record.task] or result.scores
    counts = (result.examples, result.examples_in_all)
    return {
        TaskMetric(record.task, s.task, s.metric, *counts, s.is_less_better): _score(
            s.value, s.standard_error
        )
        for s in own
    }


def _score(value: float, error: float | None) -> Estimate:
    if error is None:
        return Estimate(value, None, None)
    return Estimate(value, value - _Z * error, value + _Z * error)


def render_scoreboard(board: Scoreboard) -> list[str]:
    """Return the lines for the summary: one for each column with every model's score."""
    lines = []
    for index, column in enumerate(board.columns):
        found = [(name, scores[index]) for name, _, scores in board.rows]
        shown = ", ".join(f"{name} {_format(score)}" for name, score in found if score is not None)
        lines.append(f"{column.title}: {shown}")
    return [
        *lines,
        *(f"not a full result, on some examples only: {trial}" for trial in board.trials),
    ]


def _format(score: Estimate) -> str:
    if score.ends is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f}\u00b1{score.ends[1] - score.value:.3f}"
