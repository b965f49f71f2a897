"""What a tokenizer changes in a text before it splits it, such as compatibility characters or a space in front.

Such changes cannot be seen in the tokens: text whose length in bytes they change is counted while it is tokenized.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in SentencePiece vocabularies


def list_steps(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder of `tokenizers`, as JSON objects; none for None."""
    return [] if part is None else list(_flatten(json.loads(part.__getstate__())))


def _flatten(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = [x for key in ("normalizers", "pretokenizers", "decoders") for x in step.get(key, ())]
    for one in inner:
        yield from _flatten(one)
    if not inner:
        yield step


def find_length_change(tokenizer: Any) -> Callable[[str], bool] | None:
    """Return a function that says whether a text's tokens stand for more or fewer bytes; None if they never do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    normalize = _build_normalizer([s for s in list_steps(backend.normalizer) if _loses(s)])
    before = list_steps(backend.pre_tokenizer)
    is_ambiguous = any(
        step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never"
        for step in before
    )  # a space in front is added only where there is none
    has_pieces = any(
        step["type"] == "Metaspace" or SPACE in json.dumps(step, ensure_ascii=False)
        for step in [*before, *list_steps(backend.normalizer)]
    )
    if normalize is None and not is_ambiguous and not has_pieces:
        return None

    def changes_length(text: str) -> bool:
        # Some characters become a space and another one by NFKC, such as an accent alone.
        normalized = text if normalize is None else normalize(text)
        if is_ambiguous and " " in (text[:1], normalized[:1]):
            return True
        if has_pieces and SPACE in text:
            return True
        return len(normalized.encode()) != len(text.encode())

    return changes_length


def _loses(step: dict[str, Any]) -> bool:
    """Return whether a step of a normalizer may change a text's length; SentencePiece's spaces do not."""
    if step["type"] == "Prepend":
        return bool(step["prepend"] != SPACE)
    is_space = step["type"] == "Replace" and step["pattern"].get("String") == " "
    return not (is_space and step["content"] == SPACE)


def _build_normalizer(steps: list[dict[str, Any]]) -> Callable[[str], str] | None:
    if not steps:
        return None
    from tokenizers import normalizers

    normalizer = normalizers.Sequence([])
    normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": steps}).encode())
    return normalizer.normalize_str
