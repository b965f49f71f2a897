"""Documents: built from rows, cleaned, assigned to train or val, and counted."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import xxhash
from pydantic import PlainSerializer

from retort.config.sections import Dataset

# With 5 expected held-out documents, 1 in 150 corpora would have none (Poisson: exp(-5)).
_FEW_HELD_OUT = 5
_UNLIMITED = 10**12
_LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One document. If it has a prompt, `text` is the response, and only the response carries loss."""

    index: int  # in the corpus, from 0
    text: str
    prompt: str | None
    category: str | None
    language: str | None
    split: Literal["train", "val"]


# Sorted when written: in whatever order documents are read, equal counts give equal bytes.
Reasons = Annotated[Counter[str], PlainSerializer(lambda found: dict(sorted(found.items())))]


@dataclass
class Counts:
    """Numbers of documents: read = used + skipped.

    `skipped` is by reason. `cleaned` (by change) and `held_out` are subsets of `used`.
    """

    read: int = 0
    used: int = 0
    held_out: int = 0
    skipped: Reasons = field(default_factory=Counter)
    cleaned: Reasons = field(default_factory=Counter)

    def reconcile(self) -> None:
        """Assert that read = used + skipped."""
        assert self.read == self.used + sum(self.skipped.values()), self
        assert self.held_out <= self.used, self

    def merge(self, other: "Counts") -> None:
        """Add the counts of `other`."""
        self.read += other.read
        self.used += other.used
        self.held_out += other.held_out
        self.skipped.update(other.skipped)
        self.cleaned.update(other.cleaned)


def is_held_out(content: str, *, seed: int, fraction: float) -> bool:
    """Return whether a document (prompt + text) is held out: a hash of its content, in [0, 1), is below `fraction`."""
    return xxhash.xxh3_64_intdigest(content.encode(), seed) / 2**64 < fraction


def is_small_trial(dataset: Dataset) -> bool:
    """Return whether `max_samples` is so small that possibly no document is held out; the first one is, then.

    People begin with a trial of ten documents (max_samples: 10), which must run to its end.
    """
    expected = (dataset.max_samples or _UNLIMITED) * dataset.validation_fraction
    return 0 < expected < _FEW_HELD_OUT


def make_document(
    values: Mapping[str, Any], dataset: Dataset, *, index: int, split: str | None, counts: Counts
) -> Document | None:
    """Return the document of one row, cleaned, or None if it is skipped; add it to `counts`.

    `split` is "train", "val", or None: then the content decides.
    """
    counts.read += 1
    has_prompt = dataset.prompt_column is not None
    text = values.get(str(dataset.response_column) if has_prompt else dataset.text_column)
    prompt = values.get(str(dataset.prompt_column)) if has_prompt else ""
    reason = _find_flaw(prompt, text)
    if reason is not None:
        counts.skipped[reason] += 1
        return None
    changes: set[str] = set()
    prompt, text = _clean(cast(str, prompt), changes), _clean(cast(str, text), changes)
    if split is None:
        fraction = dataset.validation_fraction
        is_val = is_held_out(prompt + text, seed=dataset.seed, fraction=fraction)
        is_val = is_val or (index == 0 and is_small_trial(dataset))
        split = "val" if is_val else "train"
    counts.used += 1
    counts.held_out += split == "val"
    counts.cleaned.update(changes)
    return Document(
        index=index,
        text=text,
        prompt=prompt if has_prompt else None,
        category=_read_label(values, dataset.category_column),
        language=_read_label(values, dataset.language_column),
        split=cast(Literal["train", "val"], split),
    )


def _find_flaw(prompt: Any, text: Any) -> str | None:
    """Return the reason why a document is skipped, or None."""
    if not isinstance(text, str) or not isinstance(prompt, str):
        return "not_text"
    if not text.replace("\0", "").strip():
        return "empty_response" if prompt.replace("\0", "").strip() else "empty"
    return None


def _clean(text: str, changes: set[str]) -> str:
    """Return the text without NUL and lone surrogates, which tokenizers or files refuse; add changes to `changes`."""
    if "\0" in text:
        changes.add("nul")
        text = text.replace("\0", "")
    if not text.isascii() and _LONE_SURROGATE.search(text):
        changes.add("lone_surrogate")
        text = _LONE_SURROGATE.sub("\ufffd", text)
    return text


def _read_label(values: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else values.get(column)
    return None if value is None else _clean(str(value), set())
