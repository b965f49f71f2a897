"""Every token of every document is accounted for, and predicted exactly once."""

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.tokens.tokenizer import load_tokenizer
from support.sections import replace
from support.tokenizing import CHAT, DATASET, document, predicted, rows, tokenize

lengths = st.integers(2, 30)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120)


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return load_tokenizer(str(tiny_teacher))


@given(text=texts, max_length=lengths)
def test_a_long_document_is_predicted_once_token_by_token(
    tokenizer: Any, text: str, max_length: int
) -> None:
    dataset = replace(DATASET, max_length=max_length)
    table, counts = tokenize([document(text)], tokenizer, dataset)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = [piece for piece, *_ in rows(table)]
    assert predicted(table) == ids[1:]
    assert all(2 <= len(piece) <= max_length for piece in pieces)
    assert all(before[-1] == after[0] for before, after in pairwise(pieces))
    assert counts.read == len(ids)
    assert counts.stored == (len(ids) if len(ids) > 1 else 0)
    assert counts.documents_split == (len(ids) > max_length)


@given(text=texts, max_length=lengths)
def test_a_truncated_document_keeps_its_beginning_and_counts_the_rest(
    tokenizer: Any, text: str, max_length: int
) -> None:
    dataset = replace(DATASET, max_length=max_length, long_documents="truncate")
    table, counts = tokenize([document(text)], tokenizer, dataset)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert predicted(table) == ids[1:max_length]
    assert counts.truncated == max(0, len(ids) - max_length)


@given(
    pairs=st.lists(st.tuples(texts, texts), max_size=4),
    max_length=lengths,
    long_documents=st.sampled_from(["split", "truncate"]),
)
def test_a_prompt_carries_no_loss_and_its_response_all_of_it(
    tokenizer: Any, pairs: list[tuple[str, str]], max_length: int, long_documents: str
) -> None:
    dataset = replace(CHAT, max_length=max_length, long_documents=long_documents)
    documents = [document(r, prompt=p, index=i) for i, (p, r) in enumerate(pairs)]
    table, counts = tokenize(documents, tokenizer, dataset)
    heads = [tokenizer(f"{p}\n")["input_ids"] for p, _ in pairs]
    bodies = [[*tokenizer(r)["input_ids"], tokenizer.eos_token_id] for _, r in pairs]
    if long_documents == "truncate":
        room = [max(0, max_length - len(head)) for head in heads]
        bodies = [body[:n] for body, n in zip(bodies, room, strict=True)]
    assert predicted(table) == [token for body in bodies for token in body]
    counts.reconcile()
    for piece, mask, _ in rows(table):
        assert len(piece) <= max_length
        before = piece[: mask.index(True) + 1]  # ends with the prompt, or with the response so far
        assert len(before) <= max(max_length // 2 + 1, max_length - 1)
    assert all(any(mask) for _, mask, _ in rows(table))


@given(st.lists(texts, max_size=6), lengths, st.sampled_from(["split", "truncate"]), st.booleans())
def test_all_tokens_read_are_accounted_for(
    tokenizer: Any, found: list[str], max_length: int, long_documents: str, append_eos: bool
) -> None:
    dataset = replace(
        DATASET, max_length=max_length, long_documents=long_documents, append_eos=append_eos
    )
    table, counts = tokenize(
        [document(t, index=i) for i, t in enumerate(found)], tokenizer, dataset
    )
    assert counts.read == sum(len(tokenizer(t)["input_ids"]) + append_eos for t in found)
    parts = ("stored", "truncated", "without_loss", "too_short")
    assert counts.read == sum(asdict(counts)[part] for part in parts)
    repeated = sum(a == b for a, b in pairwise(table.documents.tolist()))
    assert counts.stored == len(table.ids) - repeated
    assert counts.documents == len(found)
