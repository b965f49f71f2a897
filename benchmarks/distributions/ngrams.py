"""What followed a context: of n tokens in a text, or earlier in the same sequence."""

import numpy as np
from numpy.typing import NDArray

_HASH_FACTOR = np.int64(0x5851F42D4C957F2D)  # Knuth's, of MMIX; odd, so multiplying loses no bits


class NextTokens:
    """What followed each context of `length` tokens in a text: a sorted array, looked up by bisection."""

    def __init__(self, stream: NDArray[np.int32], length: int):
        self.length = length
        keys = self.compute_keys(stream)[:-1]
        order = np.argsort(keys, kind="stable")
        self.keys, self.followers = keys[order], stream[length:][order]

    def compute_keys(self, stream: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return a 64-bit hash of each window of `length` tokens; the i-th ends at stream[i + length - 1]."""
        keys = np.zeros(max(0, len(stream) - self.length + 1), np.int64)
        for i in range(self.length):
            keys = keys * _HASH_FACTOR + stream[i : i + len(keys)] + 1
        return keys

    def look_up(self, sequence_T: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Return for each position of a sequence all tokens that followed its last `length` tokens (or none)."""
        keys = self.compute_keys(sequence_T)
        left = np.searchsorted(self.keys, keys)
        right = np.searchsorted(self.keys, keys, side="right")
        found = [self.followers[a:b] for a, b in zip(left, right, strict=True)]
        return [self.followers[:0]] * (len(sequence_T) - len(found)) + found


def look_up_within(sequence_T: NDArray[np.int32], length: int) -> list[NDArray[np.int32]]:
    """Return for each position the tokens that followed its last `length` tokens earlier in the same sequence."""
    windows = np.lib.stride_tricks.sliding_window_view(sequence_T, length)
    found = [sequence_T[:0]] * (length - 1)
    for i in range(len(windows)):
        # Only followers at or before the position itself: nothing of what is to be predicted.
        earlier = np.flatnonzero((windows[:i] == windows[i]).all(axis=1))
        found.append(sequence_T[earlier + length])
    return found


def look_up_all(
    indexes: list[NextTokens], sequence_T: NDArray[np.int32]
) -> list[list[NDArray[np.int32]]]:
    """Return what followed, by kind of context and position: the indexes', then 1 and 3 tokens of the sequence."""
    within = [look_up_within(sequence_T, n) for n in (1, 3)]
    return [index.look_up(sequence_T) for index in indexes] + within
