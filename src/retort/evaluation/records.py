"""metrics.json and benchmark.json: what a model scored on held-out text, and on an evaluation task."""

from pydantic import Field

from retort.corpus.documents import Counts
from retort.evaluation.intervals import Estimate
from retort.io.records import Entry, JsonObject, Record
from retort.io.run_record import RunRecord
from retort.teacher.records import Manifest
from retort.tokens.index import SplitTotals
from retort.training.record import TrainingRecord


class Bin(Entry):
    """A bin of confidence, from `start` to `stop`: its number of positions, their mean confidence, their accuracy."""

    start: float
    stop: float
    positions: int
    confidence: float
    accuracy: Estimate


class ClassRow(Entry):
    """A class of positions: its name, its size, and the metrics in it by name."""

    name: str
    positions: int
    documents: int
    metrics: dict[str, Estimate]


class Scorecard(Entry):
    """One model's defined metrics by name (`scores.METRICS`), and its reliability curve without empty bins.

    Measured at `positions` of `documents`, which predict `bytes` of text (None: the tokens are not text).
    """

    positions: int
    documents: int
    bytes: int | None
    metrics: dict[str, Estimate]
    reliability: tuple[Bin, ...]


class Scores(Entry):
    """Scores of a student and of its teacher, if it has one; the metrics that compare the two are the student's.

    not_defined: why a metric has no value, by name. breakdown: the student's scores in classes of positions.
    """

    student: Scorecard
    teacher: Scorecard | None
    not_defined: dict[str, str]
    breakdown: dict[str, tuple[ClassRow, ...]]


class TextCounts(Entry):
    """The corpus's documents, read, used and skipped, and the totals of its training sequences."""

    documents: Counts
    train: SplitTotals


class Metrics(Record, format="retort-metrics", version=6, remedy="evaluate the run again"):
    """metrics.json of a run, on held-out sequences.

    content, tokens: digests of the held-out and of the training sequences; leaked_sequences: how many of the former are
    also training sequences; teacher: its name, of several their names and weights; trained: the run.json of the
    training; text: None in files of version 4; cache: None without one; other_caches: of further teachers.
    """

    training: TrainingRecord
    teacher: str | None
    teacher_parameters: int | None
    content: str
    tokens: str
    sequences: int
    leaked_sequences: int
    text: TextCounts | None
    units: dict[str, str]
    scores: Scores
    cache: Manifest | None
    other_caches: tuple[Manifest, ...] = Field(default=(), exclude_if=lambda caches: not caches)
    trained: RunRecord | None
    made: RunRecord

    @classmethod
    def upgrade(cls, content: JsonObject, version: int) -> JsonObject | None:
        """Version 4 had no `text`, and up to 5 the training no `trained_parameters`."""
        return {"text": None} | content if version in (4, 5) else None


class Comparison(Record, format="retort-comparison", remedy="compare the models again"):
    """metrics.json of a standalone comparison of a model and its teacher, each a path or Hub id."""

    model: str
    teacher: str | None
    units: dict[str, str]
    scores: Scores
    made: RunRecord


class Score(Entry):
    """A metric of an evaluation task, or of a subtask in a group."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    is_less_better: bool


class TaskResult(Entry):
    """The scores of a task on `examples` of its `examples_in_all`, and the versions of what computed them."""

    scores: tuple[Score, ...]
    examples: int
    examples_in_all: int
    versions: dict[str, str]


class BenchmarkRecord(
    Record, format="retort-benchmark", version=2, remedy="run the benchmark again"
):
    """benchmark.json: a task's scores of the student of `run` and its `id`, or of a `teacher`, a path or Hub id."""

    task: str
    run: str | None
    id: str | None
    teacher: str | None
    result: TaskResult
    made: RunRecord
