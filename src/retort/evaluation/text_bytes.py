"""Number of bytes of text that a token stands for, with any tokenizer: the denominator of bits per byte.

Bytes are those of the text in UTF-8. A special token (begin, end, of a chat template) is not text: 0 bytes. A token of
a byte-level tokenizer may be part of a character, so its bytes are counted in the vocabulary; decoding it alone would
give a replacement character of three bytes.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.tokens.sequences import SequenceTable

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in SentencePiece vocabularies


def count_next_bytes(table: SequenceTable, tokenizer: Any) -> NDArray[np.int64]:
    """Return the bytes of text of the token that each counted position predicts, int64 [P]."""
    counted = np.flatnonzero(table.loss_mask)
    next_ids = np.asarray(table.ids)[counted + 1]
    ids, indices = np.unique(next_ids, return_inverse=True)
    sizes = count_token_bytes(tokenizer, ids.tolist())[indices]
    return sizes - _count_added_spaces(table, tokenizer, next_ids, counted)


def count_token_bytes(tokenizer: Any, ids: list[int]) -> NDArray[np.int64]:
    """Return the bytes of text that each token stands for in the middle of a text, int64 [len(ids)]."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    encoding = _find_encoding(tokenizer)
    sizes = []
    for token_id in ids:
        if token_id in special or token_id >= len(tokenizer):
            sizes.append(0)
        elif token_id in added:
            sizes.append(len(added[token_id].content.encode()))
        else:
            sizes.append(_count_bytes(tokenizer, token_id, encoding))
    return np.array(sizes, dtype=np.int64)


def _count_bytes(tokenizer: Any, token_id: int, encoding: str) -> int:
    token = tokenizer.convert_ids_to_tokens(token_id)
    if encoding == "bytes":
        return len(token)  # each character of the vocabulary entry is one byte
    if encoding == "pieces":
        return 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())
    # Any other kind: the bytes that a second copy adds, so that a space between words counts.
    once, twice = (tokenizer.decode([token_id] * times) for times in (1, 2))
    return len(twice.encode()) - len(once.encode())


def _find_encoding(tokenizer: Any) -> str:
    """Return how the vocabulary is encoded: "bytes" (byte-level BPE), "pieces" (SentencePiece) or "other"."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = list(_steps(json.loads(backend.to_str())["decoder"])) if backend is not None else []
    if any(step["type"] == "ByteLevel" for step in steps):
        return "bytes"
    is_pieces = any(
        step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["pattern"].get("String") == _SPACE)
        for step in steps
    )
    return "pieces" if is_pieces else "other"


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    yield decoder
    for step in decoder.get("decoders", []):
        yield from _steps(step)


def _count_added_spaces(
    table: SequenceTable, tokenizer: Any, next_ids: NDArray[np.int32], counted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return 1 where a predicted token begins a document with a space that the tokenizer added, else 0, [P]."""
    found = np.zeros(len(counted), dtype=np.int64)
    if _find_encoding(tokenizer) != "pieces":
        return found
    begins = np.flatnonzero(np.diff(table.documents, prepend=-1))  # sequences that begin a document
    firsts = np.isin(counted, table.offsets[begins])
    head_ids = np.asarray(table.ids)[counted[firsts]]
    sizes = count_token_bytes(tokenizer, head_ids.tolist()).tolist()
    for index, size in zip(np.flatnonzero(firsts).tolist(), sizes, strict=True):
        token_id = int(next_ids[index])
        has_space = tokenizer.convert_ids_to_tokens(token_id).startswith(_SPACE)
        if size == 0 and has_space and not tokenizer.decode([token_id]).startswith(" "):
            found[index] = 1
    return found
