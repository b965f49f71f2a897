"""Measured runs: metrics.json and training_log.csv -> records, and what may be compared.

A *group* is the runs evaluated on the same held-out positions: only within a group are losses
compared. The *baseline* of a distilled run is the cross-entropy run (`output`) of its group that
differs in nothing but in what it learns from: the same student, start, seed, steps, learning rate,
batch, precision. What a run does not define is None.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from retort.config.load import names_artefacts
from retort.config.schema import flatten, section_schema
from retort.models.samples import SAMPLES_FILE, Samples, read_samples
from retort.report.scorecards import (
    ClassRow,
    Reader,
    Scorecard,
    open_metrics,
    read_breakdown,
    read_scorecard,
)

# Keys of run.json that say what a setting of its own says already, or when and how something ran.
_SAID_OTHERWISE = {
    *("finished", "training.distillation_type", "training.alpha", "training.temperature"),
    *("training.seed", "training.max_steps", "training.device"),
}
# Settings of a run that name it, in which it may differ from its baseline: what it learns from the teacher, and how;
# what rounds otherwise; how its steps are said, which are compared themselves; the length that the corpus has anyway.
_NOT_COMPARED = {
    *("training.distillation_type", "training.alpha", "training.temperature"),
    *("training.divergence", "training.use_cached_logits"),
    *("training.cpu_threads", "training.use_gradient_checkpointing"),
    *("training.max_steps", "training.num_epochs"),
}
STUDENT_SIZE, VALIDATION_SET, SETTINGS = "student parameters", "validation set", "settings"


@dataclass(frozen=True)
class CacheFacts:
    """What a run's logit cache costs and keeps: bytes and probability per position, KL in nats."""

    method: str
    dial: str  # what the method keeps: k = 64, p >= 0.003
    positions: int
    bytes_per_position: float
    tail_mass: float
    fidelity_kl: float
    fidelity_agreement: float

    @property
    def keeps_all(self) -> bool:
        """Whether nothing of the teacher's distributions is left out."""
        return self.method == "top_k" and self.tail_mass < 1e-9


@dataclass(frozen=True)
class Record:
    """One metrics.json. Losses and KL: nats per token, held-out positions; None = not defined."""

    path: Path
    name: str
    id: str
    distillation_type: str
    alpha: float | None
    temperature: float | None
    seed: int
    student_parameters: int
    teacher: str | None
    teacher_parameters: int | None
    steps: int
    trained_tokens: int
    training_seconds: float
    device: str
    positions: int
    documents: int
    content: str | None  # digest of the held-out sequences
    sequences: int
    leaked_sequences: int  # of them, those that are in the training text too
    loss: float
    perplexity: float
    kl_to_teacher: float | None
    agreement: float | None
    teacher_loss: float | None
    teacher_perplexity: float | None
    card: Scorecard
    teacher_card: Scorecard | None
    breakdown: Mapping[str, tuple[ClassRow, ...]]
    not_defined: Mapping[str, str]  # why a metric is None
    trained: Mapping[str, Any]  # of run.json, by dotted names: commit, training.alpha
    cache: CacheFacts | None

    @property
    def folder(self) -> Path:
        """The run's folder: final/ and training_log.csv lie in it (the metrics may lie deeper)."""
        above = [p.parent for p in self.path.parents if p.name == "evaluation"]
        return above[0] if above else self.path.parent

    @property
    def is_distilled(self) -> bool:
        """Whether the teacher's distributions are part of the loss."""
        return self.distillation_type != "output"


@dataclass(frozen=True)
class TrainingLog:
    """One run's learning curve: steps, and the hard loss (nats/token) of each logging interval."""

    steps: tuple[int, ...]
    hard_loss: tuple[float, ...]


def load_metrics(paths: Sequence[Path]) -> list[Record]:
    """Read the metrics.json of each run, in the order given; equal names get their id behind them.

    Raises ValueError where there is nothing to read, a number is missing or not finite, or a run
    comes twice.
    """
    records = [_read_record(Path(path)) for path in paths]
    if not records:
        raise ValueError("no runs to report on: give the metrics.json of one run at least.")
    times = Counter(r.name for r in records)
    records = [replace(r, name=f"{r.name} {r.id[:6]}") if times[r.name] > 1 else r for r in records]
    for name, count in Counter(r.name for r in records).items():
        if count > 1:
            places = ", ".join(str(r.path) for r in records if r.name == name)
            raise ValueError(f"run {name!r} is given {count} times: {places}. Give each run once.")
    return records


