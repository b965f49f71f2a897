"""Mixtures: the order in which the documents of several sources follow each other, by their weights.

Nothing is random: after any number of documents, each source has had its share of them, to within one document.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")

FIRST_EXHAUSTED = "first_exhausted"
ALL_EXHAUSTED = "all_exhausted"
WITHOUT_REPLACEMENT = "all_exhausted_without_replacement"


def interleave(
    sources: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float], *, strategy: str
) -> Iterator[tuple[int, T]]:
    """Yield (number of the source, item); each call of a source gives its items from the first on.

    strategy: the names and meanings of `datasets.interleave_datasets`. Without replacement, the weights of the sources
    that are left decide once one has ended.
    """
    items = [source() for source in sources]
    left = list(range(len(sources)))
    turns = take_turns(weights)
    ended: set[int] = set()
    while left:
        number = left[next(turns)]
        found = list(_take_one(items[number]))
        if not found:
            ended.add(number)
            if strategy == FIRST_EXHAUSTED or len(ended) == len(sources):
                return
            if strategy == ALL_EXHAUSTED:
                items[number] = sources[number]()
                found = list(_take_one(items[number]))
            if not found:  # without replacement, or a source without any item
                left.remove(number)
                turns = take_turns([weights[i] for i in left])
                continue
        yield number, found[0]


def take_turns(weights: Sequence[float]) -> Iterator[int]:
    """Yield numbers of sources without end: of the first n, source i has n * weight_i / sum, to within one.

    The solution of the chairman assignment problem (Tijdeman 1980): of the sources that would not be more than one
    ahead, the one that must come soonest.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * unit) for weight in exact]  # of their sum
    total, scale = sum(shares), max(1, 2 * len(shares) - 2)
    behind = [0] * len(shares)  # (n * share - total * number of turns so far) * scale
    while True:
        behind = [b + share * scale for b, share in zip(behind, shares, strict=True)]
        ready = [i for i, b in enumerate(behind) if b >= total]
        chosen = min(ready, key=lambda i: ((scale - 1) * total - behind[i]) / shares[i])
        behind[chosen] -= total * scale
        yield chosen


def _take_one(items: Iterator[T]) -> Iterator[T]:
    for item in items:
        yield item
        return
