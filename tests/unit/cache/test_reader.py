"""A cache is whole or refused, says the same whoever made it, and pairs no distribution with another token."""

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retort.cache.codec import Codec, decode, encode
from retort.cache.merged import merge_parts
from retort.cache.parts import find_missing_parts, is_merged, part_path, remove_parts, write_part
from retort.cache.reader import CacheHeader, LogitCache, cache_digest
from retort.io.files import write_pieces
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable, build_table
from support.synthetic import (
    CODEC,
    CODED,
    ORDER,
    kill_writers,
    make_header,
    make_table,
    streams_of,
    targets_of,
    write_parts,
    write_tokens,
)

forking = multiprocessing.get_context("fork")


def make_tables() -> list[SequenceTable]:
    """Three shards: the second has labels of its own, the third repeats the first's documents as others."""
    first, second = make_table(9, seed=0), make_table(7, seed=1, first_document=100)
    second = replace(second, label_names=(("", ""), ("art", ""), ("code", "c")))
    return [first, second, replace(first, documents=first.documents + 200)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    return write_tokens(tmp_path_factory.mktemp("tokens"), make_tables(), chunk_size=3)


@pytest.fixture(scope="module")
def header(index: TokenIndex) -> CacheHeader:
    return make_header(index)


@pytest.fixture(scope="module")
def parts(index: TokenIndex, header: CacheHeader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "parts"
    write_parts(index, folder, header)
    return folder


@pytest.fixture(scope="module")
def merged(index: TokenIndex, header: CacheHeader, parts: Path) -> Path:
    path = parts.parent / "teacher_logits.h5"
    merge_parts(index, parts, header, path)
    return path


@pytest.fixture
def part(parts: Path, tmp_path: Path) -> Path:
    """A copy of one part, to be damaged."""
    path = tmp_path / "part.h5"
    path.write_bytes(min(parts.glob("*.h5")).read_bytes())
    return path


def read_everything(path: Path) -> list[Any]:
    """All that a reader can be told by a file; ValueError when it is refused."""
    cache = LogitCache(path)
    found: list[Any] = [cache.header.to_json()]
    for i in range(len(cache)):
        row, targets = cache.table[i], cache.read_targets(i)
        label = cache.table.label_names[cache.table.labels[i]]
        found.append([row.ids.tolist(), row.loss_mask.tolist(), row.segment_starts.tolist()])
        found.append([row.key, int(cache.table.documents[i]), label])
        found += [targets.ids.tolist(), targets.logprobs.tolist()]
        found.append(targets.tail_logprobs.tolist())
    return found


def expected_of(table: SequenceTable, header: CacheHeader) -> list[Any]:
    """What `read_everything` must say of a table's part."""
    found: list[Any] = [header.to_json()]
    for i in range(len(table)):
        row, piece = table[i], table.slice(i, i + 1)
        payload = encode(targets_of(piece, header.codec), header.codec)
        targets = decode(payload, header.codec, num_positions=row.num_positions)
        found.append([row.ids.tolist(), row.loss_mask.tolist(), row.segment_starts.tolist()])
        found.append([row.key, int(table.documents[i]), table.label_names[table.labels[i]]])
        found += [targets.ids.tolist(), targets.logprobs.tolist()]
        found.append(targets.tail_logprobs.tolist())
    return found


# ---------------------------------------------------------------------------------------------------------
# Written and read


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_documents=st.integers(1, 8), seed=st.integers(0, 10**6), top_k=st.integers(1, 9))
def test_a_part_comes_back_as_it_was_written(
    tmp_path: Path, num_documents: int, seed: int, top_k: int
) -> None:
    codec = Codec("top_k", top_k, (1.0, 3.0), 70_000)
    header = CacheHeader("teacher", "tokenizer", "tokens", codec)
    table = make_table(num_documents, seed=seed)
    write_part(tmp_path / "part.h5", table, targets_of(table, codec), header)
    assert read_everything(tmp_path / "part.h5") == expected_of(table, header)
    assert [p.name for p in tmp_path.iterdir()] == ["part.h5"]


def test_the_merged_cache_is_the_training_sequences_in_index_order(
    index: TokenIndex, header: CacheHeader, merged: Path
) -> None:
    assert read_everything(merged) == expected_of(index.read_split("train"), header)
    assert {p["name"] for p in index.parts} == {*(p["name"] for p in index.parts)}
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
    found = {}
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
# Nothing is trusted unread


@pytest.mark.slow
@pytest.mark.parametrize("method", ["top_k", *CODED])
def test_a_bit_flipped_anywhere_is_refused_or_changes_nothing(
    method: str, part: Path, index: TokenIndex
) -> None:
    if method != "top_k":
        part.unlink()
        table, header = index.read_part(index.parts[0]), make_header(index, CODED[method])
        write_part(part, table, streams_of(table, CODED[method]), header, ORDER)
    whole, content, chance = part.read_bytes(), read_everything(part), random.Random(0)
    refused = 0
    for _ in range(400):
        place, bit = chance.randrange(len(whole)), chance.randrange(8)
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


def column_bytes(path: Path, name: str) -> range:
    """Where a column's bytes lie in the file."""
    with h5py.File(path) as file:
        start = file[name].id.get_offset()
        return range(start, start + file[name].nbytes)


@pytest.mark.parametrize(
    "column",
    ["ids", "segment_starts", "keys", "documents", "labels", "records", "record_checksums"],
)
def test_every_bit_of_a_column_is_guarded(part: Path, column: str) -> None:
    whole, chance = part.read_bytes(), random.Random(0)
    places = column_bytes(part, column)
    for place in chance.sample(places, min(25, len(places))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(part)):
            LogitCache(part).verify()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True))
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
        ("format", "retort-tokens", "is no retort-logits file"),
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
    codec = CODED.get(method, CODEC)
    header = CacheHeader("teacher", "tokenizer", "tokens", codec)
    targets = streams_of(table, codec) if codec.is_coded else targets_of(table, codec)

    def write(path: Path) -> None:
        write_part(path, table, targets, header, ORDER if codec.is_coded else None)

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


