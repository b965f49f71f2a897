"""Documents to sequences: encode, split, compute the loss mask, and count every token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from retort.config.sections import Dataset
from retort.corpus.documents import Document
from retort.tokens.characters import explain_encoding
from retort.tokens.chat import ChatFormat
from retort.tokens.controls import ControlTokens
from retort.tokens.normalization import find_length_change
from retort.tokens.said import ChatError, Message
from retort.tokens.sequences import (
    SPLITS,
    SequenceRow,
    SequenceTable,
    build_table,
    concatenate_tables,
)
from retort.tokens.tokenizer import encode_prefix

# Tokenizers need about 100 bytes per token of a batch.
_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 1 << 20


@dataclass
class TokenCounts:
    """Numbers of tokens: `read` = `stored` + `truncated` + `without_loss` + `too_short`.

    A token that two consecutive sequences share counts once.
    """

    documents: int = 0
    documents_split: int = 0
    documents_truncated: int = 0
    read: int = 0
    stored: int = 0
    truncated: int = 0  # cut off by long_documents: truncate
    without_loss: int = 0  # in sequences that contain only a prompt
    too_short: int = 0  # in documents of one token: nothing to predict
    held_out_normalized: int = (
        0  # held-out documents whose length in bytes the tokenizer changes before it splits them
    )

    # Documents in which control tokens are written out.
    with_control_tokens: Annotated[int, Field(exclude_if=lambda number: not number)] = 0

    def reconcile(self) -> None:
        """Assert that the parts of `read` add up."""
        assert self.read == self.stored + self.truncated + self.without_loss + self.too_short, self

    def to_json(self) -> dict[str, int]:
        """Return the counts as a JSON object; what is rare is left out where it is 0."""
        rare = ("held_out_normalized", "with_control_tokens")
        return {k: v for k, v in asdict(self).items() if v or k not in rare}

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def tokenize_documents(
    documents: Iterable[Document], tokenizer: Any, dataset: Dataset, *, counts: TokenCounts
) -> SequenceTable:
    """Return the sequences of documents of one split, in memory; add to `counts`."""
    batches = tokenize_batches(documents, tokenizer, dataset, counts=counts)
    return concatenate_tables(table for tables in batches for table in tables.values())


def tokenize_batches(
    documents: Iterable[Document], tokenizer: Any, dataset: Dataset, *, counts: TokenCounts
) -> Iterator[dict[str, SequenceTable]]:
    """Yield {split: sequences of at most `dataset.max_length` tokens} per batch of documents; add to `counts`.

    Sequences are in the order of the documents. Raises ValueError for a document that the chat template cannot render,
    and for text that the tokenizer cannot encode.
    """
    changes_length = find_length_change(tokenizer)
    controls = ControlTokens(tokenizer, as_text=dataset.control_tokens == "text")
    chats = _Chats(tokenizer, dataset, controls)
    for batch in _cut_batches(documents):
        if changes_length:
            counts.held_out_normalized += sum(
                document.split == "val" and changes_length(document.text) for document in batch
            )
        counts.with_control_tokens += sum(
            controls.are_in(f"{document.prompt or ''}\n{document.text}") for document in batch
        )
        rows: dict[str, list[SequenceRow]] = {split: [] for split in SPLITS}
        encoded = explain_encoding(_encode(batch, chats, dataset), batch, tokenizer)
        for document, ids, said in encoded:
            counts.read += len(ids)
            if len(ids) < 2:
                counts.too_short += len(ids)
                continue
            label: tuple[str, ...] = (document.category or "", document.language or "")
            label += () if document.source is None else (document.source,)
            for piece, mask in _split(ids, said, dataset, counts):
                rows[document.split].append((piece, mask, document.index, label))
        counts.documents += len(batch)
        yield {split: build_table(rows[split]) for split in SPLITS}
    counts.reconcile()


def _cut_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield batches, limited in documents and in characters."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text) + len(document.prompt or "")
        if len(batch) == _DOCUMENTS_PER_BATCH or num_characters >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _split(
    ids: NDArray[np.int32], said: NDArray[np.bool_], dataset: Dataset, counts: TokenCounts
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield (ids, loss mask) of each sequence of a document; `said`: which of its tokens are to be predicted."""
    length = dataset.max_length
    if len(ids) > length and dataset.long_documents == "truncate":
        counts.documents_truncated += 1
        counts.truncated += len(ids) - length
        ids, said = ids[:length], said[:length]
    counts.documents_split += len(ids) > length
    is_stored = np.zeros(len(ids), np.bool_)
    for tokens, first in _cut_windows(said, length):
        mask = np.zeros(len(tokens), np.bool_)
        mask[:-1] = said[tokens[1:]] & (tokens[1:] >= first)
        if mask.any():
            is_stored[tokens] = True
            yield ids[tokens], mask
    counts.stored += int(is_stored.sum())
    counts.without_loss += int((~is_stored).sum())


