"""What was estimated before a run, beside what it took: tokens, bytes, time and memory.

Time and memory are compared only where they were measured whole, on the kind of device that was estimated, and after
the estimate was made.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from retort.cache.cost import CacheCost
from retort.estimate.records import Device, Estimate, RunEstimate, TeacherEstimate
from retort.evaluation.records import Metrics
from retort.io.run_record import RUN_FILE, RunRecord
from retort.io.units import format_bytes, format_duration
from retort.teacher.records import CacheRun, Manifest
from retort.tokens.index import IndexRecord

COLUMNS = ("subject", "quantity", "estimated", "actual", "ratio", "basis")
_EARLIER = "not measured: made before the estimate"
_RESUMED = "not measured: interrupted and resumed"
_NO_RECORD = "not measured"


@dataclass(frozen=True)
class Records:
    """Where the estimate of a config is kept, and the index.json and manifest.json of its texts and caches."""

    estimate: Path
    tokens: Sequence[Path] = ()
    caches: Sequence[Path] = ()


@dataclass(frozen=True)
class Row:
    """A number beside its estimate. actual: None where it was not measured, and `why`; basis: of the estimate."""

    subject: str
    quantity: str
    estimated: float
    actual: float | None
    basis: str
    why: str = _NO_RECORD

    @property
    def cells(self) -> dict[str, str | float]:
        """The texts of a table's row, and the ratio of what was taken to what was estimated, NaN without one."""
        write = _WRITERS[self.quantity]
        has_ratio = self.actual is not None and self.estimated > 0
        return {
            "subject": self.subject,
            "quantity": self.quantity,
            "estimated": write(self.estimated),
            "actual": self.why if self.actual is None else write(self.actual),
            "ratio": self.actual / self.estimated if has_ratio and self.actual else np.nan,
            "basis": self.basis,
        }


_WRITERS: dict[str, Callable[[float], str]] = {
    "tokens": "{:,.0f}".format,
    "bytes": format_bytes,
    "time": format_duration,
    "peak memory": format_bytes,
}


def compare_with_estimate(records: Records | None, metrics: Mapping[str, Metrics]) -> pd.DataFrame:
    """Return a row for each number that was estimated; none without a kept estimate.

    metrics: of the runs, by name. Raises ValueError where a record is damaged.
    """
    rows: list[Row] = []
    if records is not None and records.estimate.exists():
        found = Estimate.read(records.estimate)
        rows += _compare_texts(found, records.tokens)
        rows += _compare_caches(found, records.caches)
        by_name = {m.training.run: m for m in metrics.values()}
        for run in found.runs:
            if run.name in by_name:
                rows += _compare_run(run, by_name[run.name], found)
    return pd.DataFrame([row.cells for row in rows], columns=list(COLUMNS))


def _compare_texts(found: Estimate, paths: Sequence[Path]) -> Iterator[Row]:
    by_id = {path.parent.name: path for path in paths}
    for text in found.texts:
        path, actual, why = by_id.get(text.id), None, _NO_RECORD
        if path is not None and path.exists():
            actual = IndexRecord.read(path).train.tokens
        if _is_earlier(_read_made(path), found):
            actual, why = None, _EARLIER
        yield Row(f"text {text.name}", "tokens", text.tokens, actual, text.basis, why)


def _compare_caches(found: Estimate, paths: Sequence[Path]) -> Iterator[Row]:
    by_id = {path.parent.name: path for path in paths}
    for cache, teacher in zip(found.caches, found.teachers, strict=True):
        path = by_id.get(cache.id)
        manifest = Manifest.read(path) if path is not None and path.exists() else None
        size, basis = float(cache.record_bytes), _describe_basis(cache.basis)
        # The plan was made from the teacher's own held-out scores, before its pass.
        if path is not None and (plan_path := path.with_name("plan.json")).exists():
            plan = CacheCost.read(plan_path)
            size, basis = float(plan.record_bytes), f"{_describe_basis(plan.basis)} (plan)"
        actual = manifest.bytes_per_position * manifest.positions if manifest else None
        yield Row(f"cache {cache.method}", "bytes", size, actual, basis)
        yield from _compare_pass(teacher, manifest, path, found)


