"""Control tokens that a document writes out are text, unless the config says not; a template's own are tokens."""

import datetime
import inspect
from pathlib import Path
from typing import Any

import pytest

from retort.corpus.documents import Document
from retort.evaluation.text_bytes import count_next_bytes
from retort.tokens.chat import ChatFormat
from retort.tokens.controls import ControlTokens
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer
from support import chat_templates
from support.chat_templates import Family, build_tokenizer
from support.pieces import KINDS
from support.sections import section
from support.tiny import CHAT_TEMPLATE

FAMILIES = {k: v for k, v in vars(chat_templates).items() if isinstance(v, Family)}
TEXT = "say <|im_start|>user</s> or <s>, not <pad>"


@pytest.fixture
def tokenizer(tiny_teacher: Path) -> Any:
    found = load_tokenizer(str(tiny_teacher))
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def tokenize(
    tokenizer: Any, text: str, prompt: str | None = None, **keys: Any
) -> tuple[SequenceTable, TokenCounts]:
    if prompt is not None:
        keys |= {"prompt_column": "prompt", "response_column": "text"}
    counts = TokenCounts()
    document = Document(0, text, prompt, None, None, "val")
    dataset = section("dataset", **keys)
    return tokenize_documents([document], tokenizer, dataset, counts=counts), counts


def special_in(tokenizer: Any, table: SequenceTable) -> list[str]:
    names = tokenizer.convert_ids_to_tokens(table.ids.tolist())
    return [name for name in names if name in tokenizer.all_special_tokens]


def test_in_a_document_they_are_text(tokenizer: Any) -> None:
    table, counts = tokenize(tokenizer, TEXT)
    assert special_in(tokenizer, table) == ["</s>"]  # the end of the document
    assert tokenizer.decode(table.ids[:-1]) == TEXT
    assert counts.with_control_tokens == 1
    table, counts = tokenize(tokenizer, TEXT, control_tokens="tokens")
    assert special_in(tokenizer, table) == ["<|im_start|>", "</s>", "<s>", "<pad>", "</s>"]
    assert counts.with_control_tokens == 1


def test_in_a_prompt_without_a_template_they_are_text(tokenizer: Any) -> None:
    table, counts = tokenize(tokenizer, "yes <s>", TEXT)
    assert special_in(tokenizer, table) == ["</s>"]
    assert tokenizer.decode(table.ids[:-1]) == f"{TEXT}\nyes <s>"
    assert counts.with_control_tokens == 1
    sizes = count_next_bytes(table, tokenizer)
    assert not isinstance(sizes, str)
    assert sizes.sum() == len("yes <s>")


def test_in_a_chat_only_the_template_makes_them(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    table, _ = tokenize(tokenizer, f"I {TEXT}", TEXT)
    assert special_in(tokenizer, table) == ["<s>", "</s>", "<s>", "</s>"]
    text = tokenizer.decode(table.ids)
    assert text == f"<s>user: {TEXT}</s><s>assistant: I {TEXT}</s>"
    sizes = count_next_bytes(table, tokenizer)
    assert not isinstance(sizes, str)
    assert sizes.sum() == len(f"I {TEXT}")
    table, _ = tokenize(tokenizer, f"I {TEXT}", TEXT, control_tokens="tokens")
    assert special_in(tokenizer, table).count("<|im_start|>") == 2


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd0\ufdd0"])
def test_a_character_that_marks_them_is_text_elsewhere(tokenizer: Any, mark: str) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    said = f"{mark}a {mark}<s>{mark}b <{mark}s> <|im_start|> <{mark}{mark}|im_start|> c{mark}"
    for text in (f"only {mark} here", said):
        table, _ = tokenize(tokenizer, text, text)
        assert special_in(tokenizer, table) == ["<s>", "</s>", "<s>", "</s>"]
        assert tokenizer.decode(table.ids) == f"<s>user: {text}</s><s>assistant: {text}</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_them_has_the_tokens_that_it_had(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in ("The fox is < 3 and s> or <", "ok"):
        table, counts = tokenize(tokenizer, text, append_eos=False)
        assert counts.to_json().get("with_control_tokens") is None
        expected = tokenizer(text)["input_ids"]
        assert table.ids.tolist() in (expected, [])


@pytest.mark.parametrize("name", FAMILIES)
def test_chats_have_the_tokens_of_transformers_own_way(name: str) -> None:
    """The oracle: apply_chat_template(sanitize_control_tokens=True), in newer versions of transformers."""
    tokenizer = build_tokenizer(FAMILIES[name])
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers cannot")
    names = "".join(sorted(set(tokenizer.all_special_tokens)))
    content = f"What is {names}? {names.replace('>', '> ')} say {tokenizer.eos_token}"
    content = content.replace("<think>", "").replace("</think>", "")
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": f"It is {content}"},
        {"role": "user", "content": "please"},
    ]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    chat = ChatFormat(tokenizer, date=str(datetime.date.today()))
    found = chat.encode_prompt(ControlTokens(tokenizer).mark(messages))
    assert tokenizer.convert_ids_to_tokens(found) == tokenizer.convert_ids_to_tokens(expected)
