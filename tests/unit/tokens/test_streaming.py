"""A shard of any size needs the memory of a batch, and is complete or absent; only what is asked for is read."""

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
import pytest

from retort.tokens import shards, tokenize
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import build_index
from support import bytewise
from support.bytewise import assert_as_at_once
from support.synthetic import make_table, write_shards, write_tokens
from unit.test_cli import run_on_a_small_disk

forking = multiprocessing.get_context("fork")

# ---------------------------------------------------------------------------------------------------------
# Memory


def measure_peaks(folder: Path, num_documents: int) -> list[float]:
    """Return the peak memory in MB after tokenizing documents of 1,000 tokens, indexing, and reading a part."""
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


def test_a_stream_of_documents_gives_the_bytes_of_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_DOCUMENTS_PER_BATCH", 2)
    monkeypatch.setattr(tokenize, "_CHARACTERS_PER_BATCH", 20)
    monkeypatch.setattr(shards, "_PIECE_BYTES", 16)
    corpus = tmp_path / "corpus.jsonl"
    rows = [
        {
            "prompt": "p" * (i % 5),
            "text": "text " * (1 + i % 7),
            "category": ["z", "", "a", None][i % 4],
        }
        for i in range(23)
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys: dict[str, Any] = {"max_length": 7, "validation_fraction": 0.3}
    keys |= {"prompt_column": "prompt", "response_column": "text"}
    bytewise.tokenize(tmp_path / "stream.h5", corpus, **keys)
    assert_as_at_once(tmp_path / "stream.h5", corpus, **keys)


# ---------------------------------------------------------------------------------------------------------
# Kills and full disks


@pytest.mark.slow
def test_a_tokenization_killed_at_any_moment_leaves_a_complete_shard_or_none(
    tmp_path: Path,
) -> None:
    corpus, folder = bytewise.write_corpus(tmp_path / "c.jsonl", 300), tmp_path / "tokens"
    out = folder / "shard_00000.h5"
    started = time.monotonic()
    bytewise.tokenize(out, corpus)
    seconds = time.monotonic() - started
    whole, rng, found = out.read_bytes(), random.Random(0), []
    for number in range(12):
        out.unlink()
        process = forking.Process(target=bytewise.tokenize, args=(out, corpus))
        process.start()
        # Every other one while the file is written, which takes a small part of the time.
        while number % 2 and process.is_alive() and not any(folder.glob(".*.tmp")):
            pass
        time.sleep(0 if number % 2 else rng.uniform(0, seconds))
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
    assert lines == sorted(lines), "complete while there is space, then never"


# ---------------------------------------------------------------------------------------------------------
# Reading by the index


@pytest.fixture
def index(tmp_path: Path) -> TokenIndex:
    return write_tokens(tmp_path, [make_table(30, seed=1), make_table(9, seed=2)], chunk_size=3)


def change_all_but(index: TokenIndex, kept: Callable[[int], bool], *, shard: int) -> None:
    """Change a token in every sequence of a shard, except those that `kept` is true of."""
    with h5py.File(index.path.parent / index.record.shards[shard], "r+") as file:
        ids, offsets = file["train/ids"], file["train/offsets"][()]
        for sequence, first in enumerate(offsets[:-1].tolist()):
            if not kept(sequence):
                ids[first] ^= 1


def test_reading_a_part_reads_only_its_own_sequences(index: TokenIndex) -> None:
    part = index.parts[4]
    before = index.read_part(part)
    own = range(part.first, part.first + part.sequences)
    change_all_but(index, lambda sequence: sequence in own, shard=0)
    assert index.read_part(part).ids.tolist() == before.ids.tolist()
    for other in index.parts[:4] + index.parts[5:10]:
        with pytest.raises(
            ValueError, match=rf"sequence {other.first} does not match its content key"
        ):
            index.read_part(other)
    assert len(index.read_part(index.parts[-1])), "of the other shard"
    with pytest.raises(ValueError, match="does not match its content key"):
        build_index(sorted(index.path.parent.glob("*.h5")), streaming_chunk_size=3)


@pytest.mark.parametrize("column", ["ids", "loss_mask", "segment_starts", "keys", "documents"])
def test_damage_to_a_part_is_refused_when_it_is_read(column: str, index: TokenIndex) -> None:
    part = index.parts[4]
    path = index.path.parent / index.record.shards[0]
    with h5py.File(path, "r+") as file:
        offsets = {"ids": "offsets", "loss_mask": "offsets", "segment_starts": "segment_offsets"}
        row = part.first + 1
        row = int(file["train"][offsets[column]][row]) if column in offsets else row
        file["train"][column][row] ^= 1
    with pytest.raises(
        ValueError, match=r"does not match its content key|no longer contains"
    ) as caught:
        index.read_part(part)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    index.read_part(index.parts[3])
    index.read_part(index.parts[5])


@pytest.mark.parametrize("column", ["offsets", "segment_offsets"])
@pytest.mark.parametrize("value", [-5, 0, 10**15])
def test_damaged_offsets_are_refused(column: str, value: int, index: TokenIndex) -> None:
    part = index.parts[4]
    path = index.path.parent / index.record.shards[0]
    for row in (part.first, part.first + 1, part.first + part.sequences):
        with h5py.File(path, "r+") as file:
            before = int(file["train"][column][row])
            file["train"][column][row] = value
        with pytest.raises(ValueError, match=r"damaged") as caught:
            index.read_part(part)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        with h5py.File(path, "r+") as file:
            file["train"][column][row] = before
    index.read_part(part)


def test_a_limited_split_and_a_sample_read_only_what_they_return(
    index: TokenIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, sample = index.read_sample(num_positions=20)
    change_all_but(index, lambda sequence: sequence in places, shard=0)
    again, found = index.read_sample(num_positions=20)
    assert again.tolist() == places.tolist() and found.keys.tolist() == sample.keys.tolist()
    assert 1 < len(places) < index.record.train.sequences / 5

    monkeypatch.setattr(shards, "_BLOCK_SEQUENCES", 1)
    change_all_but(index, lambda sequence: False, shard=1)
    first = index.read_split("train", max_positions=1)
    assert len(first) == 1, "neither the next sequence, which was changed, nor the next shard"


def test_a_sample_of_a_shard_that_became_shorter_is_refused(index: TokenIndex) -> None:
    write_shards(index.path.parent, [make_table(3, seed=1), make_table(9, seed=2)])
    with pytest.raises(ValueError, match="no longer contains the sequences"):
        index.read_sample(num_positions=10**6)
