"""benchmark.json of students and teachers -> a table with a row for each model and a column for each task's metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.evaluation.intervals import Estimate
from retort.io.files import read_json

_FORMAT, _VERSION = "retort-benchmark", 1
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
    """Read files of benchmark.json, in the order given. Raises ValueError when one is missing or is something else."""
    scores: dict[tuple[str, bool], dict[TaskMetric, Estimate]] = {}
    for path in paths:
        raw = _open(path)
        model = (raw["run"] or f"teacher {raw['teacher']}", raw["run"] is None)
        scores.setdefault(model, {}).update(_read_columns(raw))
    columns = tuple(dict.fromkeys(column for found in scores.values() for column in found))
    models = sorted(scores, key=lambda model: not model[1])  # stable: teachers first
    rows = ((name, is_t, tuple(map(scores[name, is_t].get, columns))) for name, is_t in models)
    return Scoreboard(columns, tuple(rows))


def _open(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the benchmark.json of runs or teachers.")
    raw: dict[str, Any] = read_json(path)
    found = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
    if found != (_FORMAT, _VERSION):
        raise ValueError(
            f"{path} is not a benchmark.json of this version (format {found[0]!r}, version {found[1]!r}; expected "
            f"{_FORMAT!r}, {_VERSION}): run the benchmark again."
        )
    return raw


def _read_columns(raw: dict[str, Any]) -> dict[TaskMetric, Estimate]:
    """Return the scores of a task; of a group without a score of its own, those of all its subtasks."""
    rows = raw["scores"]
    own = [row for row in rows if row["task"] == raw["benchmark"]] or rows
    found = {}
    counts = (raw["examples"], raw["examples_in_all"])
    for row in own:
        names = (raw["benchmark"], row["task"], row["metric"])
        found[TaskMetric(*names, *counts, row["is_less_better"])] = _score(
            row["value"], row["standard_error"]
        )
    return found


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