# ---------------------------------------------------------------------------------------------------------
# Merging


def do_stripe(
    index: TokenIndex, folder: Path, header: CacheHeader, worker: int, num_workers: int
) -> None:
    """What a worker does, in an order of its own."""
    mine = index.parts[worker::num_workers]
    random.Random(worker).shuffle(mine)
    for part in mine:
        table = index.read_part(part)
        path = part_path(folder, part["name"], header)
        write_part(path, table, targets_of(table, header.codec), header)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_the_merged_file_is_the_same_whoever_made_its_parts_and_when(
    index: TokenIndex, header: CacheHeader, merged: Path, tmp_path: Path, num_workers: int
) -> None:
    workers = [
        forking.Process(target=do_stripe, args=(index, tmp_path, header, w, num_workers))
        for w in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    time.sleep(1.1 if num_workers == 1 else 0)  # HDF5 can store times in seconds
    merge_parts(index, tmp_path, header, tmp_path / "again.h5")
    assert sha256(tmp_path / "again.h5") == sha256(merged)


def test_parts_done_in_any_order_and_twice_merge_to_the_same_file(
    index: TokenIndex, header: CacheHeader, merged: Path, tmp_path: Path
) -> None:
    for seed in range(3):
        folder = tmp_path / str(seed)
        order = index.parts * 2
        random.Random(seed).shuffle(order)
        for part in order:
            table = index.read_part(part)
            path = part_path(folder, part["name"], header)
            write_part(path, table, targets_of(table, header.codec), header)
        merge_parts(index, folder, header, folder / "again.h5")
        assert sha256(folder / "again.h5") == sha256(merged)


@pytest.fixture
def own_parts(index: TokenIndex, header: CacheHeader, tmp_path: Path) -> Path:
    write_parts(index, tmp_path / "parts", header)
    return tmp_path / "parts"


def test_missing_parts_are_those_without_a_file(
    index: TokenIndex, header: CacheHeader, own_parts: Path
) -> None:
    assert find_missing_parts(index, own_parts, header) == []
    part_path(own_parts, index.parts[2]["name"], header).unlink()
    assert find_missing_parts(index, own_parts, header) == [(2, index.parts[2])]
    other = replace(header, teacher="another")
    assert len(find_missing_parts(index, own_parts, other)) == len(index.parts)


def test_one_error_names_every_missing_damaged_foreign_and_exchanged_part(
    index: TokenIndex, header: CacheHeader, own_parts: Path
) -> None:
    paths = [part_path(own_parts, part["name"], header) for part in index.parts]
    missing, damaged, foreign, one, other = paths[:5]
    missing.unlink()
    content = bytearray(damaged.read_bytes())
    content[column_bytes(damaged, "records").start] ^= 1
    damaged.write_bytes(content)
    table = index.read_part(index.parts[2])
    write_part(foreign, table, targets_of(table), replace(header, teacher="another"))
    one.write_bytes(other.read_bytes())
    out = own_parts.parent / "merged.h5"
    with pytest.raises(ValueError, match=f"4 of {len(paths)} parts cannot be merged") as caught:
        merge_parts(index, own_parts, header, out)
    said = str(caught.value).splitlines()
    for path, reason in (
        (missing, "is missing"),
        (damaged, "part 0 has checksum"),
        (foreign, "another teacher: it holds 'another'"),
        (one, "holds other sequences"),
    ):
        assert any(str(path) in line and reason in line for line in said), (path, reason)
    assert not any(str(path) in line for line in said for path in (other, *paths[5:]))
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------
# merge.mode: virtual


def open_files() -> list[int]:
    return [int(path.name) for path in Path("/proc/self/fd").iterdir()]


def limit_open_files(more: int) -> None:
    """Let this process open `more` files than it has open; the limit is of their numbers, and some below are free."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    taken = [number for number in open_files() if Path(f"/proc/self/fd/{number}").exists()]
    free = (number for number in count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, more, None)), hard))


def merge_with_few_files(index: TokenIndex, parts: Path, header: CacheHeader, send: Any) -> None:
    limit_open_files(5)
    merge_parts(index, parts, header, parts.parent / "merged.h5")
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    try:
        LogitCache(parts.parent / "merged.h5")
    except OSError as error:
        os.close(taken.pop())
        send.send(error.errno)


def test_merging_holds_one_part_open_at_a_time_and_a_lack_of_files_is_no_damage(
    index: TokenIndex, header: CacheHeader, own_parts: Path, merged: Path
) -> None:
    receive, send = forking.Pipe(duplex=False)
    assert len(index.parts) > 5
    process = forking.Process(target=merge_with_few_files, args=(index, own_parts, header, send))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert receive.poll(1) and receive.recv() == errno.EMFILE
    assert (own_parts.parent / "merged.h5").read_bytes() == merged.read_bytes()
    assert find_missing_parts(index, own_parts, header) == []


@pytest.mark.parametrize("is_virtual", [False, True])
def test_a_bit_flipped_on_the_way_is_refused_and_costs_no_part(
    is_virtual: bool,
    index: TokenIndex,
    header: CacheHeader,
    own_parts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def write_wrongly(file: Any, content: memoryview) -> None:
        calls.append(len(content))
        damaged = bytearray(content)
        if len(calls) == 2:
            damaged[len(damaged) // 2] ^= 4
        write_pieces(file, memoryview(damaged))

    monkeypatch.setattr("retort.cache.merged.write_pieces", write_wrongly)
    out, mode = own_parts.parent / "merged.h5", "virtual" if is_virtual else "copy"
    with pytest.raises(ValueError, match="is whole, but its copy is not"):
        merge_parts(index, own_parts, header, out, mode=mode)
    assert len(calls) > 2 and not out.exists()
    assert find_missing_parts(index, own_parts, header) == []


def test_dead_caches_hold_no_file_open(parts: Path) -> None:
    gc.disable()
    try:
        before = len(open_files())
        for path in sorted(parts.glob("*.h5")):
            LogitCache(path).verify()
        assert len(open_files()) == before
    finally:
        gc.enable()


@pytest.fixture
def virtual(index: TokenIndex, header: CacheHeader, own_parts: Path) -> Path:
    path = own_parts.parent / "virtual.h5"
    merge_parts(index, own_parts, header, path, mode="virtual")
    return path


def test_a_virtual_cache_reads_as_a_copied_one(
    merged: Path, virtual: Path, index: TokenIndex, header: CacheHeader, own_parts: Path
) -> None:
    assert read_everything(virtual) == read_everything(merged)
    assert cache_digest(LogitCache(virtual)) == cache_digest(LogitCache(merged))
    LogitCache(virtual).verify_parts()
    assert pickle.loads(pickle.dumps(LogitCache(virtual))).read_record(5)
    again = own_parts.parent / "again.h5"
    merge_parts(index, own_parts, header, again, mode="virtual")
    assert again.read_bytes() == virtual.read_bytes()
    records = LogitCache(merged).record_bytes
    assert merged.stat().st_size - virtual.stat().st_size >= records - (1 << 14)


def test_a_virtual_cache_moves_with_its_parts_and_h5py_reads_it(
    virtual: Path, merged: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    moved = tmp_path_factory.mktemp("moved") / "cache"
    shutil.copytree(virtual.parent, moved)
    shutil.rmtree(virtual.parent)
    assert read_everything(moved / virtual.name) == read_everything(merged)
    code = f"import h5py; print(h5py.File({str(moved / virtual.name)!r})['records'][()].tobytes().hex())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HDF5_EXTFILE_PREFIX": "${ORIGIN}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == LogitCache(merged).columns["records"].tobytes().hex()


def test_a_virtual_cache_says_which_part_it_misses_or_finds_changed(
    virtual: Path, index: TokenIndex, header: CacheHeader, own_parts: Path
) -> None:
    first, second = (part_path(own_parts, part["name"], header) for part in index.parts[:2])
    cache = LogitCache(virtual)
    before = int(cache.columns["part_offsets"][1])
    content = bytearray(second.read_bytes())
    place = column_bytes(second, "records")
    content[place.start : place.stop] = bytes(len(place))
    second.write_bytes(content)
    first.unlink()
    with pytest.raises(ValueError, match=rf"{first.name} cannot be read .* is a virtual cache"):
        cache.read_targets(0)
    with pytest.raises(ValueError, match="does not match its checksum"):
        cache.read_targets(before)
    cache.verify_part(2)
    with pytest.raises(ValueError, match="part 1 has checksum"):
        cache.verify_part(1)


def test_a_merged_cache_is_known_by_its_header(
    header: CacheHeader, merged: Path, tmp_path: Path
) -> None:
    assert not is_merged(tmp_path / "absent.h5", header)
    assert is_merged(merged, header)
    with pytest.raises(ValueError, match="made with another tokens"):
        is_merged(merged, replace(header, tokens="other"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "x"), ("tokenizer", "x"), ("tokens", "x"), ("codec", replace(CODEC, top_k=3))],
)
def test_another_header_is_another_part_and_is_refused_by_name(
    header: CacheHeader, name: str, value: Any
) -> None:
    other = replace(header, **{name: value})
    assert part_path(Path(), "part", header) != part_path(Path(), "part", other)
    with pytest.raises(ValueError, match=f"here.h5 was made with another {name}"):
        other.require(header, source=Path("here.h5"))
    header.require(CacheHeader.from_json(header.to_json()), source=Path("here.h5"))


def test_only_parts_and_claims_are_removed(own_parts: Path) -> None:
    (own_parts / "abc.claim").touch()
    (own_parts / ".part.h5.node.1.tmp").touch()
    (own_parts / "notes.txt").touch()
    remove_parts(own_parts)
    assert [p.name for p in own_parts.iterdir()] == ["notes.txt"]
    (own_parts / "notes.txt").unlink()
    remove_parts(own_parts)
    assert not own_parts.exists()
    remove_parts(own_parts)


def test_the_digest_of_a_cache_names_its_content(
    index: TokenIndex, header: CacheHeader, merged: Path, tmp_path: Path
) -> None:
    def digest_of(change: Callable[[SequenceTable], Any], header: CacheHeader) -> str:
        table = index.read_split("train")
        write_part(tmp_path / "all.h5", table, change(table), header)
        return cache_digest(LogitCache(tmp_path / "all.h5"))

    same = digest_of(targets_of, header)
    assert same == cache_digest(LogitCache(merged))
    assert digest_of(targets_of, replace(header, teacher="another")) != same
    lower = digest_of(
        lambda t: replace(targets_of(t), tail_logprobs=targets_of(t).tail_logprobs - 1), header
    )
    assert lower != same
