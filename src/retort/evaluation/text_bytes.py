"""Number of bytes of text that a token stands for: the denominator of bits per byte.

Bytes are those of the text in UTF-8. A special token (begin, end, of a chat template) is not text: 0 bytes. A token may
be part of a character, so its bytes are counted in the vocabulary; decoding it alone would give a replacement character
of three bytes. Tokenizers whose tokens do not say which spaces were between them (WordPiece) have no such count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.tokens.normalization import SPACE, list_steps
from retort.tokens.sequences import SequenceTable

_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_CHARACTER_PARTS = [f"<0x{byte:02X}>" for byte in range(0x80, 256)]
_SPACE_IN_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
_BYTE_LEVEL_SPACE = (
    "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # a space in byte-level vocabularies
)
_DROP_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


def count_next_bytes(
    table: SequenceTable, tokenizer: Any, *, changed: int = 0
) -> NDArray[np.int64] | str:
    """Return the bytes of text of the token that each counted position predicts, int64 [P]; or why there are none.

    A space that the tokenizer put in front of a text is not counted. `changed`: number of the documents whose length
    the tokenizer changed before it split them (see `retort.tokens.normalization`).
    """
    if changed:
        return f"the tokenizer normalizes text, and the length of {changed:,} held-out documents changed with it"
    sizes = TokenBytes(tokenizer)
    if sizes.count is None:
        return "the tokenizer's tokens do not say which spaces were between them"
    ids = np.asarray(table.ids)
    counted, next_ids = table.counted, table.next_ids
    if unknown := int(np.isin(next_ids, sizes.unknown).sum()):
        return f"the tokenizer does not know {unknown:,} of the tokens, so their bytes are lost"
    distinct, indices = np.unique(ids, return_inverse=True)
    sizes_T = sizes.of(distinct.tolist())[indices]
    is_spelled, continues = _find_spelled_spaces(table, tokenizer)
    sizes_T[continues] = 0  # one byte of text in three tokens
    next_sizes = np.array(sizes_T[counted + 1])
    begins = np.isin(next_ids, sizes.beginning_with_space(np.unique(next_ids).tolist()))
    begins |= is_spelled[counted + 1]
    is_added = begins & _find_text_starts(table, sizes, counted)
    return next_sizes - is_added


def _find_text_starts(
    table: SequenceTable, sizes: "TokenBytes", counted: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return where the predicted token begins a text that the tokenizer puts a space in front of, [P]."""
    ids, offsets = np.asarray(table.ids), table.offsets
    follows_special = np.isin(ids[counted], sizes.special)
    begins = np.diff(table.documents, prepend=-1) != 0  # sequences that begin a document
    sequences = np.searchsorted(offsets, counted, side="right") - 1
    firsts = np.zeros(len(counted), dtype=np.bool_)
    firsts[np.unique(sequences, return_index=True)[1]] = True  # of its sequence
    firsts &= begins[sequences]
    at_offset = counted == offsets[sequences]
    is_start = firsts & at_offset & follows_special  # a text after its begin token
    if not getattr(sizes.tokenizer, "chat_template", None):
        is_start |= firsts & ~at_offset  # a response, which is tokenized apart from its prompt
    found: NDArray[np.bool_] = is_start & sizes.adds_space_to_text
    if sizes.adds_space_after_special:
        found |= follows_special & ~(firsts & at_offset)
    return found


