"""Bytes of tokens add up to the text's, with every kind of tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retort.corpus.documents import Document
from retort.evaluation.text_bytes import TokenBytes, count_next_bytes
from retort.tokens.sequences import build_table
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer
from support.pieces import (
    KINDS,
    make_piece_tokenizer,
    make_word_pieces,
    measure_text,
    tokenize_after_special,
)
from support.sections import section

TEXTS = (
    "The quick brown fox\n\n  jumps over 13 lazy dogs.",
    "Größe naïve café 東京 😀👩\u200d👩\u200d👧 ok",
    " leading space and trailing ",
    "\ttabs\tand\r\nlines",
)


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
    assert not isinstance(sizes, str)
    assert sizes.sum() == len(text.encode())
    assert sizes.min() >= 0


def test_special_tokens_and_ids_beyond_the_tokenizer_have_no_bytes(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    assert TokenBytes(tokenizer).of([0, 1, 2, 300, 319]).tolist() == [0] * 5


def test_a_token_added_to_a_tokenizer_is_its_own_text(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.add_tokens(["<think>é"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert TokenBytes(tokenizer).of([300, 301]).tolist() == [len("<think>é".encode()), 0]


def test_words_without_the_spaces_between_them_have_no_bytes() -> None:
    tokenizer = make_word_pieces()
    table = tokenize_after_special(tokenizer, "the house \u6771\u4eac")
    assert count_next_bytes(table, tokenizer) == (
        "the tokenizer's tokens do not say which spaces were between them"
    )


def test_text_that_a_tokenizer_changed_or_does_not_know_has_no_bytes() -> None:
    tokenizer = KINDS["metaspace, NFKC"]()
    assert measure_text(tokenizer, "\ufb01ne", prompt=None) == (
        "the tokenizer normalizes text, and the length of 1 held-out documents changed with it"
    )
    assert measure_text(tokenizer, "fine", prompt=None) == 4
    names = {"<s>": 0, "<unk>": 1, "\u2581": 2, "a": 3}
    pieces = Tokenizer(models.Unigram([(name, 0.0) for name in names], unk_id=1))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    pieces.decoder = decoders.Metaspace(prepend_scheme="never")
    unknown = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", unk_token="<unk>")
    assert measure_text(unknown, "a b", prompt="a") == (
        "the tokenizer does not know 1 of the tokens, so their bytes are lost"
    )
    assert measure_text(unknown, "a a", prompt="a") == 3


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


@pytest.mark.parametrize(
    "kind", ["pieces", "metaspace always", "metaspace first", "byte level, prefix"]
)
def test_a_space_that_a_tokenizer_puts_after_a_special_token_is_not_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = (
        "{{ messages }}"  # so the text of a chat is one, with special tokens in it
    )
    ids = tokenizer("<s>why</s>The ok", add_special_tokens=False)["input_ids"]
    head = ids.index(tokenizer.eos_token_id)
    mask = [head <= place < len(ids) - 1 for place in range(len(ids))]
    sizes = count_next_bytes(build_table([(ids, mask, 0, ("", ""))]), tokenizer)
    assert not isinstance(sizes, str)
    assert sizes.sum() == len("The ok")


def test_a_space_spelled_in_bytes_counts_once_wherever_a_response_is_cut() -> None:
    tokenizer = KINDS["pieces without both"]()
    ids = tokenizer("hey ok", add_special_tokens=False)["input_ids"]
    for end in range(2, len(ids)):
        begin, rest = (
            [1, *ids[:end]],
            [1, *ids[end - 1 :]],
        )  # the prompt is repeated before the rest
        masks = [[True] * end + [False], [False, *[True] * (len(ids) - end), False]]
        pairs = zip((begin, rest), masks, strict=True)
        rows = [(piece, mask, 0, ("", "")) for piece, mask in pairs]
        sizes = count_next_bytes(build_table(rows), tokenizer)
        assert not isinstance(sizes, str)
        assert sizes.sum() == len("hey ok"), end
