"""A cache file is read as it was written or refused, and pairs no distribution with another token."""

import json
import multiprocessing
import pickle
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from retort.cache.codec import NO_ORDER
from retort.cache.parts import write_part
from retort.cache.reader import CacheHeader, LogitCache
from retort.cache.top_k_codec import TopKCodec
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import build_table
from support.caches import column_bytes, expected_of, read_everything
from support.synthetic import (
    CODEC,
    CODED,
    ORDER,
    kill_writers,
    make_header,
    make_table,
    streams_of,
    targets_of,
)

forking = multiprocessing.get_context("fork")


@pytest.fixture
def part(parts: Path, tmp_path: Path) -> Path:
    """A copy of one part, to be damaged."""
    path = tmp_path / "part.h5"
    path.write_bytes(min(parts.glob("*.h5")).read_bytes())
    return path


# ---------------------------------------------------------------------------------------------------------
# Reading and writing


@pytest.mark.parametrize(("num_documents", "seed", "top_k"), [(1, 0, 1), (3, 1, 9), (8, 2, 4)])
def test_a_part_comes_back_as_it_was_written(
    tmp_path: Path, num_documents: int, seed: int, top_k: int
) -> None:
    codec = TopKCodec((1.0, 3.0), 70_000, top_k)
    header = CacheHeader("teacher", "tokenizer", "tokens", codec)
    table = make_table(num_documents, seed=seed)
    write_part(tmp_path / "part.h5", table, targets_of(table, codec), header)
    assert read_everything(tmp_path / "part.h5") == expected_of(table, header)
    assert [p.name for p in tmp_path.iterdir()] == ["part.h5"]


def test_the_merged_cache_is_the_training_sequences_in_index_order(
    index: TokenIndex, header: CacheHeader, merged: Path
) -> None:
    assert read_everything(merged) == expected_of(index.read_split("train"), header)
    assert LogitCache(merged).record_bytes > 0


def test_targets_of_another_number_of_positions_are_our_own_mistake(tmp_path: Path) -> None:
    table = make_table(3, seed=0)
    header = CacheHeader("teacher", "tokenizer", "tokens", CODEC)
    with pytest.raises(AssertionError):
        write_part(tmp_path / "part.h5", table, targets_of(table)[1:], header)


def test_a_cache_survives_pickling(merged: Path) -> None:
    copy = pickle.loads(pickle.dumps(LogitCache(merged)))
    assert copy.read_targets(3).ids.tolist() == (LogitCache(merged).read_targets(3).ids.tolist())


def read_in_child(cache: LogitCache, start: int, step: int, send: Any) -> None:
    rows = range(start, len(cache), step)
    send.send([(i, cache.read_targets(i).ids.tolist()) for i in rows])


def test_a_cache_opened_before_a_fork_is_read_by_all_children(merged: Path) -> None:
    cache = LogitCache(merged)
    alone = [cache.read_targets(i).ids.tolist() for i in range(len(cache))]
    found: dict[int, list[int]] = {}
    pipes = [forking.Pipe() for _ in range(3)]
    children = [
        forking.Process(target=read_in_child, args=(cache, w, 3, pipes[w][1])) for w in range(3)
    ]
    for child in children:
        child.start()
    for (receive, _), child in zip(pipes, children, strict=True):
        found |= dict(receive.recv())
        child.join()
        assert child.exitcode == 0
    assert [found[i] for i in range(len(cache))] == alone


# ---------------------------------------------------------------------------------------------------------
# Damage is detected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["top_k", *CODED])
def test_a_bit_flipped_anywhere_is_refused_or_changes_nothing(
    method: str, part: Path, index: TokenIndex
) -> None:
    if method != "top_k":
        part.unlink()
        table, header = index.read_part(index.parts[0]), make_header(index, CODED[method])
        write_part(part, table, streams_of(table, CODED[method]), header, ORDER)
    whole, content, rng = part.read_bytes(), read_everything(part), random.Random(0)
    refused = 0
    for _ in range(400):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        part.write_bytes(damaged)
        try:
            found = read_everything(part)
        except ValueError as error:
            assert str(part) in str(error), (place, bit)
            refused += 1
        else:
            assert found == content, (place, bit)
    assert refused > 100


