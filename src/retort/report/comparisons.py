"""Margins of distilled runs over cross-entropy, with intervals, from the losses on each held-out document.

The *margin* of a run is its held-out loss minus its baseline's (see `records`): negative is better. The *gap* is what
training on the teacher's full distributions (FullKD: `logit` from a live teacher, or from a cache that keeps every
token) gains over cross-entropy; a run closes a share of it. All runs are measured on the same documents, so the
intervals resample the documents of all runs together (`intervals`).
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

# Fields of a record that are not numbers or strings, or have columns of their own with an interval.
_NO_COLUMN = {
    *("path", "cache", "card", "teacher_card", "breakdown", "not_defined", "trained"),
    *("loss", "perplexity", "kl_to_teacher", "agreement", "teacher_loss", "teacher_perplexity"),
}

# The column "cache_dial" keeps its name for scripts that read summary.csv.
_CACHE_COLUMNS = {"setting": "dial"}
_LOSS_METRICS = ("loss", "perplexity", "bits_per_byte")  # monotone in each other on the same text


@dataclass(frozen=True)
class Comparison:
    """A run compared with its baseline; margin in nats/token; `gap_closed` is a share, None without a clear gap."""

    baseline: Record
    margin: Estimate
    gap_closed: Estimate | None


def compare_with_baseline(
    record: Record, records: Sequence[Record], *, baseline: str | None = None
) -> Comparison | None:
    """Compare a distilled run with its baseline among `records`; None without one.

    Without the documents.csv of both there is no interval and no share of the gap.
    Raises ValueError when a documents.csv does not match its metrics.json, or the runs' documents differ.
    """
    other = find_baseline(record, records, baseline=baseline)
    if other is None:
        return None
    full = find_full(record, records)
    if not all(map(has_documents, (record, other))):
        return Comparison(other, compare_losses_of(record, other), None)
    compared = [record, other, *([full] if full and has_documents(full) else [])]
    found = _compare(tuple(map(_identify, compared)))
    return Comparison(other, found["margin"], found.get("gap_closed"))


def compare_losses_of(one: Record, other: Record) -> Estimate:
    """Return the held-out loss of one run minus another's on the same documents; no interval without documents.csv."""
    if not all(map(has_documents, (one, other))):
        return Estimate(one.loss - other.loss, None, None)
    return _compare((_identify(one), _identify(other)))["margin"]


def has_documents(record: Record) -> bool:
    """Whether there is a documents.csv, which intervals of differences need, beside the metrics."""
    return record.path.with_name(DOCUMENTS_FILE).exists()


def find_full(record: Record, records: Sequence[Record]) -> Record | None:
    """Return the FullKD run with the same teacher, temperature and settings as `record`; None without one."""
    if not record.is_distilled:
        return None
    matching = [
        r
        for r in records
        if is_full(r)
        and not find_differences(record, r)
        and (r.teacher, r.temperature) == (record.teacher, record.temperature)
    ]
    return min(matching, key=lambda r: r.id, default=None)


def is_full(record: Record) -> bool:
    """Whether a run learned only from the teacher's full distributions, by KL(teacher || student)."""
    is_whole = record.cache is None or record.cache.keeps_all
    is_forward = record.trained.get("training.divergence", "forward_kl") == "forward_kl"
    return record.distillation_type == "logit" and is_whole and is_forward


def find_best(group: Sequence[Record], name: str) -> Record | None:
    """Return the run that is clearly best in a metric; None if there is none.

    Losses are compared document by document; in other metrics, the intervals must not overlap.
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
    if name in _LOSS_METRICS and all(map(has_documents, (one, other))):
        margin = compare_losses_of(one, other)
        return margin.high is not None and margin.high < 0
    mine, theirs = one.card.metrics[name].ends, other.card.metrics[name].ends
    if mine is None or theirs is None:
        return False
    return mine[1] < theirs[0] if METRICS[name].is_less_better else mine[0] > theirs[1]


class _DocumentsFile(NamedTuple):
    """A run's documents.csv and loss, the key of a cache; time and size change when the file does."""

    path: Path
    time: int
    size: int
    loss: float


def _identify(record: Record) -> _DocumentsFile:
    path = record.path.with_name(DOCUMENTS_FILE)
    about = path.stat()
    return _DocumentsFile(path, about.st_mtime_ns, about.st_size, record.loss)


@lru_cache(maxsize=256)
def _compare(files: tuple[_DocumentsFile, ...]) -> dict[str, Estimate]:
    """Compare run, baseline and optionally FullKD. Raises ValueError for sums of another run or of other documents."""
    tables = [read_document_sums(file.path) for file in files]
    for file, table in zip(files, tables, strict=True):
        loss = float(table["loss"].sum() / table["positions"].sum())
        if not math.isclose(loss, file.loss, rel_tol=1e-6):
            raise ValueError(
                f"{file.path} gives a loss of {loss:.6f}, but metrics.json beside it has {file.loss:.6f}: one of them "
                "is another run's. Evaluate the run again."
            )
        if not all(
            np.array_equal(table[name], tables[0][name]) for name in ("document", "positions")
        ):
            raise ValueError(
                f"{file.path} and {files[0].path} have different documents, but their metrics.json name the same "
                "held-out text: evaluate both runs again."
            )
    names = ("run", "plain", "full")
    losses = {name: table["loss"] for name, table in zip(names, tables, strict=False)}
    found = compare_losses(losses, tables[0]["positions"])
    assert all(math.isfinite(e.value) for e in found.values()), found
    return found


def render_csv(records: Sequence[Record]) -> str:
    """Return the table of runs with all digits; empty cells are undefined; _low and _high are ends of intervals."""
    plain = [f.name for f in fields(Record) if f.name not in _NO_COLUMN]
    rows = [
        {name: getattr(record, name) for name in plain}
        | _columns_of("", record.card.metrics)
        | _columns_of("teacher_", record.teacher_card.metrics if record.teacher_card else {})
        | _columns_of_comparison(compare_with_baseline(record, records))
        | {
            f"cache_{_CACHE_COLUMNS.get(f.name, f.name)}": getattr(record.cache, f.name, None)
            for f in fields(CacheFacts)
        }
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
