"""training.json: a finished student, how long it was trained, and the digests of its files."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from retort.io.digests import digest
from retort.io.records import Entry, JsonObject, Record


def digest_caches(headers: Sequence[Any], weights: Sequence[float]) -> str:
    """Return the digest of the header of a student's cache; of several, of all with their weights."""
    return digest(headers[0] if len(headers) == 1 else [list(headers), list(weights)])


class TrainingSummary(Entry):
    """Totals of a training, over all its attempts. `dtype`: of the weights, and of mixed precision if it is used.

    trained_parameters: those that are not frozen; None in records of versions that trained all. best_step: the step
    whose weights the student has, None for the last one. peak_memory: bytes of the last attempt (see
    `read_peak_memory`), None in older records; resumed_step: from which that attempt went on, None if it was the first.
    """

    steps: int
    trained_positions: int
    seconds: float
    seconds_waiting_for_data: float
    student_parameters: int
    trained_parameters: int | None = None
    device: str
    dtype: str
    best_step: int | None = Field(default=None, exclude_if=lambda step: step is None)
    peak_memory: int | None = Field(default=None, exclude_if=lambda size: size is None)
    resumed_step: int | None = Field(default=None, exclude_if=lambda step: step is None)


class StartRecord(Record, format="retort-student"):
    """student.json in a run's folder: the `commit` of a student on the Hub, kept for all restarts of the run."""

    name: str
    revision: str | None
    commit: str | None


class TrainingRecord(Record, format="retort-training", version=4, remedy="train the run again"):
    """training.json: `id` is the run's, `teacher` the fingerprint of its weights, `final` has the digests of final/.

    tokens, cache: content digest of the token index, and digest of the header of the cache that it was given. Of
    several teachers, `teacher` has all fingerprints with their weights (`name_mixture`), and `cache` is of all
    (`digest_caches`).
    student: digest of what it began from, `starting_point`, with its commit if it is on the Hub.
    """

    run: str
    id: str
    distillation_type: str
    alpha: float | None
    temperature: float | None
    seed: int
    tokens: str
    teacher: str | None
    cache: str | None
    student: str
    summary: TrainingSummary
    final: dict[str, str]

    @classmethod
    def upgrade(cls, content: JsonObject, version: int) -> JsonObject | None:
        """Read version 3, whose summary had no `trained_parameters`."""
        return content if version == 3 else None
