"""Sections of metrics.json, against the definitions written out position by position."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retort.evaluation.breakdowns import Classes
from retort.evaluation.intervals import DocumentSums, Estimate
from retort.evaluation.records import Scores
from retort.evaluation.scores import (
    METRICS,
    OF_BOTH,
    OF_MODEL,
    UNITS,
    summarise,
    write_document_sums,
)
from retort.report.runs import read_documents


def make_columns(size: int, *, seed: int = 0, has_teacher: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for whose in ("", "teacher_") if has_teacher else ("",):
        confidence = rng.random(size) ** 0.5
        columns |= {
            f"{whose}loss": rng.gamma(2, 1.5, size),
            f"{whose}entropy": rng.gamma(2, 1, size),
            f"{whose}confidence": confidence,
            f"{whose}accuracy": rng.random(size) < confidence**1.5,
        }
    if has_teacher:
        columns |= {name: rng.random(size) for name in OF_BOTH}
    return columns


def make_scores(
    size: int = 4000, **options: Any
) -> tuple[dict[str, Any], NDArray[Any], tuple[Scores, DocumentSums]]:
    columns = make_columns(size, **options)
    documents = np.sort(np.random.default_rng(9).integers(0, 40, size))
    sizes = np.random.default_rng(8).integers(0, 9, size)
    classes = {"language": Classes(("de", "en"), (documents % 2).astype(np.int64))}
    columns["bytes"] = sizes
    return columns, documents, summarise(columns, documents, bytes_P=sizes, classes=classes)


def ends_of(estimate: Estimate) -> tuple[float, float]:
    assert estimate.ends is not None
    return estimate.ends


def calibration_error(confidence: NDArray[Any], accuracy: NDArray[Any]) -> float:
    """Guo et al. 2017, equation 3, with bins (m - 1) / 15 to m / 15."""
    error = 0.0
    for m in range(1, 16):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / 15 <= c < m / 15]
        if inside:
            acc = sum(bool(accuracy[i]) for i in inside) / len(inside)
            conf = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(acc - conf)
    return error


def test_values_are_those_of_the_definitions() -> None:
    columns, documents, (found, _) = make_scores()
    for card, whose in ((found.student, ""), (found.teacher, "teacher_")):
        assert card is not None
        values = {name: estimate.value for name, estimate in card.metrics.items()}
        losses = columns[f"{whose}loss"]
        assert values["loss"] == pytest.approx(losses.mean())
        assert values["perplexity"] == pytest.approx(math.exp(losses.mean()))
        bits = sum(losses) / math.log(2) / columns["bytes"].sum()
        assert values["bits_per_byte"] == pytest.approx(bits)
        assert values["accuracy"] == pytest.approx(columns[f"{whose}accuracy"].mean())
        error = calibration_error(columns[f"{whose}confidence"], columns[f"{whose}accuracy"])
        assert values["calibration_error"] == pytest.approx(error)
    for name in OF_BOTH:
        assert found.student.metrics[name].value == pytest.approx(columns[name].mean())
    assert found.student.positions == 4000
    assert found.student.documents == len(set(documents.tolist()))
    assert found.student.bytes == columns["bytes"].sum()


def test_every_value_is_in_its_interval_and_has_a_unit() -> None:
    _, _, (found, _) = make_scores()
    assert found.teacher is not None
    for card in (found.student, found.teacher):
        for name, estimate in card.metrics.items():
            low, high = ends_of(estimate)
            assert low < high
            assert name == "calibration_error" or low <= estimate.value <= high
            assert name in UNITS
    assert set(found.student.metrics) == {*OF_MODEL, *OF_BOTH} == set(METRICS)
    assert found.not_defined == {}


def test_perplexity_has_the_interval_of_the_loss() -> None:
    _, _, (found, _) = make_scores()
    metrics = found.student.metrics
    expected = [math.exp(x) for x in ends_of(metrics["loss"])]
    assert ends_of(metrics["perplexity"]) == pytest.approx(expected)


def test_the_reliability_curve_holds_every_position_once() -> None:
    columns, _, (found, _) = make_scores()
    curve = found.student.reliability
    assert sum(b.positions for b in curve) == 4000
    for b in curve:
        inside = (columns["confidence"] >= b.start) & (columns["confidence"] < b.stop)
        assert b.positions == inside.sum()
        assert b.accuracy.value == pytest.approx(columns["accuracy"][inside].mean())
        assert b.confidence == pytest.approx(columns["confidence"][inside].mean())
        assert b.start <= b.confidence <= b.stop + 1e-12
        low, high = ends_of(b.accuracy)
        assert low <= b.accuracy.value <= high


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_the_ends_of_confidence_are_in_a_bin(confidence: float) -> None:
    columns = make_columns(20, has_teacher=False) | {"confidence": np.full(20, confidence)}
    found, _ = summarise(columns, np.arange(20), bytes_P=None, classes={})
    (only,) = found.student.reliability
    assert only.positions == 20


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one() -> None:
    rng = np.random.default_rng(3)
    columns = make_columns(20_000, has_teacher=False)
    columns["accuracy"] = rng.random(20_000) < columns["confidence"]
    documents = np.repeat(np.arange(200), 100)
    found, _ = summarise(columns, documents, bytes_P=None, classes={})
    assert found.student.metrics["calibration_error"].value < 0.015
    columns["accuracy"] = rng.random(20_000) < columns["confidence"] - 0.1
    found, _ = summarise(columns, documents, bytes_P=None, classes={})
    low, high = ends_of(found.student.metrics["calibration_error"])
    assert 0.08 < low < 0.1 < high < 0.12


def test_classes_add_up_to_the_whole() -> None:
    columns, documents, (found, _) = make_scores()
    rows = found.breakdown["language"]
    assert [row.name for row in rows] == ["de", "en"]
    for name in ("loss", *OF_BOTH):
        total = sum(row.metrics[name].value * row.positions for row in rows)
        assert total / 4000 == pytest.approx(found.student.metrics[name].value)
    english = documents % 2 == 1
    assert rows[1].positions == english.sum()
    assert rows[1].metrics["teacher_loss"].value == pytest.approx(
        columns["teacher_loss"][english].mean()
    )
    bits = columns["loss"][english].sum() / math.log(2) / columns["bytes"][english].sum()
    assert rows[1].metrics["bits_per_byte"].value == pytest.approx(bits)
    assert rows[0].documents == len(set(documents[~english].tolist()))
    low, high = ends_of(rows[0].metrics["loss"])
    assert low < rows[0].metrics["loss"].value < high


def test_without_a_teacher_comparisons_are_null_with_a_reason() -> None:
    _, _, (found, _) = make_scores(has_teacher=False)
    assert found.teacher is None
    assert not found.student.metrics.keys() & set(OF_BOTH)
    assert set(found.not_defined) == set(OF_BOTH)
    assert found.student.metrics["bits_per_byte"].value > 0


@pytest.mark.parametrize("sizes", [None, np.zeros(4, np.int64)])
def test_without_text_there_are_no_bits_per_byte(sizes: NDArray[np.int64] | None) -> None:
    columns = make_columns(4, has_teacher=False)
    found, _ = summarise(columns, np.arange(4), bytes_P=sizes, classes={})
    assert "bits_per_byte" not in found.student.metrics and found.student.bytes is None
    assert "bits_per_byte" in found.not_defined


def test_one_document_has_values_but_no_intervals() -> None:
    columns = make_columns(50)
    found, _ = summarise(columns, np.zeros(50, np.int64), bytes_P=None, classes={})
    assert found.student.metrics["loss"].value > 0
    assert {estimate.ends for estimate in found.student.metrics.values()} == {None}


# Comparing runs


def test_documents_are_read_as_they_were_written(tmp_path: Path) -> None:
    columns, documents, (_, sums) = make_scores()
    write_document_sums(tmp_path / "documents.csv", sums)
    found = read_documents(tmp_path / "documents.csv")
    for row, document in enumerate(found["document"]):
        is_inside = documents == document
        assert found["positions"][row] == is_inside.sum()
        for name in ("bytes", "loss", "kl_to_teacher", "teacher_loss"):
            assert found[name][row] == pytest.approx(columns[name][is_inside].sum(), rel=1e-12)
