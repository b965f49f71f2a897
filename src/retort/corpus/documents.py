"""What a document is, how it is cleaned and held out, and counts that account for each one read."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import xxhash

from retort.config.sections import Dataset

# With 5 expected, none is held out once in 150 corpora.
_FEW_HELD_OUT = 5
_MANY = 10**12
_LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One document; of a prompt + response, `text` is the response, and only it carries loss."""

    index: int  # place in the corpus, from 0
    text: str
    prompt: str | None
    category: str | None
    language: str | None
    split: Literal["train", "val"]


@dataclass
class Counts:
    """What became of the documents: read = used + skipped.

    `skipped` is by reason; `cleaned`, by change, and `held_out` are among those used.
    """

    read: int = 0
    used: int = 0
    held_out: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    cleaned: dict[str, int] = field(default_factory=dict)

    def reconcile(self) -> None:
        """Assert that every document read is accounted for."""
        assert self.read == self.used + sum(self.skipped.values()), self
        assert self.held_out <= self.used, self

    def merge(self, other: "Counts") -> None:
        """Add what `other` counted."""
        self.read += other.read
        self.used += other.used
        self.held_out += other.held_out
        for mine, theirs in ((self.skipped, other.skipped), (self.cleaned, other.cleaned)):
            for reason, number in theirs.items():
                mine[reason] = mine.get(reason, 0) + number

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON object, reasons in alphabetical order."""
        skipped, cleaned = dict(sorted(self.skipped.items())), dict(sorted(self.cleaned.items()))
        return asdict(self) | {"skipped": skipped, "cleaned": cleaned}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Counts":
        """Return the counts that `to_json` wrote."""
        counts = cls()
        counts.merge(cls(**value))
        return counts


def is_held_out(content: str, *, seed: int, fraction: float) -> bool:
    """Say whether a document (prompt and text together) is held out: by nothing but its content."""
    return xxhash.xxh3_64_intdigest(content.encode(), seed) / 2**64 < fraction


def is_trial(dataset: Dataset) -> bool:
    """Say whether so few documents are asked for that chance might hold out none: then the first one is.

    A trial of ten documents (max_samples: 10) is how people begin; it must run to its end.
    """
    expected = (dataset.max_samples or _MANY) * dataset.validation_fraction
    return 0 < expected < _FEW_HELD_OUT


def make_document(
    values: Mapping[str, Any], dataset: Dataset, *, index: int, split: str | None, counts: Counts
) -> Document | None:
    """Clean and check one row; count it; None when it is skipped."""
    counts.read += 1
    has_prompt = dataset.prompt_column is not None
    text = values.get(str(dataset.response_column) if has_prompt else dataset.text_column)
    prompt = values.get(str(dataset.prompt_column)) if has_prompt else ""
    reason = _find_flaw(prompt, text)
    if reason is not None:
        counts.skipped[reason] = counts.skipped.get(reason, 0) + 1
        return None
    changes: set[str] = set()
    prompt, text = _clean(cast(str, prompt), changes), _clean(cast(str, text), changes)
    if split is None:
        fraction = dataset.validation_fraction
        is_val = is_held_out(prompt + text, seed=dataset.seed, fraction=fraction)
        is_val = is_val or (index == 0 and is_trial(dataset))
        split = "val" if is_val else "train"
    counts.used += 1
    counts.held_out += split == "val"
    for change in changes:
        counts.cleaned[change] = counts.cleaned.get(change, 0) + 1
    return Document(
        index=index,
        text=text,
        prompt=prompt if has_prompt else None,
        category=_read_label(values, dataset.category_column),
        language=_read_label(values, dataset.language_column),
        split=cast(Literal["train", "val"], split),
    )


def _find_flaw(prompt: Any, text: Any) -> str | None:
    """Return why a document cannot be used, or None."""
    if not isinstance(text, str) or not isinstance(prompt, str):
        return "not_text"
    if not text.replace("\0", "").strip():
        return "empty_response" if prompt.replace("\0", "").strip() else "empty"
    return None


def _clean(text: str, changes: set[str]) -> str:
    """Return text that tokenizers and files can hold; add to `changes` what had to be changed."""
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
