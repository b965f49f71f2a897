"""Numbers at positions -> what is said of a model: means with intervals, by class, and how calibrated it is.

These are the sections of metrics.json. A metric's value stands under its name in "validation" (the student, and student
beside teacher) or "teacher_validation" (the teacher); the ends of its 95 % interval under the same name in "intervals";
its unit in "units"; and where it is null, the reason in "not_defined". Means are over all counted held-out positions:
a document of twice the length counts twice.

Legend: P counted positions, D documents, R draws of documents, B bins of confidence.
"""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.evaluation.breakdowns import Classes
from retort.evaluation.intervals import DocumentSums, Estimate, basic_interval, percentile_interval
from retort.io.files import write_atomically

METRICS_FORMAT = "retort-metrics"
METRICS_VERSION = 2
NUM_BINS = 15  # as in Guo et al.
DOCUMENTS_FILE = "documents.csv"
_OF_DOCUMENTS = ("positions", "bytes", "loss", "kl_to_teacher", "teacher_loss")


class Metric(NamedTuple):
    """What a metric is called in tables, its unit ("" for a share of 1), and whether less of it is better."""

    title: str
    unit: str
    is_less_better: bool


# Their definitions: the room `metrics`, and below.
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
NO_TEACHER = "there is no teacher to compare with"
NO_BYTES = "the predicted tokens are no text"


@dataclass(frozen=True)
class Scores:
    """Sections of metrics.json, and the sums of each document that they were made from."""

    sections: dict[str, Any]
    sums: DocumentSums


def summarise(
    columns: Mapping[str, NDArray[np.generic]],
    documents_P: NDArray[np.int64],
    *,
    bytes_P: NDArray[np.int64] | None,
    classes: Mapping[str, Classes],
) -> Scores:
    """Return the scores of what `metrics.measure_positions` found.

    loss, accuracy, entropy and what compares teacher and student: means over positions.
    perplexity: exp(loss).
    bits_per_byte: sum of losses / (ln 2 x bytes of the tokens that they are of); no matter of the tokenizer, so models
    that cut text otherwise can be compared (Gao et al.: The Pile, 2020, section 3.1).
    calibration_error: expected calibration error of the most probable token in 15 bins of equal width, sum_b n_b / n
    |accuracy_b - confidence_b| (Guo et al.: On Calibration of Modern Neural Networks, 2017, section 2).
    """
    columns = dict(columns) | {"positions": np.ones(len(documents_P))}
    if bytes_P is not None and bytes_P.sum() > 0:
        columns["bytes"] = bytes_P
    sums = _sum_up(columns, documents_P, classes)
    has_teacher = "kl_to_teacher" in columns
    student, teacher = _of_model(sums, ""), _of_model(sums, "teacher_") if has_teacher else {}
    student |= {name: sums.ratio(name, "positions") for name in OF_BOTH if has_teacher}
    missing = {} if has_teacher else dict.fromkeys(OF_BOTH, NO_TEACHER)
    missing |= {} if "bytes" in columns else {"bits_per_byte": NO_BYTES}
    counts: dict[str, Any] = {
        "positions": len(documents_P),
        "documents": len(sums.documents),
        "bytes": int(sums.total("bytes")) if "bytes" in columns else None,
    }
    sections = {
        "validation": counts | _values(student, [*OF_MODEL, *OF_BOTH]),
        "teacher_validation": _values(teacher, OF_MODEL) if has_teacher else None,
        "intervals": {
            "validation": _intervals(student),
            "teacher_validation": _intervals(teacher) if has_teacher else None,
        },
        "units": {name: metric.unit for name, metric in METRICS.items()},
        "not_defined": missing,
        "reliability": {
            "student": _reliability(sums, ""),
            "teacher": _reliability(sums, "teacher_") if has_teacher else None,
        },
        "breakdown": {kind: _break_down(sums, kind, found) for kind, found in classes.items()},
    }
    return Scores(sections, sums)


def _values(found: Mapping[str, Estimate], names: Any) -> dict[str, float | None]:
    return {name: found[name].value if name in found else None for name in names}


def _intervals(found: Mapping[str, Estimate]) -> dict[str, list[float] | None]:
    return {name: list(e.ends) if e.ends else None for name, e in found.items()}


def _sum_up(
    columns: Mapping[str, NDArray[np.generic]],
    documents_P: NDArray[np.int64],
    classes: Mapping[str, Classes],
) -> DocumentSums:
    """Return each document's sums: of all positions, of each class ("kind/place/name"), of each bin ("bin/b/name")."""
    sums = DocumentSums(documents_P)
    for name, values_P in columns.items():
        sums.add(name, values_P)
    for kind, found in classes.items():
        for place in range(len(found.names)):
            is_here_P = found.places == place
            for name in _of_class(columns):
                sums.add(f"{kind}/{place}/{name}", columns[name] * is_here_P)
    for whose in ("", "teacher_"):
        if f"{whose}confidence" in columns:
            _sum_bins(sums, columns, whose)
    return sums


def _of_class(columns: Mapping[str, Any]) -> list[str]:
    names = ("positions", "bytes", "loss", "teacher_loss", *OF_BOTH)
    return [name for name in names if name in columns]


