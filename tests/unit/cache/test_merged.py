"""Merging: equal parts give the same file in any order, and missing and damaged parts are named."""

import errno
import gc
import hashlib
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
import pytest

from retort.cache.codec import SparseTargets
from retort.cache.merged import MOST_VIRTUAL_PARTS, merge_parts, require_few_parts
from retort.cache.parts import find_missing_parts, is_merged, part_path, remove_parts, write_part
from retort.cache.reader import CacheHeader, LogitCache, cache_digest
from retort.io.files import write_pieces
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from support.caches import column_bytes, read_everything
from support.synthetic import CODEC, targets_of, write_parts

forking = multiprocessing.get_context("fork")


def do_stripe(
    index: TokenIndex, folder: Path, header: CacheHeader, worker: int, num_workers: int
) -> None:
    """What a worker does, in an order of its own."""
    stripe = list(index.parts[worker::num_workers])
    random.Random(worker).shuffle(stripe)
    for part in stripe:
        table = index.read_part(part)
        path = part_path(folder, part.name, header)
        write_part(path, table, targets_of(table, header.codec), header)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_the_merged_file_is_the_same_for_any_workers_and_order(
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
        order = list(index.parts * 2)
        random.Random(seed).shuffle(order)
        for part in order:
            table = index.read_part(part)
            path = part_path(folder, part.name, header)
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
    part_path(own_parts, index.parts[2].name, header).unlink()
    assert find_missing_parts(index, own_parts, header) == [(2, index.parts[2])]
    other = replace(header, teacher="another")
    assert len(find_missing_parts(index, own_parts, other)) == len(index.parts)


def test_one_error_names_every_missing_damaged_foreign_and_exchanged_part(
    index: TokenIndex, header: CacheHeader, own_parts: Path
) -> None:
    paths = [part_path(own_parts, part.name, header) for part in index.parts]
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
    with pytest.raises(ValueError, match="is intact, but its copy is not"):
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


def test_a_virtual_cache_has_as_many_parts_as_hdf5_can_name(tmp_path: Path) -> None:
    require_few_parts(MOST_VIRTUAL_PARTS)
    with pytest.raises(ValueError, match=r"2,701 parts, .* Set merge\.mode: copy"):
        require_few_parts(MOST_VIRTUAL_PARTS + 1)
    names = [(f"{'x' * 200}/{part}.h5", 0, 1) for part in range(MOST_VIRTUAL_PARTS)]
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_dataset("records", shape=(len(names),), dtype="u1", external=names)
        assert len(file["records"].external) == MOST_VIRTUAL_PARTS


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
    first, second = (part_path(own_parts, part.name, header) for part in index.parts[:2])
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

    def lower(table: SequenceTable) -> list[SparseTargets]:
        return [replace(t, tail_logprobs=t.tail_logprobs - 1) for t in targets_of(table)]

    assert digest_of(lower, header) != same
