"""Mixtures of sources: shares by weight, one order, every document once."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.config.sections import Dataset
from retort.corpus.documents import Counts, Document, make_document
from retort.corpus.mixtures import interleave, take_turns
from retort.corpus.reading import count_rows, list_corpus_files
from retort.corpus.snapshot import read_snapshot, write_snapshot
from support.configs import load
from support.corpora import contents, read_shards, write_jsonl
from support.sections import replace

weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 99), min_size=1, max_size=8)


@given(weights, st.integers(1, 400))
def test_every_prefix_has_its_shares_to_within_one(given_weights: list[float], size: int) -> None:
    total, taken = sum(given_weights), Counter[int]()
    for number, source in enumerate(islice(take_turns(given_weights), size), start=1):
        taken[source] += 1
        for i, weight in enumerate(given_weights):
            assert abs(taken[i] - number * weight / total) < 1 + 1e-9


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=2, max_size=5),
    st.sampled_from(["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]),
)
def test_each_strategy_ends_where_it_says(sources: list[tuple[int, int]], strategy: str) -> None:
    sizes, shares = zip(*sources, strict=True)
    opens = [lambda s=size: iter(range(s)) for size in sizes]
    found: list[list[int]] = [[] for _ in sizes]
    for source, item in interleave(opens, shares, strategy=strategy):
        found[source].append(item)
    for items, size in zip(found, sizes, strict=True):
        assert items == [i % size for i in range(len(items))], "in order, from the start again"
    at_least_once = [len(items) >= size for items, size in zip(found, sizes, strict=True)]
    at_most_once = [len(items) <= size for items, size in zip(found, sizes, strict=True)]
    if strategy == "first_exhausted":
        assert any(at_least_once) and all(at_most_once)
    if strategy == "all_exhausted":
        assert all(at_least_once) and any(at_most_once)
    if strategy == "all_exhausted_without_replacement":
        assert all(at_least_once) and all(at_most_once)


def mix(folder: Path, **keys: Any) -> Dataset:
    """Write a mixture of 60 texts, 30 pairs with another column for labels, and 20 chats of which 5 are empty."""
    write_jsonl(folder / "texts.jsonl", [{"text": f"text {i}"} for i in range(60)])
    pairs = [{"q": f"question {i}", "a": f"answer {i}", "topic": "x"} for i in range(30)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    turns = [["user", "ask"], ["assistant", "say"]]
    chats = [
        {"messages": [{"role": r, "content": f"{c} {i}" if i % 4 else ""} for r, c in turns]}
        for i in range(20)
    ]
    write_jsonl(folder / "chats.jsonl", chats)
    sources = [
        {"name": "json", "data_files": str(folder / "texts.jsonl"), "weight": 5},
        {
            "name": "json",
            "data_files": str(folder / "pairs.jsonl"),
            "weight": 2,
            "label": "pairs",
            "prompt_column": "q",
            "response_column": "a",
            "category_column": "topic",
        },
        {"name": "json", "data_files": str(folder / "chats.jsonl"), "weight": 1},
    ]
    return load({"dataset": {"mix": sources, "num_shards": 1} | keys}).dataset


def documents_of(dataset: Dataset, num_shards: int) -> list[Document]:
    shards, _ = read_shards(dataset, num_shards)
    return sorted((d for shard in shards for d in shard), key=lambda d: d.index)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"shuffle": True, "streaming_buffer_size": 7},
        {"max_samples": 33},
        {"sharding": "contiguous"},
        {"stopping_strategy": "all_exhausted"},
        {"stopping_strategy": "all_exhausted_without_replacement"},
    ],
)
def test_any_number_of_shards_has_the_same_documents(tmp_path: Path, keys: dict[str, Any]) -> None:
    dataset = mix(tmp_path, **keys)
    whole = documents_of(dataset, 1)
    assert whole == documents_of(dataset, 3) == documents_of(dataset, 5)
    by_source = Counter(d.source for d in whole)
    assert set(by_source) == {"texts.jsonl", "pairs", "chats.jsonl"}
    texts = Counter(d.text for d in whole if d.source != "chats.jsonl")
    assert max(texts.values()) == (1 if "all_exhausted" not in keys.values() else 2)
    assert {(d.category, d.prompt is None) for d in whole if d.source == "pairs"} == {("x", False)}
    if not keys:
        assert by_source["texts.jsonl"] == 60, "the first that ends"
    if keys.get("stopping_strategy") == "all_exhausted_without_replacement":
        assert by_source == {"texts.jsonl": 60, "pairs": 30, "chats.jsonl": 15}


def test_what_is_read_and_skipped_is_counted_by_source(tmp_path: Path) -> None:
    dataset = mix(tmp_path, stopping_strategy="all_exhausted_without_replacement")
    _, counts = read_shards(dataset, 3)
    assert {n: c.read for n, c in counts.sources.items()} == {
        "texts.jsonl": 60,
        "pairs": 30,
        "chats.jsonl": 20,
    }
    assert counts.sources["chats.jsonl"].skipped == counts.skipped == {"empty": 5}
    assert counts.read == 110 == count_rows(dataset)
    assert sum(c.held_out for c in counts.sources.values()) == counts.held_out


def test_sources_may_name_what_is_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "held.jsonl", [{"text": f"held {i}"} for i in range(9)])
    plain = mix(tmp_path, validation_fraction=0.3)
    first = replace(plain.mix[0], validation_files=str(tmp_path / "held.jsonl"))
    dataset = replace(plain, mix=(first, *plain.mix[1:]))
    found = documents_of(dataset, 2)
    assert {d.split for d in found if d.text.startswith("text")} == {"train"}
    held = [d for d in found if d.text.startswith("held")]
    assert len(held) == 9 and {(d.split, d.source) for d in held} == {("val", "texts.jsonl")}
    assert min(d.index for d in held) > max(d.index for d in found if d not in held)
    assert {d.split for d in found if d.source == "pairs"} == {"train", "val"}
    both = replace(first, validation_files=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ValueError, match=r"pairs.jsonl', which is in dataset.data_files too"):
        list_corpus_files(replace(dataset, mix=(both, *plain.mix[1:])))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_killed_snapshot_of_a_mixture_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool
) -> None:
    keys = {"streaming": True, "max_samples": 70, "shuffle": shuffle, "streaming_buffer_size": 4}
    dataset = mix(tmp_path, num_shards=3, validation_fraction=0.2, **keys)
    write_snapshot(dataset, tmp_path / "whole", step_documents=8)
    shards = [list(read_snapshot(tmp_path / "whole", shard=s, counts=Counts())) for s in range(3)]
    whole = sorted((d for shard in shards for d in shard), key=lambda d: d.index)
    if not shuffle:
        assert whole == documents_of(replace(dataset, streaming=False), 2)
    chance, num_kills = random.Random(0), 0

    def fail_sometimes(*args: Any, **options: Any) -> Any:
        if chance.random() < 0.06:
            raise InterruptedError
        return make_document(*args, **options)

    monkeypatch.setattr("retort.corpus.reading.make_document", fail_sometimes)
    while not (tmp_path / "killed" / "corpus.json").exists():
        try:
            write_snapshot(dataset, tmp_path / "killed", step_documents=8)
        except InterruptedError:
            num_kills += 1
    assert num_kills >= 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
