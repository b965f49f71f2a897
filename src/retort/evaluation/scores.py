"""Metrics at positions -> the scores in metrics.json: means with intervals, also by class, and calibration.

Means are over all counted held-out positions: a document of twice the length counts twice.

Legend: P counted positions, D documents, R resamples of the documents, B bins of confidence.
"""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.evaluation.breakdowns import Classes
from retort.evaluation.intervals import DocumentSums, Estimate, basic_interval
from retort.evaluation.records import Bin, ClassRow, Scorecard, Scores
from retort.io.files import write_atomically

NUM_BINS = 15  # as in Guo et al.
DOCUMENTS_FILE = "documents.csv"
_DOCUMENT_COLUMNS = ("positions", "bytes", "loss", "kl_to_teacher", "teacher_loss")


class Metric(NamedTuple):
    """A metric's title in tables, its unit ("" for a share of 1), and whether less of it is better."""

    title: str
    unit: str
    is_less_better: bool


# Defined in `metrics` and in `summarise`.
METRICS = {
    "loss": Metric("held-out loss", "nats/token", True),
    "perplexity": Metric("perplexity", "tokens", True),
    "bits_per_byte": Metric("bits per byte", "bits/byte", True),
    "accuracy": Metric("top-1 accuracy", "", False),
    "calibration_error": Metric("calibration error (ECE)", "", True),
    "entropy": Metric("entropy", "nats/token", True),
    "kl_to_teacher": Metric("KL(teacher || student)", "nats/token", True),
    "reverse_kl": Metric("KL(student || teacher)", "nats/token", True),
    "agreement": Metric("top-1 agreement", "", False),
    "overlap": Metric("top-10 overlap", "", False),
    "acceptance": Metric("speculative acceptance", "", False),
}
OF_BOTH = ("kl_to_teacher", "reverse_kl", "agreement", "overlap", "acceptance")
OF_MODEL = tuple(name for name in METRICS if name not in OF_BOTH)
UNITS = {name: metric.unit for name, metric in METRICS.items()}
MAX_LOSS = 700.0  # exp(710) overflows
MAX_PERPLEXITY = math.exp(MAX_LOSS)
NO_TEACHER = "there is no teacher to compare with"
NO_BYTES = "the predicted tokens are not text"


def summarise(
    columns: Mapping[str, NDArray[np.generic]],
    documents_P: NDArray[np.int64],
    *,
    bytes_P: NDArray[np.int64] | str | None,
    classes: Mapping[str, Classes],
) -> tuple[Scores, DocumentSums]:
    """Return the scores from the columns [P] of `metrics.measure_positions`, and the sums that they are made from.

    `documents_P`: the document of each position. `bytes_P`: bytes of text of each predicted token, or why
    they are not defined.
    loss, accuracy, entropy and the metrics that compare teacher and student: means over positions.
    perplexity: exp(loss), at most MAX_PERPLEXITY, which tables show as "> 1e304".
    bits_per_byte: sum of losses / (ln 2 x sum of bytes); independent of the tokenizer, so models with different
    tokenizers can be compared (Gao et al.: The Pile, 2020, section 3.1).
    calibration_error: expected calibration error of the most probable token in 15 bins of equal width, sum_b n_b / n
    |accuracy_b - confidence_b| (Guo et al.: On Calibration of Modern Neural Networks, 2017, section 2).
    """
    columns = dict(columns) | {"positions": np.ones(len(documents_P))}
    if isinstance(bytes_P, np.ndarray) and bytes_P.sum() > 0:
        columns["bytes"] = bytes_P
    sums = _sum_up(columns, documents_P, classes)
    has_teacher = "kl_to_teacher" in columns
    student = _estimate_metrics(sums, "")
    student |= {name: sums.ratio(name, "positions") for name in OF_BOTH if has_teacher}
    missing = {} if has_teacher else dict.fromkeys(OF_BOTH, NO_TEACHER)
    missing |= (
        {}
        if "bytes" in columns
        else {"bits_per_byte": bytes_P if isinstance(bytes_P, str) else NO_BYTES}
    )
    card = Scorecard(
        positions=len(documents_P),
        documents=len(sums.documents),
        bytes=int(sums.total("bytes")) if "bytes" in columns else None,
        metrics=student,
        reliability=_reliability(sums, ""),
    )
    teacher = None
    if has_teacher:
        of_teacher = {
            "metrics": _estimate_metrics(sums, "teacher_"),
            "reliability": _reliability(sums, "teacher_"),
        }
        teacher = card.model_copy(update=of_teacher)
    scores = Scores(
        student=card,
        teacher=teacher,
        not_defined=missing,
        breakdown={kind: _break_down(sums, kind, found) for kind, found in classes.items()},
    )
    return scores, sums


