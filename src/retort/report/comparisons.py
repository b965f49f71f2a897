"""What a distilled run gained over cross-entropy, and how sure that is, from what both said of the same documents.

The *margin* of a run is its held-out loss minus its baseline's (see `records`): negative is better. The *gap* is what
learning from the teacher's whole distributions (FullKD: `logit` from a live teacher, or from a cache that leaves
nothing out) gains over cross-entropy; a run closes a share of it. Both are means over the same held-out documents, so
their intervals draw the documents for all runs at once (room `intervals`).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import (
    DOCUMENTS_FILE,
    METRICS,
    OF_MODEL,
    compare_losses,
    read_document_sums,
)
from retort.report.records import CacheFacts, Record, find_baseline, find_differences

# Of a record: what is no number, or has columns of its own with the ends of its interval.
_NO_COLUMN = {
    *("path", "cache", "card", "teacher_card", "breakdown", "not_defined", "trained"),
    *("loss", "perplexity", "kl_to_teacher", "agreement", "teacher_loss", "teacher_perplexity"),
}

_OF_LOSS = ("loss", "perplexity", "bits_per_byte")  # rise and fall together on the same text


@dataclass(frozen=True)
class Comparison:
    """A run beside its baseline, nats/token; `gap_closed` is a share, None where no FullKD run shows a gap."""

    baseline: Record
    margin: Estimate
    gap_closed: Estimate | None


def compare_with_baseline(
    record: Record, records: Sequence[Record], *, baseline: str | None = None
) -> Comparison | None:
    """Return what a distilled run gained over the cross-entropy run that it can be compared with; None without one.

    Without the documents.csv of both there is no interval, and no share of the gap.
    """
    other = find_baseline(record, records, baseline=baseline)
    if other is None:
        return None
    full = find_full(record, records)
    if not all(map(has_documents, (record, other))):
        return Comparison(other, compare_losses_of(record, other), None)
    compared = [record, other, *([full] if full and has_documents(full) else [])]
    found = _compare(tuple(map(_stamp, compared)))
    return Comparison(other, found["margin"], found.get("gap_closed"))


def compare_losses_of(one: Record, other: Record) -> Estimate:
    """Return the held-out loss of one run minus another's on the same documents; without their sums, no interval."""
    if not all(map(has_documents, (one, other))):
        return Estimate(one.loss - other.loss, None, None)
    return _compare((_stamp(one), _stamp(other)))["margin"]


def has_documents(record: Record) -> bool:
    """Say whether the sums of each document, which intervals of differences are drawn from, lie beside the metrics."""
    return record.path.with_name(DOCUMENTS_FILE).exists()


def find_full(record: Record, records: Sequence[Record]) -> Record | None:
    """Return the run that learned from all that the teacher says, and is otherwise like `record`; None without one."""
    if not record.is_distilled:
        return None
    alike = [
        r
        for r in records
        if is_full(r)
        and not find_differences(record, r)
        and (r.teacher, r.temperature) == (record.teacher, record.temperature)
    ]
    return min(alike, key=lambda r: r.id, default=None)


def is_full(record: Record) -> bool:
    """Say whether a run learned from the teacher's whole distributions alone, by KL(teacher || student)."""
    is_whole = record.cache is None or record.cache.keeps_all
    is_forward = record.trained.get("training.divergence", "forward_kl") == "forward_kl"
    return record.distillation_type == "logit" and is_whole and is_forward


def find_best(group: Sequence[Record], name: str) -> Record | None:
    """Return the run that is best by a metric beyond the chance of the documents; None where no run clearly is.

    By losses, runs are compared document by document; by other metrics, their intervals must not touch.
    """
    sign = 1 if METRICS[name].is_less_better else -1
    known = sorted(
        (r for r in group if name in r.card.metrics),
        key=lambda r: sign * r.card.metrics[name].value,
    )
    if len(known) < 2:
        return None
    best, *others = known
    return best if all(_is_clearly_better(best, other, name) for other in others) else None


def _is_clearly_better(one: Record, other: Record, name: str) -> bool:
    if name in _OF_LOSS and all(map(has_documents, (one, other))):
        margin = compare_losses_of(one, other)
        return margin.high is not None and margin.high < 0
    mine, theirs = one.card.metrics[name].ends, other.card.metrics[name].ends
    if mine is None or theirs is None:
        return False
    return mine[1] < theirs[0] if METRICS[name].is_less_better else mine[0] > theirs[1]


class _Stamp(NamedTuple):
    """A run's sums by document; the file's time and size are there to forget what it was before."""

    path: Path
    time: int
    size: int
    loss: float


def _stamp(record: Record) -> _Stamp:
    path = record.path.with_name(DOCUMENTS_FILE)
    about = path.stat()
    return _Stamp(path, about.st_mtime_ns, about.st_size, record.loss)


@lru_cache(maxsize=256)
def _compare(files: tuple[_Stamp, ...]) -> dict[str, Estimate]:
    """Compare run, baseline and perhaps FullKD. Raises ValueError for sums of another run, or of other documents."""
    tables = [read_document_sums(file.path) for file in files]
    for file, table in zip(files, tables, strict=True):
        loss = float(table["loss"].sum() / table["positions"].sum())
        if not math.isclose(loss, file.loss, rel_tol=1e-6):
            raise ValueError(
                f"{file.path} sums up to a loss of {loss:.6f}, but metrics.json beside it says {file.loss:.6f}: one of "
                "them is another run's. Evaluate the run again."
            )
        if not all(
            np.array_equal(table[name], tables[0][name]) for name in ("document", "positions")
        ):
            raise ValueError(
                f"{file.path} and {files[0].path} are not of the same documents, though their metrics say so: evaluate "
                "both runs again."
            )
    names = ("run", "plain", "full")
    losses = {name: table["loss"] for name, table in zip(names, tables, strict=False)}
    found = compare_losses(losses, tables[0]["positions"])
    assert all(math.isfinite(e.value) for e in found.values()), found
    return found


def render_csv(records: Sequence[Record]) -> str:
    """Return the table of runs with all digits; an empty cell is not defined. Ends of intervals: _low and _high."""
    plain = [f.name for f in fields(Record) if f.name not in _NO_COLUMN]
    rows = [
        {name: getattr(record, name) for name in plain}
        | _columns_of("", record.card.metrics)
        | _columns_of("teacher_", record.teacher_card.metrics if record.teacher_card else {})
        | _columns_of_comparison(compare_with_baseline(record, records))
        | {f"cache_{f.name}": getattr(record.cache, f.name, None) for f in fields(CacheFacts)}
        for record in records
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _columns_of(whose: str, found: Mapping[str, Estimate]) -> dict[str, float | None]:
    names = OF_MODEL if whose else tuple(METRICS)
    return {
        f"{whose}{name}{end}": value
        for name in names
        for end, value in _ends(found.get(name)).items()
    }


def _columns_of_comparison(found: Comparison | None) -> dict[str, float | None]:
    estimates = {
        "margin": found.margin if found else None,
        "gap_closed": found.gap_closed if found else None,
    }
    return {
        f"{name}{end}": value
        for name, estimate in estimates.items()
        for end, value in _ends(estimate).items()
    }


def _ends(found: Estimate | None) -> dict[str, float | None]:
    if found is None:
        return dict.fromkeys(("", "_low", "_high"))
    return {"": found.value, "_low": found.low, "_high": found.high}
