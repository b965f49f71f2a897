"""Documents become sequences: long ones are split, prompts carry no loss, every token is counted."""

from pathlib import Path
from typing import Any

import pytest

from retort.tokens.tokenizer import load_tokenizer
from support.sections import replace
from support.tiny import CHAT_TEMPLATE
from support.tokenizing import CHAT, DATASET, document, predicted, rows, tokenize


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return load_tokenizer(str(tiny_teacher))


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_a_long_document_is_split_with_an_overlap_or_truncated(
    tokenizer: Any, long_documents: str
) -> None:
    dataset = replace(DATASET, max_length=4, long_documents=long_documents)
    table, counts = tokenize([document("a b c d e f g h")], tokenizer, dataset)
    ids = [*tokenizer("a b c d e f g h")["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > 7
    pieces = [piece for piece, *_ in rows(table)]
    if long_documents == "split":
        assert pieces == [ids[start : start + 4] for start in range(0, len(ids) - 1, 3)]
        assert predicted(table) == ids[1:]
        assert (counts.read, counts.stored, counts.documents_split) == (len(ids), len(ids), 1)
    else:
        assert pieces == [ids[:4]]
        assert (counts.stored, counts.truncated) == (4, len(ids) - 4)


def test_a_prompt_without_template_is_a_line_that_carries_no_loss(tokenizer: Any) -> None:
    table, counts = tokenize([document("bird", prompt="which")], tokenizer, CHAT)
    head = tokenizer("which\n")["input_ids"]
    body = [*tokenizer("bird")["input_ids"], tokenizer.eos_token_id]
    assert table[0].ids.tolist() == [*head, *body]
    assert predicted(table) == body
    counts.reconcile()


def test_a_thousand_documents_come_out_in_order(tokenizer: Any) -> None:
    documents = [document(f"bird {i}", index=3 * i) for i in range(1000)]
    table, _ = tokenize(documents, tokenizer, DATASET)
    assert table.documents.tolist() == [d.index for d in documents]
    assert predicted(table.slice(700, 701)) == [
        *tokenizer(documents[700].text)["input_ids"][1:],
        tokenizer.eos_token_id,
    ]


def test_counts_of_two_shards_add_up(tokenizer: Any) -> None:
    dataset = replace(DATASET, max_length=8)
    documents = [document("blue bird " * i, index=i) for i in range(6)]
    _, all_at_once = tokenize(documents, tokenizer, dataset)
    _, first = tokenize(documents[:3], tokenizer, dataset)
    _, second = tokenize(documents[3:], tokenizer, dataset)
    assert first + second == all_at_once


def test_a_tokenizer_that_adds_the_end_itself_ends_a_document_once(tiny_teacher: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_teacher))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    )
    body = tokenizer("bird", add_special_tokens=False)["input_ids"]
    assert tokenizer("bird")["input_ids"] == [start, *body, end]
    (plain, *_), *_ = rows(tokenize([document("bird")], tokenizer, DATASET)[0])
    assert plain == [start, *body, end]
    ((ids, mask, _),) = rows(tokenize([document("bird", prompt="a")], tokenizer, CHAT)[0])
    head = tokenizer("a\n", add_special_tokens=False)["input_ids"]
    assert ids == [start, *head, *body, end]
    assert mask == [False] * len(head) + [True] * (len(body) + 1) + [False]


