"""Bytes of tokens: those of the text, whatever kind of tokenizer cut it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retort.corpus.documents import Document
from retort.evaluation.text_bytes import count_next_bytes, count_token_bytes
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer
from support.tiny import section

TEXTS = (
    "The quick brown fox\n\n  jumps over 13 lazy dogs.",
    "Größe naïve café 東京 😀👩\u200d👩\u200d👧 ok",
    " leading space and trailing ",
    "\ttabs\tand\r\nlines",
)


def make_pieces(*, with_prefix: bool) -> Any:
    """A tokenizer as Llama 2's: SentencePiece's pieces, what it lacks as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyzTQ.",
        "\u2581T",
        "h",
        "he",
        "\u2581The",
        "\u2581ok",
    ]
    names = list(dict.fromkeys(pieces))
    merges = [("\u2581", "T"), ("h", "e"), ("\u2581T", "he"), ("\u2581", "o"), ("\u2581o", "k")]
    names += ["\u2581o"]
    bpe = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    before = [normalizers.Prepend("\u2581")] if with_prefix else []
    bpe.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    after = [decoders.Strip(" ", 1, 0)] if with_prefix else []
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_words() -> Any:
    """A tokenizer as BERT's: words, and pieces of words behind ##."""
    names = ["[UNK]", "[CLS]", "house", "bird", "##s", "##ing", "sing", "old"]
    words = Tokenizer(
        models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", cls_token="[CLS]")


@pytest.fixture(
    scope="module", params=["bytes", "pieces", "pieces without prefix", "gpt2", "stories"]
)
def tokenizer(request: pytest.FixtureRequest, tiny_teacher: Path) -> Any:
    if request.param == "bytes":
        return load_tokenizer(str(tiny_teacher))
    if request.param.startswith("pieces"):
        return make_pieces(with_prefix=request.param == "pieces")
    data = request.getfixturevalue("shared_data")
    folder = {"gpt2": "tokenizers/gpt2", "stories": "models/stories260K"}[request.param]
    return load_tokenizer(str(data / folder))


def begun(tokenizer: Any, text: str) -> SequenceTable:
    """The text as one sequence that begins with a special token, so that every other token is predicted."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    mask = [True] * len(ids) + [False]
    return build_table([([begin, *ids], mask, 0, ("", ""))])


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_all_tokens_are_those_of_the_text(tokenizer: Any, text: str) -> None:
    sizes = count_next_bytes(begun(tokenizer, text), tokenizer)
    assert sizes.sum() == len(text.encode())
    assert sizes.min() >= 0


@settings(max_examples=150)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40))
def test_so_are_those_of_any_text(tiny_teacher: Path, text: str) -> None:
    for tokenizer in (load_tokenizer_once(str(tiny_teacher)), PIECES):
        sizes = count_next_bytes(begun(tokenizer, text), tokenizer)
        assert sizes.sum() == len(text.encode()), tokenizer


PIECES = make_pieces(with_prefix=True)
_LOADED: dict[str, Any] = {}


def load_tokenizer_once(path: str) -> Any:
    if path not in _LOADED:
        _LOADED[path] = load_tokenizer(path)
    return _LOADED[path]


def test_special_tokens_and_ids_beyond_the_tokenizer_are_no_text(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    assert count_token_bytes(tokenizer, [0, 1, 2, 300, 319]).tolist() == [0] * 5


def test_a_token_added_to_a_tokenizer_is_its_own_text(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.add_tokens(["<think>é"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert count_token_bytes(tokenizer, [300, 301]).tolist() == [len("<think>é".encode()), 0]


def test_words_count_with_the_space_between_them() -> None:
    tokenizer = make_words()
    ids = tokenizer("birds sing old house", add_special_tokens=False)["input_ids"]
    sizes = count_token_bytes(tokenizer, ids)
    assert sizes.tolist() == [5, 1, 5, 4, 6]  # " bird", "s", " sing", " old", " house"


def test_long_documents_and_prompts_count_each_byte_of_theirs_once(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    dataset = section("dataset", prompt_column="prompt", response_column="response", max_length=16)
    texts = [text * 3 for text in TEXTS]
    documents = [Document(i, text, "why? ", None, None, "val") for i, text in enumerate(texts)]
    table = tokenize_documents(documents, tokenizer, dataset, counts=TokenCounts())
    assert len(table) > 3 * len(texts)
    sizes = count_next_bytes(table, tokenizer)
    found = np.bincount(np.repeat(table.documents, np.diff(table.position_offsets)), weights=sizes)
    assert found.tolist() == [len(text.encode()) for text in texts]
