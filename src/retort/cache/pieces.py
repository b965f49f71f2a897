"""Work on the sequences of a part in pieces, which the threads of a pool do at the same time.

The compiled loops, zstd and numpy let other threads run meanwhile. Pieces follow from the sequences' sizes, and what is
made of them is in their order: any number of threads gives the same bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from itertools import chain
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")
_S = TypeVar("_S")

LEAST_POSITIONS = 2048  # of a piece: 5 to 20 ms of one core


def cut_pieces(sizes: Iterable[int], *, least: int = LEAST_POSITIONS) -> list[slice]:
    """Return slices of consecutive sequences, each of at least that size together, but for the last."""
    ends = np.cumsum(np.fromiter(sizes, np.int64))
    pieces, start = list[slice](), 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = min(int(np.searchsorted(ends, before + least)) + 1, len(ends))
        pieces.append(slice(start, stop))
        start = stop
    return pieces


def do_pieces(
    work: Callable[[slice], _T], pieces: Iterable[slice], pool: Executor | None
) -> list[_T]:
    """Return what `work` makes of each piece, in order; None: without other threads. Raises the first one's error."""
    return list(map(work, pieces) if pool is None else pool.map(work, pieces))


def map_pieces(
    work: Callable[[_S], _T], items: Sequence[_S], pieces: Iterable[slice], pool: Executor | None
) -> list[_T]:
    """Return what `work` makes of each item; a thread does a piece of them at a time."""
    done = do_pieces(lambda piece: list(map(work, items[piece])), pieces, pool)
    return list(chain.from_iterable(done))
