"""Documents to sequences: encode, split, compute the loss mask, and count every token."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.config.sections import Dataset
from retort.corpus.documents import Document
from retort.tokens.normalization import find_length_change
from retort.tokens.sequences import (
    SPLITS,
    SequenceRow,
    SequenceTable,
    build_table,
    concatenate_tables,
)
from retort.tokens.tokenizer import encode_prompt

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

    def reconcile(self) -> None:
        """Assert that the parts of `read` add up."""
        assert self.read == self.stored + self.truncated + self.without_loss + self.too_short, self

    def to_json(self) -> dict[str, int]:
        """Return the counts as a JSON object; a tokenizer that never changes a text has no count of it."""
        return {k: v for k, v in asdict(self).items() if v or k != "held_out_normalized"}

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

    Sequences are in the order of the documents. Raises ValueError for a chat template that rewrites a prompt.
    """
    changes_length = find_length_change(tokenizer)
    for batch in _cut_batches(documents):
        if changes_length:
            counts.held_out_normalized += sum(
                document.split == "val" and changes_length(document.text) for document in batch
            )
        rows: dict[str, list[SequenceRow]] = {split: [] for split in SPLITS}
        for document, ids, first_loss in _encode(batch, tokenizer, dataset):
            counts.documents += 1
            counts.read += len(ids)
            if len(ids) < 2:
                counts.too_short += len(ids)
                continue
            label = (document.category or "", document.language or "")
            for piece, mask in _split(np.array(ids, np.int32), first_loss, dataset, counts):
                rows[document.split].append((piece, mask, document.index, label))
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
    ids: NDArray[np.int32], first_loss: int, dataset: Dataset, counts: TokenCounts
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield (ids, loss mask) of each sequence of a document; `first_loss`: its first token to be predicted."""
    length = dataset.max_length
    if len(ids) > length and dataset.long_documents == "truncate":
        counts.documents_truncated += 1
        counts.truncated += len(ids) - length
        ids = ids[:length]
    counts.documents_split += len(ids) > length
    for start in range(0, len(ids) - 1, length - 1):
        piece = ids[start : start + length]
        num_new = len(piece) - (start > 0)  # the first token is also the last of the piece before
        mask = np.arange(start + 1, start + len(piece) + 1) >= first_loss
        mask[-1] = False
        if mask.any():
            counts.stored += num_new
            yield piece, mask
        else:
            counts.without_loss += num_new


def _encode(
    batch: list[Document], tokenizer: Any, dataset: Dataset
) -> Iterator[tuple[Document, list[int], int]]:
    """Yield each document with its ids and the number of the first token to be predicted."""
    if dataset.prompt_column is not None and getattr(tokenizer, "chat_template", None):
        for document in batch:
            yield (document, *_apply_chat_template(document, tokenizer))
        return
    has_end = dataset.append_eos and tokenizer.eos_token_id is not None
    end = [tokenizer.eos_token_id] if has_end else []
    plain = dataset.prompt_column is None
    bodies = tokenizer([d.text for d in batch], add_special_tokens=plain)["input_ids"]
    for document, body in zip(batch, bodies, strict=True):
        head = encode_prompt(document.prompt, tokenizer) if document.prompt is not None else []
        if end and body[-1:] == end:  # some tokenizers add it themselves
            body = body[:-1]
        yield document, [*head, *body, *end], len(head)


def _apply_chat_template(document: Document, tokenizer: Any) -> tuple[list[int], int]:
    """Return (ids, number of the first response token) of a prompt + response, by the chat template.

    Raises ValueError when the template changes the prompt once the response follows.
    """
    assert document.prompt is not None
    prompt = [{"role": "user", "content": document.prompt}]
    both = [*prompt, {"role": "assistant", "content": document.text}]
    head = encode_prompt(document.prompt, tokenizer)
    ids = tokenizer.apply_chat_template(both, tokenize=True, return_dict=False)
    if ids[: len(head)] == head:
        return list(ids), len(head)
    # A token would span the prompt and the response: tokenize the two separately, as when generating.
    head_text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(both, tokenize=False)
    if not text.startswith(head_text):
        raise ValueError(
            f"the tokenizer's chat template rewrites the prompt of document {document.index} once the response "
            "follows, so the response's tokens cannot be found. Use a tokenizer whose template does not change the "
            "prompt, or one without a template."
        )
    rest = tokenizer(text[len(head_text) :], add_special_tokens=False)["input_ids"]
    return [*head, *rest], len(head)
