"""Bytes of tokens add up to the text's, with every kind of tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retort.corpus.documents import Document
from retort.evaluation.text_bytes import count_next_bytes, count_token_bytes
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer
from support.pieces import make_piece_tokenizer, tokenize_after_special
from support.sections import section

TEXTS = (
    "The quick brown fox\n\n  jumps over 13 lazy dogs.",
    "Größe naïve café 東京 😀👩\u200d👩\u200d👧 ok",
    " leading space and trailing ",
    "\ttabs\tand\r\nlines",
)


def make_words() -> Any:
    """Return a tokenizer like BERT's: words, and pieces of words after ##."""
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
        return make_piece_tokenizer(with_prefix=request.param == "pieces")
    data = request.getfixturevalue("shared_data")
    folder = {"gpt2": "tokenizers/gpt2", "stories": "models/stories260K"}[request.param]
    return load_tokenizer(str(data / folder))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_all_tokens_are_those_of_the_text(tokenizer: Any, text: str) -> None:
    sizes = count_next_bytes(tokenize_after_special(tokenizer, text), tokenizer)
    assert sizes.sum() == len(text.encode())
    assert sizes.min() >= 0


def test_special_tokens_and_ids_beyond_the_tokenizer_have_no_bytes(tiny_teacher: Path) -> None:
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


def test_every_byte_of_long_documents_after_prompts_counts_once(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    dataset = section("dataset", prompt_column="prompt", response_column="response", max_length=16)
    texts = [text * 3 for text in TEXTS]
    documents = [Document(i, text, "why? ", None, None, "val") for i, text in enumerate(texts)]
    table = tokenize_documents(documents, tokenizer, dataset, counts=TokenCounts())
    assert len(table) > 3 * len(texts)
    sizes = count_next_bytes(table, tokenizer)
    found = np.bincount(np.repeat(table.documents, np.diff(table.position_offsets)), weights=sizes)
    assert found.tolist() == [len(text.encode()) for text in texts]