def _sum_up(
    columns: Mapping[str, NDArray[np.generic]],
    documents_P: NDArray[np.int64],
    classes: Mapping[str, Classes],
) -> DocumentSums:
    """Return the sums over all positions, over each class ("kind/index/name") and over each bin ("bin/index/name")."""
    sums = DocumentSums(documents_P)
    for name, values_P in columns.items():
        sums.add(name, values_P)
    for kind, found in classes.items():
        for index in range(len(found.names)):
            is_inside_P = found.indices == index
            for name in _class_columns(columns):
                sums.add(f"{kind}/{index}/{name}", columns[name] * is_inside_P)
    for whose in ("", "teacher_"):
        if f"{whose}confidence" in columns:
            _sum_bins(sums, columns, whose)
    return sums


def _class_columns(columns: Mapping[str, Any]) -> list[str]:
    names = ("positions", "bytes", "loss", "teacher_loss", *OF_BOTH)
    return [name for name in names if name in columns]


def _sum_bins(sums: DocumentSums, columns: Mapping[str, NDArray[Any]], whose: str) -> None:
    confidence_P, accuracy_P = columns[f"{whose}confidence"], columns[f"{whose}accuracy"]
    bins_P = np.minimum((confidence_P * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    for b in range(NUM_BINS):
        is_inside_P = bins_P == b
        sums.add(f"{whose}bin/{b}/positions", is_inside_P)
        sums.add(f"{whose}bin/{b}/confidence", confidence_P * is_inside_P)
        sums.add(f"{whose}bin/{b}/accuracy", accuracy_P * is_inside_P)


def _estimate_metrics(sums: DocumentSums, whose: str) -> dict[str, Estimate]:
    """Return the metrics of one model by name; `whose` is "" or "teacher_"."""
    loss = sums.ratio(f"{whose}loss", "positions")
    found = {"loss": loss, "perplexity": loss.map(_exp)}
    if sums.has("bytes"):
        found["bits_per_byte"] = _bits_per_byte(sums, f"{whose}loss", "bytes")
    for name in ("accuracy", "entropy"):
        found[name] = sums.ratio(f"{whose}{name}", "positions")
    return found | {"calibration_error": _calibration_error(sums, whose)}


def _bits_per_byte(sums: DocumentSums, loss: str, num_bytes: str) -> Estimate:
    return sums.ratio(loss, num_bytes).map(lambda nats: nats / math.log(2))


def _exp(loss: float) -> float:
    return math.exp(min(loss, MAX_LOSS))


def _calibration_error(sums: DocumentSums, whose: str) -> Estimate:
    pairs = [(f"{whose}bin/{b}/confidence", f"{whose}bin/{b}/accuracy") for b in range(NUM_BINS)]
    value = sum(abs(sums.total(c) - sums.total(a)) for c, a in pairs) / sums.total("positions")
    if len(sums.documents) < 2:
        return Estimate(value, None, None)
    gaps_R = sum(np.abs(sums.resampled(c) - sums.resampled(a)) for c, a in pairs)
    return basic_interval(value, gaps_R / sums.resampled("positions"), least=0.0)


def _reliability(sums: DocumentSums, whose: str) -> tuple[Bin, ...]:
    """Return the bins that are not empty."""
    found = []
    for b in range(NUM_BINS):
        name = f"{whose}bin/{b}/"
        if not (size := sums.total(f"{name}positions")):
            continue
        found.append(
            Bin(
                start=b / NUM_BINS,
                stop=(b + 1) / NUM_BINS,
                positions=int(size),
                confidence=sums.total(f"{name}confidence") / size,
                accuracy=sums.ratio(f"{name}accuracy", f"{name}positions"),
            )
        )
    return tuple(found)


def _break_down(sums: DocumentSums, kind: str, classes: Classes) -> tuple[ClassRow, ...]:
    rows = []
    for index, class_name in enumerate(classes.names):
        prefix = f"{kind}/{index}/"
        names = [n for n in ("loss", "teacher_loss", *OF_BOTH) if sums.has(prefix + n)]
        found = {n: sums.ratio(prefix + n, f"{prefix}positions") for n in names}
        if sums.has(f"{prefix}bytes") and sums.total(f"{prefix}bytes") > 0:
            found["bits_per_byte"] = _bits_per_byte(sums, f"{prefix}loss", f"{prefix}bytes")
        rows.append(
            ClassRow(
                name=class_name,
                positions=int(sums.total(f"{prefix}positions")),
                documents=sums.count_documents(f"{prefix}positions"),
                metrics=found,
            )
        )
    return tuple(rows)


# Comparing runs -----------------------------------------------------------------------------------


def write_document_sums(path: Path, sums: DocumentSums) -> None:
    """Write documents.csv: positions, bytes and the sums of loss and KL (nats) of each held-out document.

    With the file of another run on the same documents, the difference of the two runs has an interval.
    """
    names = [name for name in _DOCUMENT_COLUMNS if sums.has(name)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["document", *names])
    columns = [sums.by_document(name).tolist() for name in names]
    writer.writerows(zip(sums.documents.tolist(), *columns, strict=True))
    write_atomically(path, text.getvalue().encode())
