"""benchmark.json of students and teachers -> one table: a row for each model, a column for each benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.evaluation.intervals import Estimate
from retort.io.files import read_json

_FORMAT, _VERSION = "retort-benchmark", 1
_Z = 1.96  # of a 95 % interval, by the standard error over examples


@dataclass(frozen=True)
class Column:
    """What a column holds: a benchmark's metric, on how many examples of how many."""

    benchmark: str
    task: str
    metric: str
    examples: int
    examples_in_all: int
    is_less_better: bool

    @property
    def title(self) -> str:
        """The task and the metric, and which way is better where that is downwards."""
        return f"{self.task}, {self.metric}{' (less is better)' if self.is_less_better else ''}"

    @property
    def is_whole(self) -> bool:
        """Whether all examples were asked: else the number is a trial's."""
        return self.examples == self.examples_in_all


@dataclass(frozen=True)
class Scoreboard:
    """Columns, and the scores of each model in them; teachers first, a model that was not asked has none."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, bool, tuple[Estimate | None, ...]], ...]  # name, is it a teacher, scores

    @property
    def trials(self) -> list[str]:
        """Benchmarks of which a part of the examples was asked, with the numbers."""
        found = {
            f"{c.benchmark}: {c.examples:,} of {c.examples_in_all:,} examples"
            for c in self.columns
            if not c.is_whole
        }
        return sorted(found)


def read_scoreboard(paths: Sequence[Path]) -> Scoreboard:
    """Read what `benchmark` wrote, in the order given. Raises ValueError where a file is something else."""
    scores: dict[tuple[str, bool], dict[Column, Estimate]] = {}
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
            f"{path} is no benchmark.json of this version (format {found[0]!r}, version {found[1]!r}; expected "
            f"{_FORMAT!r}, {_VERSION}): run the benchmark again."
        )
    return raw


def _read_columns(raw: dict[str, Any]) -> dict[Column, Estimate]:
    """Return a benchmark's own scores; of a collection without one of its own, those of all its tasks."""
    rows = raw["scores"]
    own = [row for row in rows if row["task"] == raw["benchmark"]] or rows
    found = {}
    for row in own:
        counts = (raw["examples"], raw["examples_in_all"])
        key = Column(raw["benchmark"], row["task"], row["metric"], *counts, row["is_less_better"])
        found[key] = _score(row["value"], row["standard_error"])
    return found


def _score(value: float, error: float | None) -> Estimate:
    if error is None:
        return Estimate(value, None, None)
    return Estimate(value, value - _Z * error, value + _Z * error)


def render_scoreboard(board: Scoreboard) -> list[str]:
    """Return what is said at the end of a run: every model's number, a line for each column."""
    lines = []
    for place, column in enumerate(board.columns):
        found = [(name, scores[place]) for name, _, scores in board.rows]
        shown = ", ".join(f"{name} {_reach(score)}" for name, score in found if score is not None)
        lines.append(f"{column.title}: {shown}")
    return [*lines, *(f"a trial, not a result: {trial}" for trial in board.trials)]


def _reach(score: Estimate) -> str:
    if score.ends is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f}\u00b1{score.ends[1] - score.value:.3f}"
