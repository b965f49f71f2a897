"""Classes of held-out positions: how common the next token is, where in its document, how sure the teacher, what text.

Each way of telling positions apart is a `Classes`: names, and the place of each position's name. Borders are fixed
numbers, so that classes of two runs, or of two teachers, are the same thing.

Legend: P counted positions, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from retort.tokens.sequences import SequenceTable

# A token's rank among the training corpus' tokens, the most frequent first.
_RANKS = (1, 11, 101, 1001, 10_001)
# Tokens of the document before the one that is predicted.
_PLACES = (1, 16, 64, 256, 1024)
_ENTROPIES = (0.0, 0.5, 1.5, 3.0)  # nats
_MOST_LABELS = 20


@dataclass(frozen=True)
class Classes:
    """A way to tell positions apart: `names`, and for each position the place of its name, [P]."""

    names: tuple[str, ...]
    places: NDArray[np.int64]


def find_classes(
    table: SequenceTable,
    *,
    token_counts: NDArray[np.int64] | None,
    teacher_entropy: NDArray[np.float64] | None,
) -> dict[str, Classes]:
    """Return the classes of a table's counted positions, by what tells them apart; what is one class only is left out.

    frequency: rank of the next token among the training corpus' tokens, of which `token_counts` says how often each
    comes. place: tokens of the document before the next one (of those that were kept). entropy: the teacher's, nats.
    category, language: the labels of the corpus; the twenty with the most positions, and all others together.
    """
    counted = np.flatnonzero(table.loss_mask)
    next_ids = np.asarray(table.ids)[counted + 1]
    sequence_of = np.searchsorted(table.offsets, counted, side="right") - 1
    found = {"place": _cut(_places(table, counted, sequence_of), _PLACES, "{:,}")}
    if token_counts is not None:
        found["frequency"] = _by_frequency(next_ids, token_counts)
    if teacher_entropy is not None:
        found["entropy"] = _cut(teacher_entropy, _ENTROPIES, "{:g}")
    for column, name in enumerate(("category", "language")):
        labels = np.array([names[column] or "(none)" for names in table.label_names])
        found[name] = _by_label(labels[table.labels[sequence_of]])
    return {name: classes for name, classes in found.items() if len(classes.names) > 1}


def _cut(values: NDArray[np.generic], edges: Sequence[float], form: str) -> Classes:
    """Return classes between edges, the last one open, without empty ones. Whole numbers end one before the next."""
    is_whole = np.issubdtype(values.dtype, np.integer)
    names = []
    for low, high in pairwise([*edges, None]):
        if high is None:
            names.append(f"from {form.format(low)}")
        else:
            last = form.format(high - 1 if is_whole else high)
            names.append(f"{form.format(low)} to {last}")
    return _drop_empty(names, np.searchsorted(edges, values, side="right") - 1)


def _drop_empty(names: Sequence[str], places: NDArray[np.int64]) -> Classes:
    used, renumbered = np.unique(np.maximum(places, 0), return_inverse=True)
    return Classes(tuple(names[i] for i in used), renumbered)


def _places(
    table: SequenceTable, counted: NDArray[np.int64], sequence_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many tokens of its document stand before each predicted token; sequences overlap by one token."""
    fresh_S = table.lengths - 1
    before_S = np.cumsum(fresh_S) - fresh_S  # in all sequences before
    begins = np.diff(table.documents, prepend=-1) != 0
    document_of = np.cumsum(begins) - 1
    start_S = before_S - before_S[begins][document_of]
    found: NDArray[np.int64] = start_S[sequence_of] + counted - table.offsets[sequence_of] + 1
    return found


def _by_frequency(next_ids: NDArray[np.int32], token_counts: NDArray[np.int64]) -> Classes:
    """Return classes by rank; a token that the training corpus does not have is in a class of its own."""
    counts = np.zeros(max(len(token_counts), int(next_ids.max(initial=0)) + 1), np.int64)
    counts[: len(token_counts)] = token_counts
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    is_seen = counts[next_ids] > 0
    names = [*_cut_names(_RANKS), "never in training text"]
    places = np.searchsorted(_RANKS, ranks[next_ids], side="right") - 1
    return _drop_empty(names, np.where(is_seen, places, len(_RANKS)))


def _cut_names(edges: Sequence[int]) -> list[str]:
    names = [f"rank {low:,} to {high - 1:,}" for low, high in pairwise(edges)]
    return [*names, f"rank from {edges[-1]:,}"]


def _by_label(labels_P: NDArray[np.str_]) -> Classes:
    names, places, sizes = np.unique(labels_P, return_inverse=True, return_counts=True)
    if len(names) <= _MOST_LABELS:
        return Classes(tuple(names.tolist()), places)
    order = np.argsort(-sizes, kind="stable")
    new = np.full(len(names), _MOST_LABELS - 1)
    new[order[: _MOST_LABELS - 1]] = np.arange(_MOST_LABELS - 1)
    kept = [str(names[i]) for i in order[: _MOST_LABELS - 1]]
    return Classes((*kept, f"{len(names) - len(kept)} others"), new[places])
