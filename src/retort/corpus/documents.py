"""Documents: built from rows, cleaned, assigned to train or val, and counted."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, cast

import xxhash
from pydantic import Field, PlainSerializer

from retort.config.sections import Dataset
from retort.corpus.chats import find_chat, find_tools, join_texts

# With 5 expected held-out documents, 1 in 150 corpora would have none (Poisson: exp(-5)).
_FEW_HELD_OUT = 5
_UNLIMITED = 10**12
MAX_ROWS = 3  # skipped rows that are named, by reason
_LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One document. If it has a prompt, `text` is the response, and only the response carries loss.

    Of a chat, `messages` are what is tokenized, and `tools` what they call; `text` is all that the assistant says, and
    `prompt` all else.
    """

    index: int  # in the corpus, from 0
    text: str
    prompt: str | None
    category: str | None
    language: str | None
    split: Literal["train", "val"]
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    source: str | None = None  # the label of its source in a mixture

    def to_json(self) -> dict[str, Any]:
        """Return the document as a JSON object, without the keys of chats and mixtures where it is of none."""
        values, rare = asdict(self), ("messages", "tools", "source")
        return {k: v for k, v in values.items() if v is not None or k not in rare}


Rows = Annotated[dict[str, list[int]], Field(exclude_if=lambda rows: not rows)]
# Sorted when written: in whatever order documents are read, equal counts give equal bytes.
Reasons = Annotated[Counter[str], PlainSerializer(lambda found: dict(sorted(found.items())))]


@dataclass
class Counts:
    """Numbers of documents: read = used + skipped.

    `skipped` is by reason, and `rows` are the numbers of the first that are skipped. `cleaned` (by change) and
    `held_out` are subsets of `used`. `sources`: the same of each source of a mixture, by label.
    """

    read: int = 0
    used: int = 0
    held_out: int = 0
    skipped: Reasons = field(default_factory=Counter)
    cleaned: Reasons = field(default_factory=Counter)
    rows: Rows = field(default_factory=dict)
    sources: Annotated[dict[str, "Counts"], Field(exclude_if=lambda found: not found)] = field(
        default_factory=dict
    )

    def skip(self, reason: str, row: int) -> None:
        """Count a row that is skipped."""
        self.skipped[reason] += 1
        self._add_rows({reason: [row]})

    def _add_rows(self, rows: Mapping[str, list[int]]) -> None:
        for reason, numbers in rows.items():
            self.rows[reason] = sorted([*self.rows.get(reason, []), *numbers])[:MAX_ROWS]

    def describe_skipped(self) -> str:
        """Return the skipped rows by reason, and the first of them, "7 empty (rows 2, 3, 5, ...)"; "" if none is."""
        parts = []
        for reason, number in sorted(self.skipped.items()):
            rows = self.rows.get(reason, [])
            more = ", ..." if number > len(rows) else ""
            named = f" (rows {', '.join(map(str, rows))}{more})" if rows else ""
            parts.append(f"{number:,} {reason}{named}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON object, without rows and sources if there are none."""
        found = {k: v for k, v in vars(self).items() if v or k not in ("rows", "sources")}
        sources = {label: counts.to_json() for label, counts in sorted(self.sources.items())}
        return found | ({"sources": sources} if sources else {})

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
        self._add_rows(other.rows)
        for label, counts in other.sources.items():
            self.sources.setdefault(label, Counts()).merge(counts)


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
    values: Mapping[str, Any],
    dataset: Dataset,
    *,
    index: int,
    split: str | None,
    counts: Counts,
    source: str | None = None,
) -> Document | None:
    """Return the document of one row, cleaned, or None if it is skipped; add it to `counts`.

    `split` is "train", "val", or None: then the content decides. `source`: the label of its source in a mixture.
    """
    if source is not None:
        alone = Counts()
        document = make_document(values, dataset, index=index, split=split, counts=alone)
        counts.merge(replace(alone, sources={source: alone}))
        return document and replace(document, source=source)
    counts.read += 1
    found = _read_row(values, dataset)
    if isinstance(found, str):
        counts.skip(found, index)
        return None
    prompt, text, chat, tools = found
    changes: set[str] = set()
    text, chat = _clean(text, changes), _clean_all(chat, changes)
    prompt = None if prompt is None else _clean(prompt, changes)
    if split is None:
        content, fraction = (prompt or "") + text, dataset.validation_fraction
        is_val = is_held_out(content, seed=dataset.seed, fraction=fraction)
        is_val = is_val or (index == 0 and is_small_trial(dataset))
        split = "val" if is_val else "train"
    counts.used += 1
    counts.held_out += split == "val"
    counts.cleaned.update(changes)
    return Document(
        index=index,
        text=text,
        prompt=prompt,
        category=_read_label(values, dataset.category_column),
        language=_read_label(values, dataset.language_column),
        split=cast(Literal["train", "val"], split),
        messages=chat,
        tools=tools,
    )


def _read_row(
    values: Mapping[str, Any], dataset: Dataset
) -> tuple[str | None, str, list[dict[str, Any]] | None, list[Any] | None] | str:
    """Return (prompt, text, messages of a chat, its tools) of a row, or the reason why it is skipped."""
    try:
        chat = find_chat(values, dataset)
        tools = find_tools(values) if chat else None
    except ValueError as error:
        return str(error)
    text: Any
    prompt: Any = None
    if chat is not None:
        prompt, text = (join_texts(chat, of_assistant=is_said) for is_said in (False, True))
    elif dataset.prompt_column is not None:
        prompt, text = values.get(dataset.prompt_column), values.get(str(dataset.response_column))
    else:
        text = values.get(dataset.text_column)
    has_prompt = chat is not None or dataset.prompt_column is not None
    if dataset.system_column is not None and not has_prompt:
        return "not_a_chat"
    reason = _find_flaw(prompt if has_prompt else "", text)
    return reason or (prompt, text, chat, tools)


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


def _clean_all(value: Any, changes: set[str]) -> Any:
    """Return a value with all its text cleaned."""
    if isinstance(value, str):
        return _clean(value, changes)
    if isinstance(value, Mapping):
        return {key: _clean_all(inner, changes) for key, inner in value.items()}
    return [_clean_all(inner, changes) for inner in value] if isinstance(value, list) else value


def _read_label(values: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else values.get(column)
    return None if value is None else _clean(str(value), set())