def _find_spelled_spaces(
    table: SequenceTable, tokenizer: Any
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return where three byte tokens begin to spell a space, and where they continue, [T] each.

    Only in a vocabulary without a token for a space. A space may be cut by the end of a sequence, whose last token is
    repeated in the next one.
    """
    ids, vocabulary = np.asarray(table.ids), tokenizer.get_vocab()
    if SPACE in vocabulary or not all(token in vocabulary for token in _SPACE_IN_BYTES):
        return np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
    first, second, third = (vocabulary[token] for token in _SPACE_IN_BYTES)
    sequences = np.repeat(np.arange(len(table)), np.diff(table.offsets))

    def beside(distance: int) -> NDArray[np.int64]:
        """Return the tokens at a distance in the same sequence, -1 outside of it, [T]."""
        there = np.arange(len(ids)) + distance
        inside = (there >= 0) & (there < len(ids))
        there = np.where(inside, there, 0)
        return np.where(inside & (sequences[there] == sequences), ids[there], -1)

    # After a cut, what is in front of the rest of a space is the end of a prompt, which is no part of a character.
    parts = [vocabulary[t] for t in _CHARACTER_PARTS if t in vocabulary]
    is_part = np.isin(beside(-2), parts)
    begins = (ids == first) & (beside(1) == second) & np.isin(beside(2), [third, -1])
    continues = (ids == second) & (beside(-1) == first) & np.isin(beside(1), [third, -1])
    is_rest = ~is_part & _find_cuts_after(table, (first, second))[sequences]
    continues |= (ids == third) & (beside(-1) == second) & ((beside(-2) == first) | is_rest)
    return begins, continues


def _find_cuts_after(table: SequenceTable, tokens: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which sequences continue a document whose earlier sequence ends with two tokens, [S].

    Other characters than a space end with the same bytes.
    """
    ids, begins = np.asarray(table.ids), table.offsets[:-1]
    before = np.stack([ids[np.maximum(begins - 2, 0)], ids[np.maximum(begins - 1, 0)]])
    goes_on = np.diff(table.documents, prepend=-1) == 0
    found: NDArray[np.bool_] = goes_on & (before == np.array(tokens)[:, None]).all(axis=0)
    return found


def _count_piece(token: str) -> int:
    return 1 if token in _BYTE_TOKENS else len(token.replace(SPACE, " ").encode())


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of text of the tokens of one tokenizer, in the middle of a text."""

    tokenizer: Any

    @cached_property
    def special(self) -> list[int]:
        """Ids of the tokens that are not text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if token.special}
        return sorted(special | set(self.tokenizer.all_special_ids))

    @cached_property
    def unknown(self) -> list[int]:
        """The id that stands for text without a token, if it has no other use; a list of 0 or 1."""
        tokenizer = self.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return [] if tokenizer.unk_token_id in (None, *others) else [tokenizer.unk_token_id]

    @cached_property
    def count(self) -> Callable[[Any], int] | None:
        """The function from a token of the vocabulary to its bytes; None if a token does not say them."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self._count_in_python()
        before = [*list_steps(backend.pre_tokenizer), *list_steps(backend.normalizer)]
        drops = any(
            step["type"] in _DROP_SPACES or step.get("behavior") == "Removed" for step in before
        )
        decoder = list_steps(backend.decoder)
        if drops:
            return None
        if any(step["type"] == "ByteLevel" for step in decoder):
            return len  # each character of the vocabulary entry is one byte
        if any(
            step["type"] == "Metaspace"
            or (step["type"] == "Replace" and step["pattern"].get("String") == SPACE)
            for step in decoder
        ):
            return _count_piece
        return None

    def _count_in_python(self) -> Callable[[Any], int] | None:
        """Return the function of a tokenizer without `tokenizers`: of bytes (ByT5, tiktoken), or none."""
        vocabulary = self.tokenizer.get_vocab()
        if all(isinstance(token, bytes) for token in vocabulary):
            return len
        is_bytes = all(chr(byte) in vocabulary for byte in range(256))
        return (lambda _: 1) if is_bytes and len(vocabulary) < 1000 else None

    def of(self, ids: list[int]) -> NDArray[np.int64]:
        """Return the bytes of text that each token stands for, int64 [len(ids)]."""
        assert self.count is not None
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special, num_tokens = set(self.special), len(self.tokenizer)
        sizes = []
        for token_id in ids:
            if token_id in special or token_id >= num_tokens:
                sizes.append(0)
            elif token_id in added:
                sizes.append(len(added[token_id].content.encode()))
            else:
                sizes.append(self.count(self.tokenizer.convert_ids_to_tokens(token_id)))
        return np.array(sizes, dtype=np.int64)

    def beginning_with_space(self, ids: list[int]) -> list[int]:
        """Return those of the ids whose text begins with a space."""
        space = _BYTE_LEVEL_SPACE if self.count is len else SPACE
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return [i for i, token in zip(ids, tokens, strict=True) if str(token).startswith(space)]

    @cached_property
    def adds_space_to_text(self) -> bool:
        """Whether the tokenizer puts a space in front of a text."""
        return self._has_space_in_front("", 0)

    @cached_property
    def adds_space_after_special(self) -> bool:
        """Whether it puts a space in front of what follows a special token inside a text."""
        if not self.special:
            return False
        token = self.tokenizer.convert_ids_to_tokens(self.special[0])
        return self._has_space_in_front(f"{token}a{token}", 2)

    def _has_space_in_front(self, before: str, number: int) -> bool:
        ids = self.tokenizer(f"{before}a", add_special_tokens=False)["input_ids"]
        if number:
            places = [place for place, i in enumerate(ids) if i == self.special[0]]
            ids = ids[places[-1] + 1 :] if len(places) == number else []
        is_spelled = self.tokenizer.convert_ids_to_tokens(ids[:3]) == _SPACE_IN_BYTES
        return is_spelled or bool(self.beginning_with_space(ids[:1]))
