"""Shards and their index contain the corpus exactly once, in one order; bad files are refused in one sentence."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from retort.config.sections import Dataset
from retort.corpus.snapshot import write_snapshot
from retort.io.fingerprints import TokenizerIdentity
from retort.tokens.index import IndexRecord, TokenIndex, describe_index
from retort.tokens.indexing import build_index, write_index
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.shards import read_token_shard, tokenize_shard, write_token_shard
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from support.synthetic import (
    TOKENIZER,
    as_rows,
    make_table,
    make_tables,
    write_shards,
    write_tokens,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    return write_tokens(tmp_path_factory.mktemp("tokens"), make_tables(0))


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [make_table(9, seed=3)])
    table, found = make_table(9, seed=3), read_token_shard(path, "train")
    for column in ("ids", "loss_mask", "offsets", "segment_starts", "segment_offsets", "keys"):
        one, other = getattr(table, column), getattr(found, column)
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    assert found.documents.tolist() == table.documents.tolist()
    assert found.labels.tolist() == table.labels.tolist()
    assert found.label_names == table.label_names
    assert list(tmp_path.iterdir()) == [path]


def test_equal_content_gives_equal_bytes_a_second_later(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "now", make_tables(0))
    time.sleep(1.1)  # HDF5 can store times in seconds
    later = write_shards(tmp_path / "later", make_tables(0))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in later]
    for paths in (first, later):
        write_index(paths[0].parent / "index.json", paths, streaming_chunk_size=3)
    texts = [(p[0].parent / "index.json").read_bytes() for p in (first, later)]
    assert texts[0] == texts[1]


def test_no_document_is_cut_between_two_parts(index: TokenIndex) -> None:
    documents = [set(index.read_part(part).documents.tolist()) for part in index.parts]
    assert sum(map(len, documents)) == len(set.union(*documents))


def test_equal_text_from_other_documents_is_another_part(tmp_path: Path) -> None:
    rows = [([5, 6, 7], [True, True, False], document, ("", "")) for document in range(4)]
    index = write_tokens(tmp_path, [build_table(rows)], chunk_size=1)
    assert len({part.name for part in index.parts}) == 4
    assert [index.read_part(p).documents.tolist() for p in index.parts] == [[0], [1], [2], [3]]


def test_an_index_has_a_digest_of_its_content(tmp_path: Path) -> None:
    def content(name: str, tables: list[SequenceTable], chunk_size: int) -> str:
        index = write_tokens(tmp_path / name, tables, chunk_size=chunk_size)
        return str(index.record.content)

    tables = make_tables(0)
    first = content("a", tables, 3)
    assert first == content("b", tables, 5)
    assert first != content("c", tables[::-1], 3)
    assert first != content("d", make_tables(1), 3)


def test_held_out_sequences_are_in_no_part(index: TokenIndex) -> None:
    held_out = {key for _, _, key, _ in as_rows([index.read_split("val")])}
    trained = {key for part in index.parts for _, _, key, _ in as_rows([index.read_part(part)])}
    assert held_out
    assert not held_out & trained


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 10**9])
def test_a_limited_split_stops_after_the_sequence_that_reaches_the_limit(
    index: TokenIndex, limit: int
) -> None:
    whole, found = index.read_split("train"), index.read_split("train", max_positions=limit)
    assert as_rows([found]) == as_rows([whole])[: len(found)]
    if found.num_positions < whole.num_positions:
        assert found.num_positions >= limit
    if len(found):
        assert found.slice(0, len(found) - 1).num_positions < limit


# ---------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (path,) = write_shards(tmp_path, [make_table(4, seed=0)])
    return path


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_text(path: Path) -> None:
    path.write_text("no HDF5")


def set_attribute(name: str, value: Any) -> Any:
    def set_it(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file.attrs[name] = value

    return set_it


def remove_column(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["train/ids"]


def change_a_token(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["train/ids"][3] += 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "does not exist"),
        (tear, "cut short or damaged"),
        (replace_by_text, "cut short or damaged"),
        (set_attribute("version", 2), "has format version 2, this Retort reads 1"),
        (set_attribute("version", "two"), "cut short or damaged"),
        (set_attribute("format", "photographs"), "'photographs'"),
        (remove_column, "cut short or damaged"),
        (change_a_token, "does not match its content key"),
    ],
    ids=["absent", "torn", "text", "newer", "odd", "foreign", "no-column", "changed"],
)
def test_a_file_that_is_not_a_whole_shard_is_refused_in_one_sentence(
    shard: Path, damage: Any, says: str
) -> None:
    damage(shard)
    for read in (
        lambda: read_token_shard(shard, "train"),
        lambda: build_index([shard], streaming_chunk_size=3),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            read()
        assert str(shard) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_shards_of_different_tokenizers_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [make_table(3, seed=0), make_table(3, seed=1)])
    tables = {split: read_token_shard(paths[1], split) for split in ("train", "val")}
    other = TokenizerIdentity(fingerprint="ffffffffffff", size=TOKENIZER.size)
    write_token_shard(paths[1], tables, counts={}, tokenizer=other)
    with pytest.raises(ValueError, match="2 different tokenizers") as caught:
        build_index(paths, streaming_chunk_size=3)
    assert all(t.fingerprint in str(caught.value) for t in (other, TOKENIZER))


def test_a_corpus_without_training_text_is_refused_with_its_counts(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [build_table([]), build_table([])])
    with pytest.raises(
        ValueError, match="no document of the corpus is left for training"
    ) as caught:
        build_index(paths, streaming_chunk_size=3)
    assert "'read': 4" in str(caught.value)


def test_a_corpus_without_held_out_text_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, make_tables(0), num_held_out=0)
    with pytest.raises(ValueError, match=r"none of the 13 .* is held out"):
        write_index(tmp_path / "index.json", paths, streaming_chunk_size=3)
    assert not (tmp_path / "index.json").exists()


@pytest.fixture
def copied(index: TokenIndex, tmp_path: Path) -> TokenIndex:
    shutil.copytree(index.path.parent, tmp_path / "copy")
    return TokenIndex.read(tmp_path / "copy" / "index.json")


def test_a_shard_that_changed_after_it_was_listed_is_refused(copied: TokenIndex) -> None:
    for path in copied.path.parent.glob("*.h5"):
        path.unlink()
    write_shards(copied.path.parent, make_tables(5))
    with pytest.raises(ValueError, match="no longer contains the sequences") as caught:
        for part in copied.parts:
            copied.read_part(part)
    assert str(copied.path) in str(caught.value)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_other_shards_is_refused(
    copied: TokenIndex, split: str, limit: int | None, tmp_path: Path
) -> None:
    *_, last = (copied.path.parent / name for name in copied.record.shards)
    *_, other = write_shards(tmp_path / "other", make_tables(5))
    shutil.copy(other, last)
    with pytest.raises(ValueError, match="are not those that it lists") as caught:
        copied.read_split(split, max_positions=limit)
    assert str(copied.path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [None, 10**9])
def test_a_shard_with_fewer_held_out_sequences_is_refused(
    copied: TokenIndex, limit: int | None
) -> None:
    path = copied.path.parent / copied.record.shards[0]
    tables = {split: read_token_shard(path, split) for split in ("train", "val")}
    fewer = tables["val"].slice(1, len(tables["val"]))
    write_token_shard(path, tables | {"val": fewer}, counts={}, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"val has .* sequences"):
        copied.read_split("val", max_positions=limit)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ('{"format": "retort-tok', "is not JSON"),
        ("[]", "is another kind of file"),
        ('{"format": "retort-tokens", "version": 9}', r"newer Retort \(version 9\)"),
    ],
)
def test_a_file_that_is_not_an_index_is_refused(
    tmp_path: Path, text: str | None, says: str
) -> None:
    path = tmp_path / "index.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        TokenIndex.read(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# tokenize_shard, on real text


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Iterator[Any]:
    yield load_tokenizer(str(tiny_teacher))


def make_dataset(path: Path, **keys: Any) -> Any:
    values = {"name": "json", "data_files": str(path), "validation_fraction": 0.2} | keys
    return Dataset.model_validate(values)


# In a small trial, only the first document is held out.
FIRST_HELD_OUT = {"max_samples": 100, "validation_fraction": 1e-9}


def tokenize_all(
    folder: Path, dataset: Any, tokenizer: Any, *, snapshot: Path | None = None
) -> IndexRecord:
    """Tokenize every shard and index them."""
    fingerprint = identify_tokenizer("hub/id", tokenizer)
    paths = [folder / f"shard_{i}.h5" for i in range(dataset.num_shards)]
    for shard, path in enumerate(paths):
        tokenize_shard(
            path, dataset, tokenizer, identity=fingerprint, shard=shard, snapshot=snapshot
        )
    return write_index(folder / "index.json", paths, streaming_chunk_size=10)


def test_documents_and_tokens_of_a_corpus_reconcile(
    tmp_path: Path, tiny_corpus: Path, tokenizer: Any
) -> None:
    dataset = make_dataset(tiny_corpus, num_shards=3, max_length=40)
    index = tokenize_all(tmp_path, dataset, tokenizer)
    documents, tokens = index.counts.documents, index.counts.tokens
    documents.reconcile()
    assert documents.read == documents.used == tokens.documents == 120
    assert index.val.documents == documents.held_out
    assert index.train.documents + index.val.documents == 120
    texts = [json.loads(line)["text"] for line in tiny_corpus.open()]
    assert tokens.read == sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert tokens.read == tokens.stored
    said = describe_index(index)
    assert f"{tokens.read:,} read" in said
    assert "120 read = 120 used" in said


def test_the_number_of_shards_changes_no_sequence(
    tmp_path: Path, tiny_corpus: Path, tokenizer: Any
) -> None:
    found = []
    for num_shards in (1, 4):
        dataset = make_dataset(tiny_corpus, num_shards=num_shards, max_length=40)
        folder = tmp_path / str(num_shards)
        tokenize_all(folder, dataset, tokenizer)
        rows = as_rows([TokenIndex.read(folder / "index.json").read_split("train")])
        found.append(sorted(rows, key=lambda row: row[-1]))
    assert found[0] == found[1]


def test_a_snapshot_gives_the_same_sequences(
    tmp_path: Path, tiny_corpus: Path, tokenizer: Any
) -> None:
    dataset = make_dataset(tiny_corpus, num_shards=2, max_length=40)
    write_snapshot(dataset, tmp_path / "snapshot")
    read = tokenize_all(tmp_path / "read", dataset, tokenizer)
    found = tokenize_all(tmp_path / "tokens", dataset, tokenizer, snapshot=tmp_path / "snapshot")
    assert found == read


def train_tokenizer(words: str) -> Any:
    """A byte-level BPE that has a token for each of the words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"{words} " * 5], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


