"""Batches, pieces and blocks of any size give the same shard, index and sequences."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.tokens import shards, tokenize
from retort.tokens.indexing import build_index
from support import bytewise
from support.bytewise import assert_as_at_once
from support.synthetic import make_table, write_tokens

words = st.text(st.sampled_from("ab \u00e9"), max_size=30)
labels = st.sampled_from(["z", "", "a", None])
documents = st.lists(st.fixed_dictionaries({"text": words, "category": labels, "prompt": words}))


@given(
    documents=documents,
    has_prompts=st.booleans(),
    max_length=st.integers(2, 20),
    batch=st.tuples(st.integers(1, 5), st.integers(1, 50)),
    piece_bytes=st.sampled_from([16, 48, 1 << 20]),
)
def test_a_stream_of_documents_gives_the_bytes_of_all_at_once(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[dict[str, Any]],
    has_prompts: bool,
    max_length: int,
    batch: tuple[int, int],
    piece_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    corpus = folder / "corpus.jsonl"
    rows = [{"text": "always there"}, *documents]
    corpus.write_text("".join(json.dumps({"prompt": "", **row}) + "\n" for row in rows))
    keys: dict[str, Any] = {"max_length": max_length, "validation_fraction": 0.3}
    if has_prompts:
        keys |= {"prompt_column": "prompt", "response_column": "text"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "_DOCUMENTS_PER_BATCH", batch[0])
        patch.setattr(tokenize, "_CHARACTERS_PER_BATCH", batch[1])
        patch.setattr(shards, "_PIECE_BYTES", piece_bytes)
        bytewise.tokenize(folder / "stream.h5", corpus, **keys)
    assert_as_at_once(folder / "stream.h5", corpus, **keys)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    block=st.tuples(st.integers(1, 40), st.integers(1, 6)),
    chunk_size=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_blocks_of_any_size_give_the_same_index_and_the_same_sequences(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    block: tuple[int, int],
    chunk_size: int,
    seed: int,
) -> None:
    tables = [make_table(n, seed=seed + i, first_document=9 * i) for i, n in enumerate([1, *sizes])]
    folder = tmp_path_factory.mktemp("blocks")
    index = write_tokens(folder, tables, chunk_size=chunk_size)
    paths = sorted(folder.glob("*.h5"))
    whole, counts = build_index(paths, streaming_chunk_size=chunk_size)
    limited = index.read_split("train", max_positions=17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_BLOCK_TOKENS", block[0])
        patch.setattr(shards, "_BLOCK_SEQUENCES", block[1])
        in_blocks, counts_in_blocks = build_index(paths, streaming_chunk_size=chunk_size)
        assert in_blocks == whole and np.array_equal(counts_in_blocks, counts)
        assert index.read_split("train").keys.tolist() == [
            k for t in tables for k in t.keys.tolist()
        ]
        found = index.read_split("train", max_positions=17)
        assert found.keys.tolist() == limited.keys.tolist()
    assert counts.sum() == sum(len(table.ids) for table in tables)
    assert whole.train.longest == max(int(t.lengths.max()) for t in tables if len(t))
