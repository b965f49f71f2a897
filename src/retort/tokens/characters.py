"""Characters that a tokenizer cannot encode: some raise an error, some leave them out, some have an unknown token."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from retort.cli import first_line
from retort.corpus.documents import Document

T = TypeVar("T")


def explain_encoding(
    encoded: Iterator[T], documents: Sequence[Document], tokenizer: Any
) -> Iterator[T]:
    """Yield what a tokenizer made of the documents; its errors become a ValueError that names text and character."""
    try:
        yield from encoded
    except Exception as error:
        if type(error) is not Exception:  # as `tokenizers` raises them
            raise
        raise ValueError(
            f"the tokenizer cannot encode {_name_culprit(documents, tokenizer)}, and has no token for unknown text "
            f"({first_line(error)}). Use a tokenizer that can (dataset.tokenizer), or remove such text."
        ) from error


def find_lost_characters(documents: Sequence[Document], tokenizer: Any) -> list[str]:
    """Return the characters that have no token: they are left out, or become the unknown token.

    Spaces are not looked at, except for the line break between prompt and response.
    """
    letters = {c for d in documents for c in f"{d.prompt or ''}{d.text}" if not c.isspace()}
    letters |= {"\n"} if any(d.prompt is not None for d in documents) else set()
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, None}
    return [
        letter
        for letter in sorted(letters)
        if set(tokenizer(letter, add_special_tokens=False)["input_ids"]) <= unknown
    ]


def _name_culprit(documents: Sequence[Document], tokenizer: Any) -> str:
    for document in documents:
        # A line break is put between a prompt and its response.
        text = document.text if document.prompt is None else f"{document.prompt}\n{document.text}"
        for letter in dict.fromkeys(text):
            if not _can_encode(letter, tokenizer):
                is_between = letter not in f"{document.prompt or ''}{document.text}"
                place = "between prompt and response" if is_between else "in the text"
                return f"{letter!r}, {place} of document {document.index}"
    return f"a text of documents {documents[0].index} to {documents[-1].index}"


def _can_encode(text: str, tokenizer: Any) -> bool:
    try:
        tokenizer(text, add_special_tokens=False)
    except Exception:
        return False
    return True
