"""How sure a held-out number is: the documents are drawn anew, and the number is taken of every draw.

Positions of one document are not independent; documents are taken to be. So whole documents are drawn, with
replacement and as many as there are (a bootstrap of clusters: Davison and Hinkley, Bootstrap Methods and their
Application, 1997, section 3.8). Draws depend on the number of documents and the seed alone: two runs measured on the
same documents are drawn alike, so a difference between them has an interval of its own, a narrower one.

Legend: D documents, P positions, M sums, R draws.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
_CELLS = 1 << 22  # of draws x documents at once: 32 MB

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval; None where there are too few documents to draw from."""

    value: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate of a rising function of the number."""
        ends = [None if end is None else function(end) for end in (self.low, self.high)]
        return Estimate(function(self.value), *ends)


def draw_weights(
    num_documents: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Iterator[Numbers]:
    """Yield how often each document was drawn, [R, D], some draws at a time; R is `resamples` in all."""
    chance = np.random.default_rng([seed, num_documents])
    at_once = max(1, _CELLS // max(1, num_documents))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = chance.integers(num_documents, size=(count, num_documents))
        drawn += np.arange(count)[:, None] * num_documents
        weights = np.bincount(drawn.ravel(), minlength=count * num_documents)
        yield weights.reshape(count, num_documents).astype(np.float64)


class DocumentSums:
    """Named sums over positions, kept for each document; any number made of sums gets an interval.

    `documents_P` says which document a position is of. Where every row is a document already, give range(D).
    """

    def __init__(self, documents_P: NDArray[np.int64]) -> None:
        self.documents, self._places_P = np.unique(documents_P, return_inverse=True)
        self._sums: dict[str, Numbers] = {}
        self._drawn: dict[str, Numbers] = {}

    def add(self, name: str, values_P: NDArray[np.generic]) -> None:
        """Sum a value of every position."""
        weights_P = np.asarray(values_P, dtype=np.float64)
        sums_D = np.bincount(self._places_P, weights=weights_P, minlength=len(self.documents))
        self._sums[name] = np.asarray(sums_D, dtype=np.float64)

    def has(self, name: str) -> bool:
        """Say whether such a sum was added."""
        return name in self._sums

    def of_documents(self, name: str) -> Numbers:
        """Return a sum for each document, [D], in the order of `documents`."""
        return self._sums[name]

    def total(self, name: str) -> float:
        """Return a sum over everything."""
        return float(self._sums[name].sum())

    def count_documents(self, name: str) -> int:
        """Return how many documents have anything in a sum."""
        return int(np.count_nonzero(self._sums[name]))

    def draws(self, name: str) -> Numbers:
        """Return a sum in every draw, [R]. All sums are drawn the first time that one is asked for."""
        if not self._drawn.keys() >= self._sums.keys():
            sums_DM = np.stack(list(self._sums.values()), axis=1)
            blocks = [w_RD @ sums_DM for w_RD in draw_weights(len(self.documents))]
            self._drawn = dict(zip(self._sums, np.concatenate(blocks).T, strict=True))
        return self._drawn[name]

    def ratio(self, over: str, under: str) -> Estimate:
        """Return sum / sum with its percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
        chapter 13); no interval where fewer than two documents have anything in `under`."""
        value = self.total(over) / self.total(under)
        if self.count_documents(under) < 2:
            return Estimate(value, None, None)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn_R = self.draws(over) / self.draws(under)
        return percentile_interval(value, drawn_R)


def percentile_interval(value: float, drawn_R: Numbers) -> Estimate:
    """Return the middle 95 % of the draws; those in which the number is not defined do not count."""
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if len(drawn_R) == 0:
        return Estimate(value, None, None)
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def basic_interval(value: float, drawn_R: Numbers, *, least: float) -> Estimate:
    """Return the draws' middle 95 % mirrored at the value, not below `least`.

    For numbers that are greater in a draw than in all there is, as a mean of absolute errors is: the draws lie above
    the value as the value lies above the truth, so the interval goes the other way (Davison and Hinkley, section 5.2).
    """
    found = percentile_interval(value, drawn_R)
    if found.low is None or found.high is None:
        return found
    return Estimate(value, max(least, 2 * value - found.high), max(least, 2 * value - found.low))