def _sum_bins(sums: DocumentSums, columns: Mapping[str, NDArray[Any]], whose: str) -> None:
    confidence_P, accuracy_P = columns[f"{whose}confidence"], columns[f"{whose}accuracy"]
    bins_P = np.minimum((confidence_P * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    for place in range(NUM_BINS):
        is_here_P = bins_P == place
        sums.add(f"{whose}bin/{place}/positions", is_here_P)
        sums.add(f"{whose}bin/{place}/confidence", confidence_P * is_here_P)
        sums.add(f"{whose}bin/{place}/accuracy", accuracy_P * is_here_P)


def _of_model(sums: DocumentSums, whose: str) -> dict[str, Estimate]:
    """Return one model's estimates; `whose` is "" or "teacher_"."""
    loss = sums.ratio(f"{whose}loss", "positions")
    found = {"loss": loss, "perplexity": loss.map(_exp)}
    if sums.has("bytes"):
        found["bits_per_byte"] = sums.ratio(f"{whose}loss", "bytes").map(lambda x: x / math.log(2))
    for name in ("accuracy", "entropy"):
        found[name] = sums.ratio(f"{whose}{name}", "positions")
    return found | {"calibration_error": _calibration_error(sums, whose)}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond, no float; and no model


def _calibration_error(sums: DocumentSums, whose: str) -> Estimate:
    pairs = [(f"{whose}bin/{b}/confidence", f"{whose}bin/{b}/accuracy") for b in range(NUM_BINS)]
    value = sum(abs(sums.total(c) - sums.total(a)) for c, a in pairs) / sums.total("positions")
    if len(sums.documents) < 2:
        return Estimate(value, None, None)
    gaps_R = sum(np.abs(sums.draws(c) - sums.draws(a)) for c, a in pairs)
    return basic_interval(value, gaps_R / sums.draws("positions"), least=0.0)


def _reliability(sums: DocumentSums, whose: str) -> list[dict[str, Any]]:
    """Return the bins that hold any position: from, to, positions, mean confidence, accuracy and its interval."""
    found = []
    for place in range(NUM_BINS):
        name = f"{whose}bin/{place}/"
        if not (size := sums.total(f"{name}positions")):
            continue
        accuracy = sums.ratio(f"{name}accuracy", f"{name}positions")
        found.append(
            {
                "from": place / NUM_BINS,
                "to": (place + 1) / NUM_BINS,
                "positions": int(size),
                "confidence": sums.total(f"{name}confidence") / size,
                "accuracy": accuracy.value,
                "low": accuracy.low,
                "high": accuracy.high,
            }
        )
    return found


def _break_down(sums: DocumentSums, kind: str, classes: Classes) -> list[dict[str, Any]]:
    """Return a row for each class: its name, size, the metrics of its positions and their intervals."""
    rows = []
    for place, name in enumerate(classes.names):
        of = f"{kind}/{place}/"
        names = [n for n in ("loss", "teacher_loss", *OF_BOTH) if sums.has(of + n)]
        found = {n: sums.ratio(of + n, f"{of}positions") for n in names}
        if sums.has(f"{of}bytes") and sums.total(f"{of}bytes") > 0:
            bits = sums.ratio(f"{of}loss", f"{of}bytes")
            found["bits_per_byte"] = bits.map(lambda x: x / math.log(2))
        counts = {
            "class": name,
            "positions": int(sums.total(f"{of}positions")),
            "documents": sums.count_documents(f"{of}positions"),
        }
        rows.append(counts | _values(found, found) | {"intervals": _intervals(found)})
    return rows


# What tells two runs apart ------------------------------------------------------------------------


def write_documents(path: Path, sums: DocumentSums) -> None:
    """Write documents.csv: each held-out document's positions and bytes, and its sums of loss and KL, in nats.

    Beside another run's, measured on the same documents, it gives an interval to the difference of the two.
    """
    names = [name for name in _OF_DOCUMENTS if sums.has(name)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["document", *names])
    columns = [sums.of_documents(name).tolist() for name in names]
    writer.writerows(zip(sums.documents.tolist(), *columns, strict=True))
    write_atomically(path, text.getvalue().encode())


def read_documents(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the columns of documents.csv, [D] each. Raises ValueError where it is no such file."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
        _ = columns["document"], columns["positions"], columns["loss"]
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not what `evaluate` writes ({error!r}): evaluate the run again."
        ) from None
    return columns


def compare_losses(
    losses: Mapping[str, NDArray[np.float64]], positions: NDArray[np.float64]
) -> dict[str, Estimate]:
    """Return what runs on the same D documents differ by; `losses` are sums [D] of "run", "plain" and perhaps "full".

    margin: loss of the run minus that of "plain" (cross-entropy), nats/token.
    gap_closed: (plain - run) / (plain - full), full being the run that learned from the teacher's whole distributions:
    1 where the run is as good as that one. Absent where "full" is no better than "plain" in a fortieth of the draws:
    a share of nothing.
    """
    sums = DocumentSums(np.arange(len(positions)))
    for name, values in {**losses, "positions": positions}.items():
        sums.add(name, values)
    size = sums.total("positions")
    gain = (sums.total("plain") - sums.total("run")) / size
    margin = Estimate(-gain, None, None)
    if len(positions) > 1:
        gain_R = sums.draws("plain") - sums.draws("run")
        margin = percentile_interval(-gain, -gain_R / sums.draws("positions"))
    found = {"margin": margin}
    if "full" in losses and len(positions) > 1:
        gap = sums.total("plain") - sums.total("full")
        gap_R = sums.draws("plain") - sums.draws("full")
        if gap > 0 and np.quantile(gap_R, 0.025) > 0:
            found["gap_closed"] = percentile_interval(gain * size / gap, gain_R / gap_R)
    return found
