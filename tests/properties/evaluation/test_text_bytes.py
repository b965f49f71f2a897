"""Bytes of tokens, for any text."""

from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from retort.evaluation.text_bytes import count_next_bytes
from retort.tokens.tokenizer import load_tokenizer
from support.pieces import make_piece_tokenizer, tokenize_after_special

PIECES = make_piece_tokenizer(with_prefix=True)


@cache
def load_once(path: str) -> Any:
    return load_tokenizer(path)


@settings(max_examples=150)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40))
def test_bytes_of_all_tokens_are_those_of_any_text(tiny_teacher: Path, text: str) -> None:
    for tokenizer in (load_once(str(tiny_teacher)), PIECES):
        sizes = count_next_bytes(tokenize_after_special(tokenizer, text), tokenizer)
        assert sizes.sum() == len(text.encode()), tokenizer
