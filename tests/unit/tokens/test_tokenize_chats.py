"""Documents that are chats become sequences: by the template of the tokenizer, with one date."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retort.corpus.documents import Document
from retort.io.fingerprints import TokenizerIdentity
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.shards import read_token_shard, tokenize_shard
from retort.tokens.tokenizer import encode_prompt
from support import chat_templates as published
from support.chat_templates import build_tokenizer
from support.corpora import DEFAULTS, write_jsonl
from support.sections import replace
from support.tokenizing import CHAT, DATASET, document, predicted, rows, tokenize

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(published.QWEN_25)


def chat(turns: list[dict[str, str]], *, index: int = 0) -> Document:
    return Document(index, "two", "one", None, None, "train", messages=turns)


def test_all_turns_or_the_last_are_learned(tokenizer: Any) -> None:
    table, counts = tokenize([chat(TURNS)], tokenizer, DATASET)
    assert tokenizer.decode(predicted(table)) == "two<|im_end|>four<|im_end|>"
    last, _ = tokenize([chat(TURNS)], tokenizer, replace(DATASET, supervised_turns="last"))
    assert tokenizer.decode(predicted(last)) == "four<|im_end|>"
    assert np.array_equal(last.ids, table.ids)
    assert counts.read == counts.stored == len(table.ids)


def test_a_chat_of_one_turn_is_a_prompt_and_its_response(tokenizer: Any) -> None:
    (found,) = rows(tokenize([chat(TURNS[:2])], tokenizer, DATASET)[0])
    assert [found] == rows(tokenize([document("two", prompt="one")], tokenizer, CHAT)[0])


def test_text_and_chats_may_be_in_one_corpus(tokenizer: Any) -> None:
    documents = [document("plain", index=0), chat(TURNS, index=1), document("text", index=2)]
    table, _ = tokenize(documents, tokenizer, DATASET)
    assert table.documents.tolist() == [0, 1, 2]
    assert tokenizer.decode(table[0].ids) == "plain<|im_end|>"
    assert tokenizer.decode(table[2].ids) == "text<|im_end|>"


def test_every_turn_of_a_long_chat_is_learned_once_after_its_prompt(tokenizer: Any) -> None:
    turns = [*TURNS[:1], {"role": "assistant", "content": "word " * 40}, *TURNS[2:]]
    whole, _ = tokenize([chat(turns)], tokenizer, DATASET)
    table, counts = tokenize([chat(turns)], tokenizer, replace(DATASET, max_length=64))
    assert len(table) > 2 and max(table.lengths) <= 64
    assert predicted(table) == predicted(whole)
    for ids, mask, _ in rows(table):
        assert "assistant\n" in tokenizer.decode(ids[: mask.index(True) + 1])
    assert counts.documents_split == 1


def test_several_turns_need_a_template() -> None:
    tokenizer = build_tokenizer(replace_template(None))
    with pytest.raises(ValueError, match=r"document 3 is a chat \(user, assistant, user, ass.* no"):
        tokenize([chat(TURNS, index=3)], tokenizer, DATASET)
    (found,) = rows(tokenize([chat(TURNS[:2])], tokenizer, DATASET)[0])
    assert tokenizer.decode(found[0]) == "one\ntwo<|im_end|>"


def replace_template(template: Any) -> published.Family:
    family = published.QWEN_25
    return published.Family(template, family.controls, family.bos, family.eos)


def test_shards_and_samples_have_one_date(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(published.LLAMA_31)
    rows = [{"messages": [{**TURNS[0], "content": f"{i}"}, TURNS[1]]} for i in range(20)]
    corpus = write_jsonl(tmp_path / "rows.jsonl", rows)
    keys = {"name": "json", "data_files": str(corpus), "num_shards": 1, "validation_fraction": 0.3}
    found = {}
    for date in ("2026-01-01", "2024-07-26"):
        dataset = replace(DEFAULTS, chat_date=date, **keys)
        shard, index = tmp_path / date / "shard.h5", tmp_path / date / "index.json"
        identity = TokenizerIdentity(fingerprint="0123456789ab", size=len(tokenizer))
        tokenize_shard(shard, dataset, tokenizer, identity=identity, shard=0, snapshot=None)
        write_index(index, [shard], streaming_chunk_size=10)
        assert TokenIndex.read(index).chat_date == date
        found[date] = read_token_shard(shard, "train")[0].ids.tolist()
        prompt = encode_prompt("which", tokenizer, date=TokenIndex.read(index).chat_date)
        assert found[date][:20] == prompt[:20]
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(found["2024-07-26"])
    assert "Today Date: 01 Jan 2026" in tokenizer.decode(found["2026-01-01"])
