"""Bootstrap intervals, against plain loops, and how often they contain the true value."""

import math

import numpy as np
import pytest

from retort.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    DocumentSums,
    basic_interval,
    percentile_interval,
    resample_weights,
)


def make_documents(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (documents [P], losses [P]): 1 to 40 positions each, with losses that are correlated within a document."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 41, count)
    documents = np.repeat(np.arange(count) * 7 + 3, sizes)
    own = np.repeat(rng.normal(3.0, 0.5, count), sizes)
    return documents, own + rng.normal(0, 0.3, len(own))


@pytest.mark.parametrize("count", [1, 7, 500])
def test_every_resample_has_as_many_documents_as_there_are(count: int) -> None:
    weights = np.concatenate(list(resample_weights(count)))
    assert weights.shape == (RESAMPLES, count)
    assert (weights.sum(axis=1) == count).all() and weights.min() >= 0
    again = np.concatenate(list(resample_weights(count)))
    assert np.array_equal(weights, again)
    assert count == 1 or not np.array_equal(
        weights, np.concatenate(list(resample_weights(count, seed=1)))
    )


def test_resamples_of_many_documents_come_in_blocks_of_bounded_size() -> None:
    count = 200_000
    blocks = resample_weights(count, resamples=45)
    sizes = [block.shape for block in blocks]
    assert sum(rows for rows, _ in sizes) == 45 and max(rows for rows, _ in sizes) < 25
    assert {columns for _, columns in sizes} == {count}


def test_a_mean_and_its_interval_are_those_of_a_plain_loop() -> None:
    documents, losses = make_documents(60, seed=0)
    sums = DocumentSums(documents)
    sums.add("loss", losses)
    sums.add("positions", np.ones(len(losses)))
    found = sums.ratio("loss", "positions")
    assert found.value == pytest.approx(losses.mean())
    by_document = [losses[documents == d] for d in np.unique(documents)]
    rng = np.random.default_rng(1)
    means = []
    for _ in range(4000):
        chosen = [by_document[i] for i in rng.integers(0, 60, 60)]
        means.append(np.concatenate(chosen).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.1 * width)
    assert found.high == pytest.approx(high, abs=0.1 * width)
    # Much wider than if positions were independent.
    assert width > 2 * 2 * 1.96 * losses.std() / math.sqrt(len(losses)) / 2


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    num_inside = 0
    for trial in range(300):
        documents, losses = make_documents(50, seed=trial + 10)
        sums = DocumentSums(documents)
        sums.add("loss", losses)
        sums.add("positions", np.ones(len(losses)))
        found = sums.ratio("loss", "positions")
        assert found.low is not None and found.high is not None
        num_inside += found.low <= 3.0 <= found.high
    assert LEVEL - 0.05 < num_inside / 300 < LEVEL + 0.04


def test_a_difference_on_the_same_documents_has_a_narrower_interval_than_each_run() -> None:
    documents, losses = make_documents(50, seed=3)
    better = losses - 0.05 + np.random.default_rng(4).normal(0, 0.02, len(losses))
    sums = DocumentSums(documents)
    for name, values in {"a": losses, "b": better, "n": np.ones(len(losses))}.items():
        sums.add(name, values)
    difference = percentile_interval(
        0.0, (sums.resampled("a") - sums.resampled("b")) / sums.resampled("n")
    )
    alone = sums.ratio("a", "n")
    assert difference.low is not None and difference.high is not None
    assert alone.low is not None and alone.high is not None
    assert 0.04 < difference.low < difference.high < 0.06
    assert difference.high - difference.low < (alone.high - alone.low) / 5


def test_one_document_has_no_interval() -> None:
    sums = DocumentSums(np.array([5, 5, 5]))
    sums.add("x", np.array([1.0, 2.0, 3.0]))
    sums.add("n", np.ones(3))
    found = sums.ratio("x", "n")
    assert (found.value, found.low, found.high) == (2.0, None, None)


def test_resamples_without_a_class_of_few_documents_are_ignored() -> None:
    documents = np.arange(40)
    is_inside = np.isin(documents, [3, 8]).astype(float)
    sums = DocumentSums(documents)
    sums.add("x", is_inside * (1.0 + documents))
    sums.add("n", is_inside)
    found = sums.ratio("x", "n")
    assert sums.count_documents("n") == 2
    assert (found.value, found.low, found.high) == (6.5, 4.0, 9.0)


def test_the_interval_of_an_upward_biased_number_is_mirrored() -> None:
    values = np.linspace(0.02, 0.04, 1001)
    found = basic_interval(0.02, values, least=0.0)
    assert (
        found.high is not None and found.high < 0.02 + 1e-3 and found.low == pytest.approx(0.0005)
    )
    assert basic_interval(0.01, values, least=0.0).low == 0.0