def test_a_chat_template_is_used_and_only_the_response_carries_loss(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = CHAT_TEMPLATE
    found = document("blue bird", prompt="which bird")
    table, counts = tokenize([found, replace(found, index=1)], tokenizer, CHAT)
    assert tokenizer.decode(table[0].ids) == ("<s>user: which bird</s><s>assistant: blue bird</s>")
    assert tokenizer.decode(predicted(table.slice(0, 1))) == "blue bird</s>"
    assert rows(table)[0] == rows(table)[1]
    counts.reconcile()


def test_a_token_that_would_span_prompt_and_response_is_split(
    tiny_teacher: Path,
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = CHAT_TEMPLATE
    whole = tokenizer("<s>assistant: bird")["input_ids"]
    head = tokenizer("<s>assistant: ")["input_ids"]
    assert whole[: len(head)] != head
    table, _ = tokenize([document("bird", prompt="which")], tokenizer, CHAT)
    assert predicted(table) == tokenizer("bird</s>")["input_ids"]


def test_the_prompt_is_that_of_generation_even_where_a_template_rewrites_it_later(
    tiny_teacher: Path,
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    table, _ = tokenize([document("bird", prompt="which")], tokenizer, CHAT)
    assert tokenizer.decode(table[0].ids) == "1<s>user: which</s><s>assistant: bird</s>"
    assert tokenizer.decode(predicted(table)) == "bird</s>"


def test_a_template_that_raises_is_one_sentence_with_the_document(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    raises = "{% if 'x' in messages[-1].content %}{{ raise_exception('no x') }}{% endif %}"
    tokenizer.chat_template = raises + CHAT_TEMPLATE
    tokenize([document("bird", prompt="which")], tokenizer, CHAT)
    with pytest.raises(ValueError, match=r"document 7 cannot be rendered: .*TemplateError: no x"):
        tokenize([document("fox", prompt="which", index=7)], tokenizer, CHAT)
    tokenizer.chat_template = tokenizer.chat_template.replace("no x", "System role not supported")
    with pytest.raises(ValueError, match="Write system prompts into the first question, or use a"):
        tokenize([document("fox", prompt="which", index=7)], tokenizer, CHAT)


def test_a_template_that_ends_with_nothing_is_ended(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    table, _ = tokenize([document("bird", prompt="which")], tokenizer, CHAT)
    assert tokenizer.decode(predicted(table)) == "bird </s>"
    table, _ = tokenize(
        [document("bird", prompt="which")], tokenizer, replace(CHAT, append_eos=False)
    )
    assert tokenizer.decode(predicted(table)) == "bird "


def test_a_long_response_keeps_its_prompt_in_front_of_each_piece(tokenizer: Any) -> None:
    head = tokenizer("a b\n")["input_ids"]
    body = [*tokenizer("c d e f g h i j")["input_ids"], tokenizer.eos_token_id]
    length = len(head) + 4
    found = document("c d e f g h i j", prompt="a b")
    table, counts = tokenize([found], tokenizer, replace(CHAT, max_length=length))
    pieces = [piece for piece, *_ in rows(table)]
    kept = length // 2 if length // 2 < len(head) else len(head)
    assert all(piece[:kept] == head[-kept:] for piece in pieces[1:])
    assert pieces[0][-4:] == body[:4] or kept < len(head)
    assert predicted(table) == body
    assert (counts.documents_split, counts.stored, counts.without_loss) == (
        1,
        counts.read - max(0, len(head) - kept),
        max(0, len(head) - kept),
    )


def test_a_prompt_that_does_not_fit_keeps_its_end(tokenizer: Any) -> None:
    head = tokenizer("a b c d e f g h i j\n")["input_ids"]
    body = [*tokenizer("k l")["input_ids"], tokenizer.eos_token_id]
    length = len(body) + 3
    found = document("k l", prompt="a b c d e f g h i j")
    table, counts = tokenize([found], tokenizer, replace(CHAT, max_length=length))
    (piece,) = [piece for piece, *_ in rows(table)]
    assert piece == [*head, *body][-length:]
    assert counts.without_loss == len(head) + len(body) - length
    table, counts = tokenize(
        [found], tokenizer, replace(CHAT, max_length=length, long_documents="truncate")
    )
    assert (len(table), counts.truncated, counts.documents_truncated) == (
        0,
        len(head) + len(body) - length,
        1,
    )


def test_plain_text_does_not_go_through_the_template(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = CHAT_TEMPLATE
    table, _ = tokenize([document("blue bird")], tokenizer, DATASET)
    assert tokenizer.decode(table[0].ids) == "blue bird</s>"
