"""Inner loops of decoding, compiled: bits to integers, and distributions to the tokens that are kept of them.

Legend: P positions, B bytes, K tokens of a position, N kept tokens.
"""

import numpy as np
from numpy.typing import NDArray

from retort.cache.jit import jit


@jit
def unpack_rows(packed: NDArray[np.uint8], bits: int, found: NDArray[np.int64]) -> None:
    """Fill `found` [P, K] from bytes [P, B], `bits` of each integer, 48 at most, the highest first."""
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for row in range(len(packed)):
        held, num_held, place = np.uint64(0), 0, 0
        for column in range(found.shape[1]):
            while num_held < bits:
                held = (held << np.uint64(8)) | np.uint64(packed[row, place])
                num_held += 8
                place += 1
            num_held -= bits
            found[row, column] = np.int64((held >> np.uint64(num_held)) & mask)


NOT_A_NUMBER, NO_SUCH_ID, TWICE = 1, 2, 3  # faults of a position


@jit
def keep_probable(
    ids: NDArray[np.int64],
    probs: NDArray[np.float64],
    least: float,
    is_normalized: bool,
    kept: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]],
    seen: NDArray[np.int64],
) -> tuple[int, int]:
    """Fill `kept`, (sizes [P], ids [N], probabilities [N], tails [P]), and return (N, 0), or (position, its fault).

    ids, probs: [P, K]. Sums above 1 become 1 (any, unless is_normalized). Kept are probabilities of at least `least`,
    and the greatest. seen [number of tokens]: zeros; the kept ids of a position are distinct, and below its length.
    """
    sizes, kept_ids, kept_probs, tails = kept
    count = 0
    for row in range(len(ids)):
        total, best = 0.0, 0
        for column in range(ids.shape[1]):
            total += probs[row, column]
            if probs[row, column] > probs[row, best]:
                best = column
        if not 0.0 < total < np.inf:
            return row, NOT_A_NUMBER
        scale = 1.0 if is_normalized and total <= 1.0 else 1.0 / total
        first, mass = count, 0.0
        for column in range(ids.shape[1]):
            prob = probs[row, column] * scale
            if prob >= least or column == best:
                token = ids[row, column]
                if token >= len(seen):
                    return row, NO_SUCH_ID
                if seen[token] == row + 1:
                    return row, TWICE
                seen[token] = row + 1
                kept_ids[count], kept_probs[count] = token, prob
                mass += prob
                count += 1
        sizes[row], tails[row] = count - first, max(0.0, 1.0 - mass)
    return count, 0