def _read_record(path: Path) -> Record:
    read = open_metrics(path)
    card = read_scorecard(read, whose="student")
    teacher_card = read_scorecard(read, whose="teacher")
    read.number("validation", "loss")  # of a student there is always one
    assert card is not None, path
    return Record(
        path=path,
        name=read.text("run"),
        id=read.text("id"),
        distillation_type=read.text("distillation_type"),
        alpha=read.number_or_none("alpha"),
        temperature=read.number_or_none("temperature"),
        seed=read.count("seed"),
        student_parameters=read.count("student_parameters"),
        teacher=None if read("teacher") is None else read.text("teacher"),
        teacher_parameters=(
            None if read("teacher_parameters") is None else read.count("teacher_parameters")
        ),
        steps=read.count("steps"),
        trained_tokens=read.count("trained_tokens"),
        training_seconds=read.number("training_seconds"),
        device=read.text("device"),
        positions=read.count("validation", "positions"),
        documents=read.count("validation", "documents"),
        content=None
        if read("validation", "content") is None
        else read.text("validation", "content"),
        sequences=read.count("validation", "sequences"),
        leaked_sequences=read.count("validation", "leaked_sequences"),
        loss=read.number("validation", "loss"),
        perplexity=read.number("validation", "perplexity"),
        kl_to_teacher=read.number_or_none("validation", "kl_to_teacher"),
        agreement=read.number_or_none("validation", "agreement"),
        teacher_loss=read.number_or_none("teacher_validation", "loss"),
        teacher_perplexity=read.number_or_none("teacher_validation", "perplexity"),
        card=card,
        teacher_card=teacher_card,
        breakdown=read_breakdown(read),
        trained=dict(flatten(read.mapping("trained"))),
        not_defined={str(k): str(v) for k, v in read.mapping("not_defined").items()},
        cache=None if read("cache") is None else _read_cache(read),
    )


def _read_cache(read: Reader) -> CacheFacts:
    return CacheFacts(
        method=read.text("cache", "method"),
        dial=_describe_dial(read),
        positions=read.count("cache", "positions"),
        bytes_per_position=read.number("cache", "bytes_per_position"),
        tail_mass=read.number("cache", "tail_mass"),
        fidelity_kl=read.number("cache", "fidelity_kl"),
        fidelity_agreement=read.number("cache", "fidelity_agreement"),
    )


def _describe_dial(read: Reader) -> str:
    top_k = read("cache", "top_k")
    return f"p >= {read.number('cache', 'min_probability'):g}" if top_k is None else f"k = {top_k}"


def load_logs(records: Sequence[Record]) -> list[TrainingLog | None]:
    """Read each run's training_log.csv; None where there is none, or no row in it.

    Raises ValueError where a log is not what `train` writes, or holds NaN.
    """
    return [_read_log(record.folder / "training_log.csv") for record in records]


