"""Every token of every document is accounted for, and predicted exactly once."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.config.schema import fill_defaults, section_schema
from retort.config.sections import Dataset, build_section
from retort.corpus.documents import Document
from retort.tokens.sequences import SequenceTable, build_table, concatenate_tables, content_key
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import encode_prompt, fingerprint_of_tokenizer, load_tokenizer
from support.synthetic import make_table

DATASET: Dataset = build_section("dataset", fill_defaults({}, section_schema("dataset")))
CHAT = replace(DATASET, prompt_column="prompt", response_column="response")
lengths = st.integers(2, 30)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120)


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return load_tokenizer(str(tiny_teacher))


def document(text: str, *, prompt: str | None = None, index: int = 0) -> Document:
    return Document(index, text, prompt, None, None, "train")


def tokenize(
    documents: list[Document], tokenizer: Any, dataset: Dataset
) -> tuple[SequenceTable, TokenCounts]:
    counts = TokenCounts()
    return tokenize_documents(documents, tokenizer, dataset, counts=counts), counts


def rows(table: SequenceTable) -> list[tuple[list[int], list[bool], list[int]]]:
    found = [table[i] for i in range(len(table))]
    return [(r.ids.tolist(), r.loss_mask.tolist(), r.segment_starts.tolist()) for r in found]


def predicted(table: SequenceTable) -> list[int]:
    """The tokens that are predicted with loss, in order."""
    return [ids[t + 1] for ids, mask, _ in rows(table) for t, counts in enumerate(mask) if counts]


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
    shared = sum(b == a for a, b in pairwise(table.documents.tolist()))
    assert counts.stored + counts.without_loss >= len(table.ids) - shared
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


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_a_chat_template_is_used_and_only_the_response_carries_loss(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = TEMPLATE
    found = document("blue bird", prompt="which bird")
    table, counts = tokenize([found, replace(found, index=1)], tokenizer, CHAT)
    assert tokenizer.decode(table[0].ids) == ("<s>user: which bird</s><s>assistant: blue bird</s>")
    assert tokenizer.decode(predicted(table.slice(0, 1))) == "blue bird</s>"
    assert rows(table)[0] == rows(table)[1]
    counts.reconcile()


def test_a_token_that_would_span_prompt_and_response_is_cut_between_them(
    tiny_teacher: Path,
) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = TEMPLATE
    whole = tokenizer("<s>assistant: bird")["input_ids"]
    head = tokenizer("<s>assistant: ")["input_ids"]
    assert whole[: len(head)] != head
    table, _ = tokenize([document("bird", prompt="which")], tokenizer, CHAT)
    assert predicted(table) == tokenizer("bird</s>")["input_ids"]


def test_a_template_that_rewrites_the_prompt_is_refused_by_document(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="rewrites the prompt of document 7"):
        tokenize([document("bird", prompt="which", index=7)], tokenizer, CHAT)


def test_plain_text_does_not_go_through_the_template(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    tokenizer.chat_template = TEMPLATE
    table, _ = tokenize([document("blue bird")], tokenizer, DATASET)
    assert tokenizer.decode(table[0].ids) == "blue bird</s>"


# ---------------------------------------------------------------------------------------------------------
# Content keys and tables

arrays = st.tuples(
    st.lists(st.integers(0, 99), min_size=2, max_size=8),
    st.lists(st.booleans(), min_size=2, max_size=8),
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
)


def key_of(ids: list[int], mask: list[bool], starts: list[int]) -> bytes:
    return content_key(
        np.array(ids, np.int32), np.array(mask, np.bool_), np.array(starts, np.int32)
    )


@given(arrays, arrays)
def test_keys_are_equal_exactly_when_ids_mask_and_segments_are(one: Any, other: Any) -> None:
    assert (key_of(*one) == key_of(*other)) == (one == other)


@given(arrays, st.data())
def test_one_change_in_any_of_the_three_changes_the_key(found: Any, data: st.DataObject) -> None:
    before = key_of(*found)
    which = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(0, len(found[which]) - 1))
    found[which][place] = not found[which][place] if which == 1 else found[which][place] + 1
    assert key_of(*found) != before


def test_a_number_that_moves_from_one_column_to_the_next_changes_the_key() -> None:
    assert key_of([5, 0], [True], [0]) != key_of([5], [True], [0, 0])
    assert key_of([5, 6], [True, False], [0]) != key_of([5, 6], [True, False], [0, 1])


def test_the_key_does_not_depend_on_how_an_array_lies_in_memory() -> None:
    ids, mask, starts = np.arange(8, dtype=np.int32), np.ones(8, np.bool_), np.zeros(1, np.int32)
    strided = np.repeat(ids, 2)[::2]
    wide = ids.astype(np.int64)
    assert content_key(ids, mask, starts) == content_key(strided, mask, starts)
    assert content_key(ids, mask, starts) == content_key(wide, mask, starts)


tables = st.builds(make_table, st.integers(1, 6), seed=st.integers(0, 10**6))


def labels_of(table: SequenceTable) -> list[tuple[str, str]]:
    return [table.label_names[label] for label in table.labels]


def assert_equal(one: SequenceTable, other: SequenceTable) -> None:
    assert rows(one) == rows(other)
    assert one.keys.tolist() == other.keys.tolist()
    assert one.documents.tolist() == other.documents.tolist()
    assert labels_of(one) == labels_of(other)


@given(table=tables, cuts=st.lists(st.integers(0, 18), max_size=4))
def test_a_table_cut_anywhere_and_joined_again_is_the_same(
    table: SequenceTable, cuts: list[int]
) -> None:
    places = sorted({0, len(table), *(cut for cut in cuts if cut < len(table))})
    pieces = [table.slice(first, stop) for first, stop in pairwise(places)]
    joined = concatenate_tables(pieces)
    assert_equal(joined, table)
    joined.verify_keys(source="joined")


@given(st.lists(tables, max_size=3))
def test_joined_tables_keep_rows_labels_and_documents(found: list[SequenceTable]) -> None:
    renamed = [
        replace(t, label_names=(*t.label_names[:-1], (f"label {i}", "")))
        for i, t in enumerate(found)
    ]
    joined = concatenate_tables(renamed)
    assert rows(joined) == [row for table in renamed for row in rows(table)]
    assert labels_of(joined) == [label for table in renamed for label in labels_of(table)]
    assert joined.documents.tolist() == [d for table in renamed for d in table.documents]


@given(tables)
def test_position_offsets_bound_the_counted_positions(table: SequenceTable) -> None:
    offsets = table.position_offsets
    assert np.diff(offsets).tolist() == [table[i].num_positions for i in range(len(table))]
    assert offsets[-1] == table.num_positions == int(table.loss_mask.sum())
    assert table.lengths.tolist() == [len(table[i].ids) for i in range(len(table))]


@given(tables, st.data())
def test_a_sequence_that_is_not_what_its_key_names_is_refused(
    table: SequenceTable, data: st.DataObject
) -> None:
    table.verify_keys(source="whole")
    column = data.draw(st.sampled_from(["ids", "loss_mask", "segment_starts", "keys"]))
    values = getattr(table, column).copy()
    place = data.draw(st.integers(0, values.size - 1))
    values.reshape(-1)[place] ^= 1
    with pytest.raises(ValueError, match=r"here\.h5: sequence \d+ does not hold the tokens"):
        replace(table, **{column: values}).verify_keys(source="here.h5")


def test_a_table_of_nothing_is_a_table() -> None:
    for empty in (build_table([]), concatenate_tables([]), make_table(2, seed=0).slice(1, 1)):
        assert (len(empty), empty.num_positions, empty.lengths.tolist()) == (0, 0, [])
        assert empty.position_offsets.tolist() == [0]


# ---------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_local_tokenizer_is_named_by_its_files_and_sized_by_its_ids(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    found = fingerprint_of_tokenizer(str(tiny_teacher), tokenizer)
    assert found["size"] == 300
    assert found != fingerprint_of_tokenizer("hub/id", tokenizer)


def test_a_hub_tokenizer_is_named_by_vocabulary_and_template(tiny_teacher: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_teacher))
    found = [fingerprint_of_tokenizer("hub/id", tokenizer)]
    tokenizer.chat_template = TEMPLATE
    found.append(fingerprint_of_tokenizer("hub/id", tokenizer))
    tokenizer.add_tokens(["<new>"])
    found.append(fingerprint_of_tokenizer("hub/id", tokenizer))
    assert len({f["fingerprint"] for f in found}) == 3


@pytest.mark.parametrize(
    ("path", "says"), [("./absent", "no such folder"), ("empty", "save_pretrained")]
)
def test_what_is_no_tokenizer_is_refused_with_the_next_step(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(path)
    assert repr(path) in str(caught.value)


_HIDDEN = """
import json, sys
from retort.tokens.tokenizer import encode_prompt, fingerprint_of_tokenizer, hidden_torch, load_tokenizer
with hidden_torch():
    tokenizer = load_tokenizer(sys.argv[1])
text = sys.argv[2]
found = [tokenizer(text)["input_ids"], encode_prompt(text, tokenizer)]
found.append(fingerprint_of_tokenizer("hub/id", tokenizer))
assert "torch" not in sys.modules
from datasets.fingerprint import Hasher
Hasher.hash(tokenizer)  # asks whether "torch" is in sys.modules
import torch
print(json.dumps([*found, torch.ones(2).tolist()]))
"""


def test_a_tokenizer_is_the_same_where_pytorch_is_hidden_and_anyone_may_import_it_afterwards(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = "The quick brown fox, and a day."
    command = [sys.executable, "-c", _HIDDEN, str(folder), text]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" in sys.modules
    tokenizer = load_tokenizer(str(folder))
    ids, prompt = tokenizer(text)["input_ids"], encode_prompt(text, tokenizer)
    assert len(prompt) > len(ids) > 0
    fingerprint = fingerprint_of_tokenizer("hub/id", tokenizer)
    assert json.loads(done.stdout) == [ids, prompt, fingerprint, [1.0, 1.0]]


def test_merging_needs_no_transformers() -> None:
    code = "import sys, retort.teacher.merge; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