def _compare_pass(
    teacher: TeacherEstimate, manifest: Manifest | None, path: Path | None, found: Estimate
) -> Iterator[Row]:
    """Yield the time of a teacher's pass, of all its workers together, and the memory of the greatest of them."""
    seconds = memory = None
    why = _NO_RECORD
    if path is not None and manifest is not None and path.with_name(RUN_FILE).exists():
        made = CacheRun.read(path.with_name(RUN_FILE))
        devices = {worker.made.device for worker in made.workers}
        why = _find_obstacle(made.finished, devices, found)
        if not why and sum(worker.tokens for worker in made.workers) != manifest.tokens:
            why = _RESUMED
        if not why:
            seconds = sum(worker.made.seconds for worker in made.workers)
            peaks = [worker.peak_memory for worker in made.workers]
            memory = max((peak for peak in peaks if peak is not None), default=None)
    basis = _describe_speed(teacher.is_timed)
    subject = f"pass of {teacher.name}"
    estimated = 3600 * teacher.hours * teacher.copies
    yield Row(subject, "time", estimated, seconds, basis, why or _NO_RECORD)
    if teacher.gpus_per_model == 1 or found.device.memory is None:
        estimated = teacher.measured_memory or teacher.memory.peak
        basis = _describe_memory(teacher.measured_memory)
        yield Row(subject, "peak memory", estimated, memory, basis, why or _NO_RECORD)


def _compare_run(run: RunEstimate, metrics: Metrics, found: Estimate) -> Iterator[Row]:
    """Yield the time of a training, and its memory on its fullest GPU."""
    summary, trained = metrics.training.summary, metrics.trained
    why = _find_obstacle(trained.finished if trained else None, {summary.device}, found)
    if summary.resumed_step:
        why = _RESUMED
    elif not why and summary.steps != run.steps:
        why = f"not measured: {summary.steps:,} of {run.steps:,} steps"
    seconds, memory = (None, None) if why else (summary.seconds, summary.peak_memory)
    subject, speed = f"training of {run.name}", _describe_speed(run.is_timed)
    yield Row(subject, "time", 3600 * run.hours, seconds, speed, why or _NO_RECORD)
    estimated = run.measured_memory or run.memory.peak
    basis = _describe_memory(run.measured_memory)
    yield Row(subject, "peak memory", estimated, memory, basis, why or _NO_RECORD)


def _find_obstacle(finished: str | None, devices: set[str], found: Estimate) -> str:
    """Return why what was taken cannot be compared with an estimate; "" where it can."""
    if _is_earlier(finished, found):
        return _EARLIER
    if not devices or not all(_is_of_kind(device, found.device) for device in devices):
        return "not measured: another device than the estimate's"
    return ""


def _is_of_kind(device: str, estimated: Device) -> bool:
    """Say whether a job's device is of the kind that was estimated; CPUs must have one name."""
    is_cpu = device.startswith("cpu (")
    if estimated.memory is not None or not is_cpu:
        return estimated.memory is not None and not is_cpu
    return estimated.name.removesuffix(", cores") in device


def _is_earlier(finished: str | None, found: Estimate) -> bool:
    return finished is not None and finished < found.made


def _read_made(path: Path | None) -> str | None:
    """Return when an output was finished, None where its run.json does not say so."""
    if path is None:
        return None
    with contextlib.suppress(ValueError):
        return RunRecord.read(path.with_name(RUN_FILE)).finished
    return None


def _describe_basis(basis: str) -> str:
    return {
        "sample": "a sample of the teacher's distributions",
        "codec": "the codec: at most",
        "table": "a usual teacher",
    }[basis]


def _describe_memory(measured: int | None) -> str:
    return "the formula" if measured is None else "measured on a sample"


def _describe_speed(is_timed: bool) -> str:
    return "speed measured on a sample" if is_timed else "speed assumed"