@pytest.mark.parametrize(
    "column",
    ["ids", "segment_starts", "keys", "documents", "labels", "records", "record_checksums"],
)
def test_every_bit_of_a_column_is_guarded(part: Path, column: str) -> None:
    whole, rng = part.read_bytes(), random.Random(0)
    places = column_bytes(part, column)
    for place in rng.sample(places, min(25, len(places))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(part)):
            LogitCache(part).verify()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_a_file_cut_short_is_refused(parts: Path, tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "cut.h5"
    whole = min(parts.glob("*.h5")).read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(ValueError, match="cut short or damaged") as caught:
        LogitCache(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("version", 5, "has format version 5, this Retort reads 4"),
        ("format", "retort-tokens", "is not a retort-logits file"),
        ("header", None, "header does not match its checksum"),
    ],
)
def test_a_newer_or_foreign_file_is_refused(part: Path, name: str, value: Any, says: str) -> None:
    with h5py.File(part, "r+") as file:
        if name == "header":
            value = len(file["header"]) * b" "
            file["header"][...] = np.frombuffer(value, np.uint8)
        else:
            file.attrs[name] = value
    with pytest.raises(ValueError, match=says) as caught:
        LogitCache(part)
    assert str(part) in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        LogitCache(tmp_path / "absent.h5")


def rewrite(path: Path, columns: dict[str, Any]) -> None:
    """Replace columns as a program with a bug would: with checksums that fit."""
    with h5py.File(path, "r+") as file:
        entry = json.loads(file["header"][()].tobytes())
        for name, column in columns.items():
            del file[name]
            file.create_dataset(name, data=column)
            if name in entry["checksums"]:
                entry["checksums"][name] = xxhash.xxh3_128_hexdigest(column.tobytes())
        text = json.dumps(entry, sort_keys=True).encode()
        file["header"][...] = np.frombuffer(text, np.uint8)
        file.attrs["header_checksum"] = np.uint64(xxhash.xxh3_64_intdigest(text))


@pytest.fixture
def even(tmp_path: Path) -> Path:
    """A part of sequences of one length: its records could be exchanged without a trace of their sizes."""
    rows = [([i, i + 1, i + 2, 7], [True] * 3 + [False], i, ("", "")) for i in range(5)]
    table = build_table(rows)
    header = CacheHeader("teacher", "tokenizer", "tokens", CODEC)
    write_part(tmp_path / "even.h5", table, targets_of(table), header)
    LogitCache(tmp_path / "even.h5").verify()
    return tmp_path / "even.h5"


def test_records_rolled_by_one_sequence_are_refused(even: Path) -> None:
    cache = LogitCache(even)
    order = np.roll(np.arange(len(cache)), 1)
    records = [cache.read_record(int(i)) for i in order]
    rewrite(
        even,
        {
            "records": np.frombuffer(b"".join(records), np.uint8),
            "record_offsets": np.cumsum([0, *map(len, records)], dtype=np.int64),
            "record_checksums": np.array(cache.record_checksums)[order],
        },
    )
    with pytest.raises(ValueError, match="or the record is another sequence's"):
        LogitCache(even).read_targets(0)


@pytest.mark.parametrize("column", ["ids", "loss_mask", "keys"])
def test_sequences_rolled_against_their_records_are_refused(even: Path, column: str) -> None:
    with h5py.File(even) as file:
        rolled = np.roll(file[column][()], 1, axis=0)
    rewrite(even, {column: rolled})
    with pytest.raises(ValueError, match="content key names"):
        LogitCache(even).verify()


# ---------------------------------------------------------------------------------------------------------
# A part is atomic


@pytest.mark.slow
@pytest.mark.parametrize("method", ["top_k", "top_p", "sampled"])
def test_a_writer_killed_at_any_moment_leaves_whole_parts_or_none(
    method: str, tmp_path: Path
) -> None:
    table = make_table(60, seed=0)
    codec = CODED.get(method)
    header = CacheHeader("teacher", "tokenizer", "tokens", codec or CODEC)
    sequences = streams_of(table, codec) if codec else targets_of(table)

    def write(path: Path) -> None:
        write_part(path, table, sequences, header, ORDER if codec else NO_ORDER)

    write(tmp_path / "whole.h5")
    expected = (tmp_path / "whole.h5").read_bytes()
    LogitCache(tmp_path / "whole.h5").verify()
    (tmp_path / "whole.h5").unlink()
    num_torn = num_whole = 0
    for is_torn in kill_writers(tmp_path, write, times=40):
        num_torn += is_torn
        for path in tmp_path.glob("*.h5"):
            assert path.read_bytes() == expected
            num_whole += 1
    assert num_torn > 5 and num_whole > 5  # or this test proves nothing
