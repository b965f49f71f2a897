"""Control tokens written out in a document, such as <|im_start|>: text like any other, unless the config says not.

In a chat, only the template makes control tokens. Those in a message get a mark after their first character before it
is rendered, which is removed when the rendered text is tokenized. A mark anywhere else is text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_MARK = "\ufdd0"  # a noncharacter of Unicode
_REASONING = ("<think>", "</think>")  # written by people too, and read by chat templates


def _compile(names: set[str], *, marks: str = "") -> re.Pattern[str]:
    """Return a pattern of any of the names, the longest where several match, with `marks` after the first character."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(
        "|".join(re.escape(n[0]) + marks + re.escape(n[1:]) for n in longest_first) or "(?!)"
    )


class ControlTokens:
    """The control tokens of a tokenizer by their text. `as_text`: those in documents are tokenized as text."""

    def __init__(self, tokenizer: Any, *, as_text: bool = True) -> None:
        self.tokenizer, self.as_text = tokenizer, as_text
        added = getattr(tokenizer, "added_tokens_decoder", {})
        names = {str(token) for token in added.values() if token.special}
        names |= set(getattr(tokenizer, "all_special_tokens", ()))
        names = {name for name in names if len(name) > 1}
        self._all = _compile(names)
        texts = names - {*_REASONING}
        self._pattern = _compile(texts)
        self._unmarked, self._marked = (_compile(texts, marks=f"{_MARK}{n}") for n in "*+")

    def are_in(self, text: str) -> bool:
        """Return whether a control token is written out in a text."""
        return self._pattern.search(text) is not None

    def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of texts in which control tokens are what the config says."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=add_special_tokens)[
            "input_ids"
        ]
        for number, text in enumerate(texts):
            if self.as_text and self.are_in(text):
                ids[number] = self.tokenizer(
                    text, add_special_tokens=add_special_tokens, split_special_tokens=True
                )["input_ids"]
        return ids

    def mark(self, value: Any) -> Any:
        """Return a message, or another JSON-like value, in which control tokens in texts are marked as text."""
        if not self.as_text:
            return value
        if isinstance(value, str):
            return self._unmarked.sub(lambda m: m.group()[0] + _MARK + m.group()[1:], value)
        if isinstance(value, Mapping):
            return {key: self.mark(inner) for key, inner in value.items()}
        return [self.mark(inner) for inner in value] if isinstance(value, list | tuple) else value

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a rendered chat: control tokens are tokens where they are not marked."""
        if not self._marked.search(text):
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        found: list[int] = []
        done = 0
        # A stretch between two tokens of the template is tokenized by itself where it has a mark.
        for begin, end in self._list_stretches(text):
            if self._marked.search(text, begin, end):
                plain = self._marked.sub(lambda m: m.group()[0] + m.group()[2:], text[begin:end])
                found += self.encode_rendered(text[done:begin]) if done < begin else []
                found += self.tokenizer(plain, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
                done = end
        return found + (self.encode_rendered(text[done:]) if done < len(text) else [])

    def _list_stretches(self, text: str) -> list[tuple[int, int]]:
        """Return (begin, end) of the stretches of text between control tokens."""
        places = [match.span() for match in self._all.finditer(text)]
        begins = [0, *(end for _, end in places)]
        ends = [*(begin for begin, _ in places), len(text)]
        return list(zip(begins, ends, strict=True))
