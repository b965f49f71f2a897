"""A shard of any size takes the memory of a batch and is whole or not there; reading costs what is asked for."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.corpus.reading import Counts, read_documents
from retort.tokens import shards, tokenize
from retort.tokens.index import TokenIndex, build_index
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.shards import read_about, read_token_shard, write_token_shard
from support import bytewise
from support.bytewise import Bytes
from support.synthetic import make_table, write_shards, write_tokens
from unit.test_cli import run_on_a_small_disk

forking = multiprocessing.get_context("fork")

# ---------------------------------------------------------------------------------------------------------
# Memory


def measure_peaks(folder: Path, num_documents: int) -> list[float]:
    """MB after tokenizing documents of 1,000 tokens, after indexing them, and after reading a part."""
    corpus = bytewise.write_corpus(folder / f"{num_documents}.jsonl", num_documents)
    command = [sys.executable, bytewise.__file__, str(corpus), str(folder / str(num_documents))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks: list[float] = json.loads(done.stdout)
    return peaks


@pytest.mark.slow
@pytest.mark.parametrize("num_documents", [400, 10_000], ids=["small", "large"])
def test_memory_does_not_grow_with_the_corpus(num_documents: int, tmp_path: Path) -> None:
    once, tenfold = (measure_peaks(tmp_path, n) for n in (num_documents, 10 * num_documents))
    assert all(more - less < 25 for less, more in zip(once, tenfold, strict=True)), (once, tenfold)


# ---------------------------------------------------------------------------------------------------------
# The same sequences as all at once


def tokenize_at_once(dataset: Any) -> dict[str, SequenceTable]:
    """What a shard must hold, said as simply as can be."""
    rows: dict[str, list[Any]] = {"train": [], "val": []}
    for document in read_documents(dataset, shard=0, num_shards=1, counts=Counts()):
        head = list(f"{document.prompt}\n".encode()) if document.prompt is not None else []
        ids = [*head, *document.text.encode(), Bytes.eos_token_id]
        length = dataset.max_length
        for start in range(0, len(ids) - 1, length - 1):
            piece = ids[start : start + length]
            mask = [start + t + 1 >= len(head) for t in range(len(piece) - 1)] + [False]
            if any(mask):
                label = (document.category or "", document.language or "")
                rows[document.split].append((piece, mask, document.index, label))
    return {split: build_table(found) for split, found in rows.items()}


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
    tokenizer, counts = read_about(folder / "stream.h5")
    expected = tokenize_at_once(bytewise.make_dataset(corpus, **keys))
    write_token_shard(folder / "once.h5", expected, counts=counts, tokenizer=tokenizer)
    assert (folder / "stream.h5").read_bytes() == (folder / "once.h5").read_bytes()
    for split, table in expected.items():
        found = vars(read_token_shard(folder / "stream.h5", split))
        assert found.pop("label_names") == table.label_names
        for name, values in found.items():
            assert values.dtype == getattr(table, name).dtype
            assert np.array_equal(values, getattr(table, name)), name


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
    assert whole["train"]["longest"] == max(int(t.lengths.max()) for t in tables if len(t))


# ---------------------------------------------------------------------------------------------------------
# Kills and full disks


@pytest.mark.slow
def test_a_tokenization_killed_at_any_moment_leaves_a_whole_shard_or_none(tmp_path: Path) -> None:
    corpus, folder = bytewise.write_corpus(tmp_path / "c.jsonl", 300), tmp_path / "tokens"
    out = folder / "shard_00000.h5"
    started = time.monotonic()
    bytewise.tokenize(out, corpus)
    seconds = time.monotonic() - started
    whole, chance, found = out.read_bytes(), random.Random(0), []
    for number in range(12):
        out.unlink()
        process = forking.Process(target=bytewise.tokenize, args=(out, corpus))
        process.start()
        # Every other one while the file is written, which is a small part of the time.
        while number % 2 and process.is_alive() and not any(folder.glob(".*.tmp")):
            pass
        time.sleep(0 if number % 2 else chance.uniform(0, seconds))
        process.kill()
        process.join()
        assert not out.exists() or out.read_bytes() == whole
        found.append((process.exitcode, any(folder.glob(".*.tmp"))))
        bytewise.tokenize(out, corpus)
        assert out.read_bytes() == whole
        assert list(folder.iterdir()) == [out]
    assert sum(status == -signal.SIGKILL for status, _ in found) >= 10
    assert any(is_torn for _, is_torn in found)


def test_a_full_disk_ends_a_tokenization_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    corpus, folder = bytewise.write_corpus(tmp_path / "c.jsonl", 100), tmp_path / "disk"
    folder.mkdir()
    body = (
        f"import os, sys; from pathlib import Path; sys.path.append('{Path(__file__).parents[2]}')\n"
        "    from support import bytewise; from retort.cli import is_disk_full\n"
        f"    folder, error = Path('{folder}'), None\n"
        "    for kib in range(8, 2048, 97):\n"
        "        (folder / 'filler').write_bytes(bytes(kib << 10))\n"
        f"        try: bytewise.tokenize(folder / 'a.h5', Path('{corpus}'))\n"
        "        except OSError as raised: error = raised; assert is_disk_full(error), error\n"
        "        print(sorted(os.listdir(folder)))\n"
        "        (folder / 'a.h5').unlink(missing_ok=True)\n"
        "    raise error"
    )
    found = run_on_a_small_disk(folder, body, size="2m")
    assert found.returncode == 1
    assert found.stderr.startswith("error: the disk is full") and found.stderr.count("\n") == 1
    lines = found.stdout.splitlines()[1:]  # after the line that begins an attempt
    assert set(lines) == {"['a.h5', 'filler']", "['filler']"}
    assert lines == sorted(lines), "whole for as long as there is room, and then never"


# ---------------------------------------------------------------------------------------------------------
# Reading by the index


@pytest.fixture
def index(tmp_path: Path) -> TokenIndex:
    return write_tokens(tmp_path, [make_table(30, seed=1), make_table(9, seed=2)], chunk_size=3)


def change_all_but(index: TokenIndex, kept: Callable[[int], bool], *, shard: int) -> None:
    """Change a token of every sequence of a shard that is not to be kept."""
    with h5py.File(index.path.parent / index.content["shards"][shard], "r+") as file:
        ids, offsets = file["train/ids"], file["train/offsets"][()]
        for sequence, first in enumerate(offsets[:-1].tolist()):
            if not kept(sequence):
                ids[first] ^= 1


def test_a_part_is_read_from_its_own_bytes_alone(index: TokenIndex) -> None:
    part = index.parts[4]
    before = index.read_part(part)
    own = range(part["first"], part["first"] + part["sequences"])
    change_all_but(index, lambda sequence: sequence in own, shard=0)
    assert index.read_part(part).ids.tolist() == before.ids.tolist()
    for other in index.parts[:4] + index.parts[5:10]:
        with pytest.raises(
            ValueError, match=rf"sequence {other['first']} does not hold the tokens"
        ):
            index.read_part(other)
    assert len(index.read_part(index.parts[-1])), "of the other shard"
    with pytest.raises(ValueError, match="does not hold the tokens"):
        build_index(sorted(index.path.parent.glob("*.h5")), streaming_chunk_size=3)


@pytest.mark.parametrize("column", ["ids", "loss_mask", "segment_starts", "keys", "documents"])
def test_damage_to_a_part_is_refused_when_it_is_read(column: str, index: TokenIndex) -> None:
    part = index.parts[4]
    path = index.path.parent / index.content["shards"][0]
    with h5py.File(path, "r+") as file:
        offsets = {"ids": "offsets", "loss_mask": "offsets", "segment_starts": "segment_offsets"}
        row = part["first"] + 1
        row = int(file["train"][offsets[column]][row]) if column in offsets else row
        file["train"][column][row] ^= 1
    with pytest.raises(ValueError, match=r"does not hold the tokens|no longer holds") as caught:
        index.read_part(part)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    index.read_part(index.parts[3])
    index.read_part(index.parts[5])


@pytest.mark.parametrize("column", ["offsets", "segment_offsets"])
@pytest.mark.parametrize("value", [-5, 0, 10**15])
def test_damaged_offsets_are_refused(column: str, value: int, index: TokenIndex) -> None:
    part = index.parts[4]
    path = index.path.parent / index.content["shards"][0]
    for row in (part["first"], part["first"] + 1, part["first"] + part["sequences"]):
        with h5py.File(path, "r+") as file:
            before = int(file["train"][column][row])
            file["train"][column][row] = value
        with pytest.raises(ValueError, match=r"damaged") as caught:
            index.read_part(part)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        with h5py.File(path, "r+") as file:
            file["train"][column][row] = before
    index.read_part(part)


def test_a_limited_split_and_a_sample_read_no_sequence_that_they_do_not_return(
    index: TokenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, sample = index.read_sample(num_positions=20)
    change_all_but(index, lambda sequence: sequence in places, shard=0)
    again, found = index.read_sample(num_positions=20)
    assert again.tolist() == places.tolist() and found.keys.tolist() == sample.keys.tolist()
    assert 1 < len(places) < index.content["train"]["sequences"] / 5

    monkeypatch.setattr(shards, "_BLOCK_SEQUENCES", 1)
    (index.path.parent / index.content["shards"][1]).unlink()
    first = index.read_split("train", max_positions=1)
    assert len(first) == 1, "neither the next sequence, which was changed, nor the next shard"


def test_a_sample_of_a_shard_that_became_shorter_is_refused(index: TokenIndex) -> None:
    write_shards(index.path.parent, [make_table(3, seed=1), make_table(9, seed=2)])
    with pytest.raises(ValueError, match="no longer holds the sequences"):
        index.read_sample(num_positions=10**6)
