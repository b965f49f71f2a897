"""Classes of held-out positions: by frequency of the next token, place in the document, teacher entropy, labels.

Bin edges are fixed numbers, so that the classes of two runs, or of two teachers, are the same.

Legend: P counted positions, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retort.tokens.sequences import SequenceTable

# Lower edges of the bins.
_RANKS = (1, 11, 101, 1001, 10_001)  # of a token in the training corpus, the most frequent first
_PLACES = (1, 16, 64, 256, 1024)  # tokens of the document before the predicted one
_ENTROPIES = (0.0, 0.5, 1.5, 3.0)  # nats
_MAX_LABELS = 20


@dataclass(frozen=True)
class Classes:
    """A partition of the counted positions: the names of the classes, and each position's index into them, [P]."""

    names: tuple[str, ...]
    indices: NDArray[np.int64]


def find_classes(
    table: SequenceTable,
    *,
    token_counts: NDArray[np.int64] | None,
    teacher_entropy: NDArray[np.float64] | None,
) -> dict[str, Classes]:
    """Return the partitions of a table's counted positions by name, without those that have one class only.

    frequency: rank of the next token in the training corpus, from `token_counts` [V].
    place: number of tokens of the same document (after truncation) before the next one.
    entropy: of the teacher's distribution, from `teacher_entropy` [P], nats.
    category, language, source (in a mixture): labels of the document; of more than 20, the 19 with the most positions
    and all others together.
    """
    counted = table.counted
    sequence_of = np.searchsorted(table.offsets, counted, side="right") - 1
    found = {"place": _bin(_places(table, counted, sequence_of), _PLACES, "{:,}")}
    if token_counts is not None:
        found["frequency"] = _by_frequency(table.next_ids, token_counts)
    if teacher_entropy is not None:
        found["entropy"] = _bin(teacher_entropy, _ENTROPIES, "{:g}")
    for column, name in enumerate(("category", "language", "source")):
        labels = np.array(["".join(n[column : column + 1]) or "(none)" for n in table.label_names])
        found[name] = _by_label(labels[table.labels[sequence_of]])
    return {name: classes for name, classes in found.items() if len(classes.names) > 1}


def _bin(values: NDArray[np.generic], edges: Sequence[float], form: str) -> Classes:
    """Return the classes between edges, the last one open, without empty ones. A bin of integers names its last one."""
    is_whole = np.issubdtype(values.dtype, np.integer)
    names = []
    for low, high in pairwise([*edges, None]):
        if high is None:
            names.append(f"from {form.format(low)}")
        else:
            last = form.format(high - 1 if is_whole else high)
            names.append(f"{form.format(low)} to {last}")
    return _drop_empty(names, np.searchsorted(edges, values, side="right") - 1)


def _drop_empty(names: Sequence[str], indices: NDArray[np.int64]) -> Classes:
    used, renumbered = np.unique(np.maximum(indices, 0), return_inverse=True)
    return Classes(tuple(names[i] for i in used), renumbered)


def _places(
    table: SequenceTable, counted: NDArray[np.int64], sequence_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many tokens of its document precede each predicted token, [P]; sequences overlap by one token."""
    new_S = table.lengths - 1
    before_S = np.cumsum(new_S) - new_S  # in all earlier sequences
    begins = np.diff(table.documents, prepend=-1) != 0
    document_of = np.cumsum(begins) - 1
    start_S = before_S - before_S[begins][document_of]
    found: NDArray[np.int64] = start_S[sequence_of] + counted - table.offsets[sequence_of] + 1
    return found


def _by_frequency(next_ids: NDArray[np.int32], token_counts: NDArray[np.int64]) -> Classes:
    """Return classes by rank; tokens that the training corpus lacks are a class of their own."""
    counts = np.zeros(max(len(token_counts), int(next_ids.max(initial=0)) + 1), np.int64)
    counts[: len(token_counts)] = token_counts
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    is_seen = counts[next_ids] > 0
    names = [*_name_ranks(_RANKS), "never in training text"]
    indices = np.searchsorted(_RANKS, ranks[next_ids], side="right") - 1
    return _drop_empty(names, np.where(is_seen, indices, len(_RANKS)))


def _name_ranks(edges: Sequence[int]) -> list[str]:
    names = [f"rank {low:,} to {high - 1:,}" for low, high in pairwise(edges)]
    return [*names, f"rank from {edges[-1]:,}"]


def _by_label(labels_P: NDArray[np.str_]) -> Classes:
    names, indices, sizes = np.unique(labels_P, return_inverse=True, return_counts=True)
    if len(names) <= _MAX_LABELS:
        return Classes(tuple(names.tolist()), indices)
    largest = np.argsort(-sizes, kind="stable")[: _MAX_LABELS - 1]
    new = np.full(len(names), len(largest))
    new[largest] = np.arange(len(largest))
    kept = [str(names[i]) for i in largest]
    return Classes((*kept, f"{len(names) - len(kept)} others"), new[indices])
