"""Confidence intervals of held-out numbers, by a bootstrap over documents.

Positions of one document are not independent; documents are assumed to be. So whole documents are resampled, with
replacement, as many as there are (a bootstrap of clusters: Davison and Hinkley, Bootstrap Methods and their
Application, 1997, section 3.8). The resamples depend only on the number of documents and the seed: two runs measured on
the same documents get the same resamples, so their difference has an interval of its own, a narrower one.

Legend: D documents, P positions, M sums, R resamples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from retort.io.records import STRICT

RESAMPLES = 1000
LEVEL = 0.95
FEW_DOCUMENTS = 10  # with fewer, intervals from resampling them are too narrow
_MAX_CELLS = 1 << 22  # resamples x documents in one block: 32 MB

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval; None when there are too few documents to resample."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    value: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate of an increasing function of the number."""
        ends = [None if end is None else function(end) for end in (self.low, self.high)]
        return Estimate(function(self.value), *ends)


def resample_weights(
    num_documents: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Iterator[Numbers]:
    """Yield blocks [<= R, D] of how often each document is in a resample; R is `resamples` in all."""
    rng = np.random.default_rng([seed, num_documents])
    block_size = max(1, _MAX_CELLS // max(1, num_documents))
    for start in range(0, resamples, block_size):
        count = min(block_size, resamples - start)
        chosen = rng.integers(num_documents, size=(count, num_documents))
        chosen += np.arange(count)[:, None] * num_documents
        weights = np.bincount(chosen.ravel(), minlength=count * num_documents)
        yield weights.reshape(count, num_documents).astype(np.float64)


class DocumentSums:
    """Named sums over positions for each document; any number computed from sums gets an interval.

    `documents_P` is the document of each position. If every row is one document, pass range(D).
    """

    def __init__(self, documents_P: NDArray[np.int64]) -> None:
        self.documents, self._indices_P = np.unique(documents_P, return_inverse=True)
        self._sums: dict[str, Numbers] = {}
        self._resampled: dict[str, Numbers] = {}

    def add(self, name: str, values_P: NDArray[np.generic]) -> None:
        """Add a named sum of one value per position, [P]."""
        weights_P = np.asarray(values_P, dtype=np.float64)
        sums_D = np.bincount(self._indices_P, weights=weights_P, minlength=len(self.documents))
        self._sums[name] = np.asarray(sums_D, dtype=np.float64)

    def has(self, name: str) -> bool:
        """Whether a sum of this name was added."""
        return name in self._sums

    def by_document(self, name: str) -> Numbers:
        """Return the sum of each document, [D], in the order of `documents`."""
        return self._sums[name]

    def total(self, name: str) -> float:
        """Return the sum over all documents."""
        return float(self._sums[name].sum())

    def count_documents(self, name: str) -> int:
        """Return the number of documents whose sum is not 0."""
        return int(np.count_nonzero(self._sums[name]))

    def resampled(self, name: str) -> Numbers:
        """Return the sum in every resample, [R]. The first call resamples all sums at once."""
        if not self._resampled.keys() >= self._sums.keys():
            sums_DM = np.stack(list(self._sums.values()), axis=1)
            blocks = [w_RD @ sums_DM for w_RD in resample_weights(len(self.documents))]
            self._resampled = dict(zip(self._sums, np.concatenate(blocks).T, strict=True))
        return self._resampled[name]

    def ratio(self, over: str, under: str) -> Estimate:
        """Return sum / sum with its percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
        chapter 13); without an interval when fewer than two documents have anything in `under`."""
        value = self.total(over) / self.total(under)
        if self.count_documents(under) < 2:
            return Estimate(value, None, None)
        with np.errstate(invalid="ignore", divide="ignore"):
            values_R = self.resampled(over) / self.resampled(under)
        return percentile_interval(value, values_R)


def percentile_interval(value: float, values_R: Numbers) -> Estimate:
    """Return `value` with the middle 95 % of its resamples, [R]; those that are not finite are ignored."""
    values_R = values_R[np.isfinite(values_R)]
    if len(values_R) == 0:
        return Estimate(value, None, None)
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def basic_interval(value: float, values_R: Numbers, *, least: float) -> Estimate:
    """Return `value` with the middle 95 % of its resamples mirrored at the value, cut off at `least`.

    For numbers that resampling biases upwards, such as a mean of absolute errors: the resamples are above the value as
    the value is above the truth, so the interval is mirrored (Davison and Hinkley, section 5.2).
    """
    found = percentile_interval(value, values_R)
    if found.low is None or found.high is None:
        return found
    return Estimate(value, max(least, 2 * value - found.high), max(least, 2 * value - found.low))