@pytest.mark.slow
def test_odd_documents_are_handled_and_counted(tmp_path: Path) -> None:
    word = " blue-bird-on-a-green-hill-house".replace("-", "")
    tokenizer = train_tokenizer(word)
    assert len(tokenizer(word)["input_ids"]) == 1
    long = word * 400_000
    assert len(long) > 10**7
    texts = [
        "held out",
        "",
        " \n",
        "nul \0 inside",
        "\0",
        "lone \ud800 surrogate",
        long,
        "plain",
        None,
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = make_dataset(path, num_shards=1, **FIRST_HELD_OUT)
    index = tokenize_all(tmp_path, dataset, tokenizer)
    documents, tokens = index.counts.documents, index.counts.tokens
    assert documents.read == len(texts)
    assert documents.skipped == {"empty": 3, "not_text": 1}
    assert documents.cleaned == {"lone_surrogate": 1, "nul": 1}
    assert tokens.read == tokens.stored
    assert tokens.documents_split == 1
    table = TokenIndex.read(tmp_path / "index.json").read_split("train")
    decoded = [
        tokenizer.decode(table[i].ids, skip_special_tokens=True)
        for i in range(len(table))
        if table.documents[i] != 6
    ]
    assert decoded == ["nul  inside", "lone \ufffd surrogate", "plain"]
    assert int(np.sum(table.documents == 6)) == -(-400_000 // 2047)  # one token more, the end


def test_labels_stay_with_their_sequences(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": f"bird {i}", "category": "ab"[i % 2], "language": "en"} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize_all(tmp_path, make_dataset(path, num_shards=2, **FIRST_HELD_OUT), tokenizer)
    table = TokenIndex.read(tmp_path / "index.json").read_split("train")
    assert len(table) == 8
    for document, label in zip(table.documents, table.labels, strict=True):
        assert table.label_names[label] == ("ab"[document % 2], "en")
    assert IndexRecord.read(tmp_path / "index.json").counts.documents.used == 9


def test_a_shard_that_was_copied_over_another_is_refused(tmp_path: Path) -> None:
    table = make_table(9, seed=3)
    paths = write_shards(tmp_path, [table, table])
    with pytest.raises(ValueError, match=r"00001.h5 contains the documents of .*00000.h5.*a copy"):
        build_index(paths, streaming_chunk_size=4)


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [make_table(9, seed=3)])
    with h5py.File(path, "r+") as file:
        file["train/labels"][4] = 77
    with pytest.raises(ValueError, match=r"label 77 of \d+: the file is damaged"):
        read_token_shard(path, "train")
