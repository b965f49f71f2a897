"""One metrics.json, read key by key: a scorecard of the student and of its teacher, and their classes.

What is not defined is None. A number that is missing, not finite or of another type is refused by its key.
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
    """A bin of confidence: positions in it, their mean confidence and accuracy, and the interval of the latter."""

    positions: int
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class ClassRow:
    """The positions of one class: how many, and their metrics by name."""

    name: str
    positions: int
    documents: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Scorecard:
    """A model's metrics by name (those that are defined), and its reliability curve."""

    metrics: Mapping[str, Estimate]
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class Reader:
    """Looks keys up in one metrics.json, and says which key of which file is wrong."""

    path: Path
    raw: Any

    def __call__(self, *keys: str | int) -> Any:
        """Return the value under nested keys; None where it, or what should hold it, is null."""
        value = self.raw
        for depth, key in enumerate(keys):
            if value is None and depth:
                return None
            has_key = isinstance(value, Mapping) and key in value
            if not has_key and not (isinstance(value, list) and key in range(len(value))):
                raise ValueError(f"{self.path} has no {_dotted(keys)!r}: evaluate the run again.")
            value = value[key]
        return value

    def _checked(self, keys: tuple[str | int, ...], types: tuple[type, ...], expected: str) -> Any:
        value = self(*keys)
        if not isinstance(value, types) or isinstance(value, bool):
            found = f"{self.path}: {_dotted(keys)} is {value!r}"
            raise ValueError(f"{found}, expected {expected}. Evaluate the run again.")
        return value

    def text(self, *keys: str | int) -> str:
        return str(self._checked(keys, (str,), "a text"))

    def mapping(self, *keys: str | int) -> Mapping[str, Any]:
        """Return a section; an empty one where it is null."""
        found: Mapping[str, Any] = {}
        return found if self(*keys) is None else self._checked(keys, (dict,), "a mapping")

    def count(self, *keys: str | int) -> int:
        return int(self._checked(keys, (int,), "a whole number"))

    def number(self, *keys: str | int) -> float:
        value = float(self._checked(keys, (int, float), "a number"))
        if not math.isfinite(value):
            raise ValueError(
                f"{self.path}: {_dotted(keys)} is {value}, expected a finite number. The run "
                "diverged: lower training.learning_rate or raise training.warmup_steps, and train "
                "it again."
            )
        return value

    def number_or_none(self, *keys: str | int) -> float | None:
        return None if self(*keys) is None else self.number(*keys)


def _dotted(keys: tuple[str | int, ...]) -> str:
    return ".".join(map(str, keys))


def open_metrics(path: Path) -> Reader:
    """Open a metrics.json. Raises ValueError where it cannot be read, or is not of this version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no readable metrics in {path} ({error}): evaluate the run again."
        ) from None
    read = Reader(path, raw)
    found = raw.get("version") if isinstance(raw, dict) and "version" in raw else None
    if found != METRICS_VERSION or raw.get("format") != METRICS_FORMAT:
        raise ValueError(
            f"{path} holds metrics of version {found}; this Retort reads version {METRICS_VERSION}: evaluate the run "
            "again."
        )
    return read


def read_scorecard(read: Reader, *, whose: str) -> Scorecard | None:
    """Return the scorecard of "student" or "teacher"; None where there is no teacher."""
    section = {"student": "validation", "teacher": "teacher_validation"}[whose]
    if read(section) is None:
        return None
    metrics = {
        name: _read_estimate(read, (section, name), ("intervals", section, name))
        for name in METRICS
        if name in read(section) and read(section, name) is not None
    }
    count = len(read("reliability", whose) or ())
    bins = tuple(_read_bin(read, ("reliability", whose, place)) for place in range(count))
    return Scorecard(metrics, bins)


def read_breakdown(read: Reader) -> dict[str, tuple[ClassRow, ...]]:
    """Return the classes of each breakdown, in the order of the file."""
    found = {}
    for kind, rows in read.mapping("breakdown").items():
        places = [("breakdown", kind, place) for place in range(len(rows))]
        found[kind] = tuple(_read_class(read, place) for place in places)
    return found


def _read_class(read: Reader, place: tuple[str | int, ...]) -> ClassRow:
    names = [name for name in read(*place, "intervals") if read(*place, name) is not None]
    return ClassRow(
        name=read.text(*place, "class"),
        positions=read.count(*place, "positions"),
        documents=read.count(*place, "documents"),
        metrics={
            name: _read_estimate(read, (*place, name), (*place, "intervals", name))
            for name in names
        },
    )


def _read_bin(read: Reader, place: tuple[str | int, ...]) -> Bin:
    ends = [read.number_or_none(*place, end) for end in ("low", "high")]
    return Bin(
        positions=read.count(*place, "positions"),
        confidence=read.number(*place, "confidence"),
        accuracy=Estimate(read.number(*place, "accuracy"), *ends),
    )


def _read_estimate(
    read: Reader, value: tuple[str | int, ...], interval: tuple[str | int, ...]
) -> Estimate:
    ends: list[float | None] = [None, None]
    if read(*interval) is not None:
        ends = [read.number(*interval, place) for place in (0, 1)]
    return Estimate(read.number(*value), *ends)
