"""Documents to sequences in a test, and tables of sequences as lists."""

from typing import Any

from retort.config.sections import Dataset
from retort.corpus.documents import Document
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from support.sections import replace

DATASET: Dataset = Dataset.model_validate({})
CHAT = replace(DATASET, prompt_column="prompt", response_column="response")


def document(text: str, *, prompt: str | None = None, index: int = 0) -> Document:
    """Return a training document."""
    return Document(index, text, prompt, None, None, "train")


def tokenize(
    documents: list[Document], tokenizer: Any, dataset: Dataset
) -> tuple[SequenceTable, TokenCounts]:
    """Return the sequences of documents, and what was counted."""
    counts = TokenCounts()
    return tokenize_documents(documents, tokenizer, dataset, counts=counts), counts


def rows(table: SequenceTable) -> list[tuple[list[int], list[bool], list[int]]]:
    """Return (ids, loss mask, segment starts) of each sequence."""
    found = [table[i] for i in range(len(table))]
    return [(r.ids.tolist(), r.loss_mask.tolist(), r.segment_starts.tolist()) for r in found]


def predicted(table: SequenceTable) -> list[int]:
    """Return the tokens that are predicted with loss, in order."""
    return [ids[t + 1] for ids, mask, _ in rows(table) for t, counts in enumerate(mask) if counts]
