"""What a cache kept of P positions, as the metrics take it.

Legend: P positions, V vocabulary, K most ids kept at any position.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK = 256  # positions of all V that are in memory at once
BLOCK = 8192  # positions that an opponent compresses together

Logprobs = NDArray[np.float32]  # [P, V], natural log


@dataclasses.dataclass(frozen=True)
class Stored:
    """What one cache kept of P positions.

    ids [P, K] has -1 where fewer are kept; logprobs [P, K] is then -inf. tail_logprobs [P] is the log of the mass of
    all other ids, None where it is not stored: then it is what the kept ones leave of 1. unbiased: each
    position's kept probabilities, and 0 elsewhere, have the exact ones as their expectation over samples.
    """

    name: str
    bytes_per_position: float
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_logprobs: NDArray[np.float32] | None = None
    unbiased: bool = False


def iterate_chunks(logprobs_PV: Logprobs, size: int = CHUNK) -> Iterator[torch.Tensor]:
    """Yield `size` positions at a time, copied into memory."""
    for start in range(0, len(logprobs_PV), size):
        yield torch.from_numpy(np.array(logprobs_PV[start : start + size]))
