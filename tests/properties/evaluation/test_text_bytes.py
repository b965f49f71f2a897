"""Bytes of tokens, for any text and every kind of tokenizer: those of the text, or not defined."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.pieces import KINDS, measure_text

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
# Spaces, newlines, what normalizers change, and the sign that stands for a space.
SPECIAL = st.sampled_from(" \n\tTheok.\u2581\ufb01\u0301\u00e9\u3000\u6771\U0001f600")
TEXTS = st.text(CHARACTERS | SPECIAL, min_size=1, max_size=40).filter(str.strip)
ALWAYS = ("byte level", "ByT5")
NEVER = ("word pieces",)
LENGTH_CHANGES = "\u2581\ufb01\u0301"


@cache
def make(kind: str) -> Any:
    return KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@example(text="00\U00018581", prompt="why?")  # ends with the bytes of the sign for a space
@example(text="\xaf\xb9", prompt=None)  # by NFKC a space, an accent and a 1: as many bytes
@given(text=TEXTS, prompt=st.none() | st.sampled_from(["why?", " ", "\u6771\n"]))
def test_bytes_of_all_tokens_are_those_of_any_text_or_not_defined(
    kind: str, text: str, prompt: str | None
) -> None:
    if kind == "ByT5" and prompt is None:
        prompt = ""  # it has no begin token: its first token is not predicted
    found = measure_text(make(kind), text, prompt=prompt)
    if isinstance(found, str):
        assert kind not in ALWAYS
    else:
        assert kind not in NEVER
        assert found == len(text.encode())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NEVER])
@given(text=st.text("abc xyz\n.T\u00e9\u6771\U0001f600", min_size=1).filter(lambda t: t[0] != " "))
def test_bytes_of_ordinary_text_are_always_defined(kind: str, text: str) -> None:
    if text.strip():
        assert measure_text(make(kind), text, prompt="why?") == len(text.encode())