def _read_log(path: Path) -> TrainingLog | None:
    if not path.exists():
        return None
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        points = [(int(row["step"]), float(row["hard_loss"])) for row in rows if row["hard_loss"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no training log as `train` writes it: {error!r}.") from None
    for step, loss in points:
        if not math.isfinite(loss):
            raise ValueError(
                f"{path}: hard_loss is {loss} at step {step}, expected a finite number. The run "
                "diverged: lower training.learning_rate, and train it again."
            )
    return TrainingLog(tuple(s for s, _ in points), tuple(x for _, x in points)) if points else None


def load_samples(records: Sequence[Record]) -> list[dict[str, Samples]]:
    """Read what each run's student, and its teacher, wrote; nothing where there is no samples.json."""
    paths = [record.path.with_name(SAMPLES_FILE) for record in records]
    return [
        read_samples(path, of=record.id, whose="student") if path.exists() else {}
        for path, record in zip(paths, records, strict=True)
    ]


def group_runs(records: Sequence[Record]) -> list[list[Record]]:
    """Return the runs by held-out sequences; groups, and runs within them, in the order given."""
    groups: dict[tuple[int, int, str | None], list[Record]] = {}
    for record in records:
        groups.setdefault((record.positions, record.documents, record.content), []).append(record)
    return list(groups.values())


@cache
def _compared_settings() -> dict[str, Any]:
    """Return the settings that a run and its baseline must share, by dotted names, with their defaults."""
    schemas = {name: section_schema(name) for name in ("student", "training")}
    return {
        f"{section}.{key}": sub["default"]
        for section, schema in schemas.items()
        for key, sub in schema["properties"].items()
        if names_artefacts(sub, schema) and f"{section}.{key}" not in _NOT_COMPARED
    }


def compared_conditions(record: Record) -> dict[str, Any]:
    """Return by name what two runs must have in common for a margin between them; keys as in the config.

    A setting that a run does not know is at its default. A run of which no setting is known is like no other.
    """
    settings = {k: record.trained.get(k, value) for k, value in _compared_settings().items()}
    is_known = any(key.startswith(("student.", "training.")) for key in record.trained)
    return settings | {
        VALIDATION_SET: (record.content, record.positions, record.documents),
        STUDENT_SIZE: record.student_parameters,
        "training.seed": record.seed,
        "training.max_steps": record.steps,
        SETTINGS: "known" if is_known else f"those of {record.id} are not",
    }


def find_differences(record: Record, other: Record) -> dict[str, tuple[Any, Any]]:
    """Return what stands between two runs and a margin, by name: what each of them has."""
    mine, theirs = compared_conditions(record), compared_conditions(other)
    return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def find_baseline(
    record: Record, records: Sequence[Record], *, baseline: str | None = None
) -> Record | None:
    """Return the cross-entropy run to compare `record` with, or the one named where it fits; whatever their order."""
    if not record.is_distilled:
        return None
    named = [r for r in records if not r.is_distilled and baseline in (None, r.name)]
    alike = [r for r in named if not find_differences(record, r)]
    return min(alike, key=lambda r: r.id, default=None)


def find_nearest(
    record: Record, records: Sequence[Record], *, baseline: str | None = None
) -> Record | None:
    """Return the cross-entropy run with the fewest differences from `record`; None where there is none at all."""

    def distance(other: Record) -> tuple[bool, int, str]:
        found = find_differences(record, other)
        return VALIDATION_SET in found, len(found), other.id

    plain = [r for r in records if not r.is_distilled and baseline in (None, r.name)]
    return min(plain, key=distance, default=None)


def find_teachers(group: Sequence[Record]) -> list[Record]:
    """Return one record of the group for each teacher in it; equal but for rounding is equal."""
    found: list[Record] = []
    for record in group:
        if record.teacher is None:
            continue
        if not any(_has_same_teacher(record, other) for other in found):
            found.append(record)
    return found


def _has_same_teacher(one: Record, other: Record) -> bool:
    if (one.teacher, one.teacher_parameters) != (other.teacher, other.teacher_parameters):
        return False
    if one.teacher_loss is None or other.teacher_loss is None:
        return one.teacher_loss is other.teacher_loss
    return math.isclose(one.teacher_loss, other.teacher_loss, abs_tol=1e-3)


def find_caches(records: Sequence[Record]) -> list[tuple[list[str], CacheFacts]]:
    """Return each cache once, with the names of the runs that learned from it."""
    users: dict[CacheFacts, list[str]] = {}
    for record in records:
        if record.cache is not None and record.is_distilled:
            users.setdefault(record.cache, []).append(record.name)
    return [(names, cache) for cache, names in users.items()]


def find_settings(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the settings that metrics.json records, by name: a text for each run, or a dash.

    Of run.json, the commit and the versions, and those keys of the config in which runs differ.
    """
    return {**_find_own_settings(records), **_find_trained(records)}


def _find_trained(records: Sequence[Record]) -> dict[str, list[str]]:
    found = {}
    for key in sorted({key for r in records for key in r.trained} - _SAID_OTHERWISE):
        texts = [str(r.trained.get(key, "-")) for r in records]
        if key.startswith(("versions.", "commit", "python")) or len(set(texts)) > 1:
            found[key.removeprefix("versions.")] = texts
    return found


def _find_own_settings(records: Sequence[Record]) -> dict[str, list[str]]:
    return {
        "distillation type": [r.distillation_type for r in records],
        "alpha": ["-" if r.alpha is None else f"{r.alpha:g}" for r in records],
        "temperature": [
            f"{r.temperature:g}" if r.temperature and r.is_distilled else "-" for r in records
        ],
        "seed": [str(r.seed) for r in records],
        "steps": [f"{r.steps:,}" for r in records],
        "trained tokens": [f"{r.trained_tokens:,}" for r in records],
        "student parameters": [f"{r.student_parameters:,}" for r in records],
        "teacher": [r.teacher or "-" for r in records],
        "cache": [
            f"{r.cache.method}, {r.cache.dial}" if r.cache and r.is_distilled else "-"
            for r in records
        ],
        "device": [r.device for r in records],
    }
