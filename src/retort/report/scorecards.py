"""Read one metrics.json key by key: the scorecards of the student and its teacher, and the classes of positions.

Undefined values are None. A value that is missing, not finite or of the wrong type is an error that names its key.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import METRICS, METRICS_FORMAT, METRICS_VERSION


@dataclass(frozen=True)
class Bin:
    """A bin of confidence: its number of positions, their mean confidence, and their accuracy with an interval."""

    positions: int
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class ClassRow:
    """A class of positions: its name, its size, and the metrics in it by name."""

    name: str
    positions: int
    documents: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Scorecard:
    """A model's defined metrics by name, and its reliability curve."""

    metrics: Mapping[str, Estimate]
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class Reader:
    """Typed access to one metrics.json; errors name the file and the key."""

    path: Path
    raw: Any

    def __call__(self, *keys: str | int) -> Any:
        """Return the value at nested keys; None when it or one of its parents is null.

        Raises ValueError for a missing key, as all methods do; they also do so for a value of another type.
        """
        value = self.raw
        for depth, key in enumerate(keys):
            if value is None and depth:
                return None
            has_key = isinstance(value, Mapping) and key in value
            if not has_key and not (isinstance(value, list) and key in range(len(value))):
                raise ValueError(f"{self.path} has no {_dotted(keys)!r}: evaluate the run again.")
            value = value[key]
        return value

    def _require_type(
        self, keys: tuple[str | int, ...], types: tuple[type, ...], expected: str
    ) -> Any:
        value = self(*keys)
        if not isinstance(value, types) or isinstance(value, bool):
            found = f"{self.path}: {_dotted(keys)} is {value!r}"
            raise ValueError(f"{found}, expected {expected}. Evaluate the run again.")
        return value

    def text(self, *keys: str | int) -> str:
        """Return a string."""
        return str(self._require_type(keys, (str,), "a string"))

    def mapping(self, *keys: str | int) -> Mapping[str, Any]:
        """Return a mapping; an empty one for null."""
        found: Mapping[str, Any] = {}
        return found if self(*keys) is None else self._require_type(keys, (dict,), "a mapping")

    def count(self, *keys: str | int) -> int:
        """Return a whole number."""
        return int(self._require_type(keys, (int,), "a whole number"))

    def number(self, *keys: str | int) -> float:
        """Return a finite number. Raises ValueError if it is none."""
        value = float(self._require_type(keys, (int, float), "a number"))
        if not math.isfinite(value):
            raise ValueError(
                f"{self.path}: {_dotted(keys)} is {value}, expected a finite number. The run "
                "diverged: lower training.learning_rate or raise training.warmup_steps, and train "
                "it again."
            )
        return value

    def number_or_none(self, *keys: str | int) -> float | None:
        """Return a finite number, or None for null."""
        return None if self(*keys) is None else self.number(*keys)


def _dotted(keys: tuple[str | int, ...]) -> str:
    return ".".join(map(str, keys))


def open_metrics(path: Path) -> Reader:
    """Open a metrics.json. Raises ValueError when it cannot be read, or has another version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the metrics in {path} ({error}): evaluate the run again."
        ) from None
    read = Reader(path, raw)
    found = raw.get("version") if isinstance(raw, dict) and "version" in raw else None
    if found != METRICS_VERSION or raw.get("format") != METRICS_FORMAT:
        raise ValueError(
            f"{path} has metrics of version {found}; this Retort reads version {METRICS_VERSION}: evaluate the run "
            "again."
        )
    return read


def read_scorecard(read: Reader, *, whose: str) -> Scorecard | None:
    """Return the scorecard of "student" or "teacher"; None without a teacher."""
    section = {"student": "validation", "teacher": "teacher_validation"}[whose]
    if read(section) is None:
        return None
    metrics = {
        name: _read_estimate(read, (section, name), ("intervals", section, name))
        for name in METRICS
        if name in read(section) and read(section, name) is not None
    }
    count = len(read("reliability", whose) or ())
    bins = tuple(_read_bin(read, ("reliability", whose, i)) for i in range(count))
    return Scorecard(metrics, bins)


def read_breakdown(read: Reader) -> dict[str, tuple[ClassRow, ...]]:
    """Return the classes of each breakdown by its name, in the order of the file."""
    found = {}
    for kind, rows in read.mapping("breakdown").items():
        found[kind] = tuple(_read_class(read, ("breakdown", kind, i)) for i in range(len(rows)))
    return found


def _read_class(read: Reader, keys: tuple[str | int, ...]) -> ClassRow:
    names = [name for name in read(*keys, "intervals") if read(*keys, name) is not None]
    return ClassRow(
        name=read.text(*keys, "class"),
        positions=read.count(*keys, "positions"),
        documents=read.count(*keys, "documents"),
        metrics={
            name: _read_estimate(read, (*keys, name), (*keys, "intervals", name)) for name in names
        },
    )


def _read_bin(read: Reader, keys: tuple[str | int, ...]) -> Bin:
    ends = [read.number_or_none(*keys, end) for end in ("low", "high")]
    return Bin(
        positions=read.count(*keys, "positions"),
        confidence=read.number(*keys, "confidence"),
        accuracy=Estimate(read.number(*keys, "accuracy"), *ends),
    )


def _read_estimate(
    read: Reader, value: tuple[str | int, ...], interval: tuple[str | int, ...]
) -> Estimate:
    ends: list[float | None] = [None, None]
    if read(*interval) is not None:
        ends = [read.number(*interval, end) for end in (0, 1)]
    return Estimate(read.number(*value), *ends)