def _cut_windows(said: NDArray[np.bool_], length: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield (numbers of the tokens of a sequence, the first that no earlier one predicts) until all are predicted.

    A sequence begins with as much as fits, but at least half of it, of what comes before the response; if it begins
    within a response, then with the response's last token so far too, from which the next one is predicted.
    """
    begins = np.flatnonzero(said & ~np.concatenate([[False], said[:-1]]))  # of responses
    done, end = 0, len(said)
    while said[done:].any():
        first = done + int(np.argmax(said[done:]))
        begin = int(begins[np.searchsorted(begins, first, side="right") - 1])
        if first == begin:
            context = min(begin, max(length // 2, length - (end - begin)))
            tokens = np.arange(begin - context, min(begin - context + length, end))
        else:
            context = min(begin, length // 2, length - 2)
            rest = np.arange(first - 1, min(first - 1 + length - context, end))
            tokens = np.concatenate([np.arange(begin - context, begin), rest])
        yield tokens, first
        done = int(tokens[-1]) + 1


def _encode(
    batch: list[Document], chats: "_Chats", dataset: Dataset
) -> Iterator[tuple[Document, NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield (document, its ids, which of them are to be predicted); a chat may have several renderings."""
    tokenizer, controls = chats.tokenizer, chats.controls
    has_end = dataset.append_eos and tokenizer.eos_token_id is not None
    end = [tokenizer.eos_token_id] if has_end else []
    bodies: dict[int, list[int]] = {}
    for is_plain in (True, False):
        texts = {
            i: d.text
            for i, d in enumerate(batch)
            if (d.prompt is None) == is_plain and not chats.is_rendered(d)
        }
        if texts:
            found = controls.encode_texts([*texts.values()], add_special_tokens=is_plain)
            bodies |= zip(texts, found, strict=True)
    for i, document in enumerate(batch):
        if i not in bodies:
            for tokens, said in chats.encode(document):
                yield document, np.array(tokens, np.int32), np.array(said, np.bool_)
            continue
        body = bodies[i]
        head = []
        if document.prompt is not None:
            head = encode_prefix(f"{document.prompt}\n", tokenizer, controls=controls)
        if end and body[-1:] == end:  # some tokenizers add it themselves
            body = body[:-1]
        ids = np.array([*head, *body, *end], np.int32)
        yield document, ids, np.arange(len(ids)) >= len(head)


class _Chats:
    """Encodes chats, and prompts with responses, by the tokenizer's chat template, if it has one."""

    def __init__(self, tokenizer: Any, dataset: Dataset, controls: ControlTokens) -> None:
        self.tokenizer, self.dataset, self.controls = tokenizer, dataset, controls

    @cached_property
    def _format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer, date=self.dataset.chat_date)

    def is_rendered(self, document: Document) -> bool:
        """Return whether the document is to be rendered by the template.

        Raises ValueError for a chat of several turns without one.
        """
        if getattr(self.tokenizer, "chat_template", None):
            return document.prompt is not None
        require_template(document)
        return False

    def encode(self, document: Document) -> list[tuple[list[int], list[bool]]]:
        """Return the renderings of a chat. Raises ValueError, with the document's number, when there are none."""
        messages: Sequence[Message] = document.messages or [
            {"role": "user", "content": document.prompt},
            {"role": "assistant", "content": document.text},
        ]
        try:
            return self._format.encode(
                self.controls.mark(messages),
                tools=document.tools,
                turns=self.dataset.supervised_turns,
                append_eos=self.dataset.append_eos,
            )
        except ChatError as error:
            refuses_system = "system" in str(error).lower()  # as templates of Gemma 2 do
            advice = (
                "Write system prompts into the first question"
                if refuses_system
                else "Remove it from the corpus"
            )
            raise ValueError(
                f"document {document.index} cannot be rendered: {error}. {advice}, or use a "
                "tokenizer (dataset.tokenizer) with another chat template."
            ) from error


def require_template(document: Document) -> None:
    """Raise ValueError for a chat of several turns, which cannot be written without a chat template."""
    roles = [m["role"] for m in document.messages or ()]
    if roles and [role for role in roles if role != "system"] != ["user", "assistant"]:
        raise ValueError(
            f"document {document.index} is a chat ({', '.join(roles[:5])}{', ...' * (len(roles) > 5)}), but the "
            "tokenizer has no chat template to write it with. Use one that has (dataset.tokenizer), or put the "
            "template as chat_template.jinja into the tokenizer's folder."
        )
