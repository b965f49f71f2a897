"""Caches whose parts are objects in a store: merged from receipts alone, and read by ranges of bytes."""

import multiprocessing
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from retort.cache import stored
from retort.cache.kinds import PartKind
from retort.cache.local_copy import keep_blocks
from retort.cache.merged import merge_parts
from retort.cache.parts import adopt_part, find_missing_parts, part_path, store_part
from retort.cache.reader import CacheHeader, LogitCache, cache_digest
from retort.io.objects import list_sizes
from retort.tokens.index import TokenIndex
from support.store import BUCKET, Store

Damage = Callable[[str, Callable[[bytes], bytes | None]], None]
FOLDER = f"s3://{BUCKET}/cache/parts"


@pytest.fixture(scope="module")
def stored_header(header: CacheHeader) -> CacheHeader:
    return replace(header, store=FOLDER)


@pytest.fixture(scope="module")
def receipts(
    store: Store,
    index: TokenIndex,
    parts: Path,
    header: CacheHeader,
    stored_header: CacheHeader,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Receipts of all parts, which are in the store; only to be read, as the objects are."""
    folder = tmp_path_factory.mktemp("stored") / "parts"
    for part in index.parts:
        receipt = part_path(folder, part.name, stored_header)
        store_part(part_path(parts, part.name, header), receipt, FOLDER)
    return folder


@pytest.fixture(scope="module")
def path(index: TokenIndex, receipts: Path, stored_header: CacheHeader) -> Path:
    """The merged cache."""
    out = receipts.parent / "teacher_logits.h5"
    merge_parts(index, receipts, stored_header, out)
    return out


@pytest.fixture
def damaged(store: Store) -> Iterator[Damage]:
    """Change what an object holds, or remove it; after the test it is what it was."""
    files, before = store.open(), dict[str, bytes]()

    def damage(url: str, change: Callable[[bytes], bytes | None]) -> None:
        before[url] = files.cat_file(url)
        after = change(before[url])
        files.rm_file(url) if after is None else files.pipe_file(url, after)

    yield damage
    for url, content in before.items():
        files.pipe_file(url, content)


def count(store: Store, since: int, method: str = "GET") -> int:
    return Counter(request.method for request in store.requests()[since:])[method]


def records_of(cache: LogitCache) -> list[bytes]:
    return [cache.read_record(index) for index in range(len(cache))]


def test_it_is_the_cache_of_a_disk(path: Path, merged: Path, store: Store) -> None:
    cache, local = LogitCache(path), LogitCache(merged)
    assert cache_digest(cache) == cache_digest(local) and records_of(cache) == records_of(local)
    assert cache.record_bytes == local.record_bytes
    assert cache.is_virtual and not cache.needs_parts
    cache.verify()
    assert pickle.loads(pickle.dumps(cache)).read_record(3) == local.read_record(3)


def test_merging_reads_no_records(
    index: TokenIndex, receipts: Path, stored_header: CacheHeader, store: Store
) -> None:
    since = len(store.requests())
    merge_parts(index, receipts, stored_header, receipts.parent / "merged.h5")
    asked = store.requests()[since:]
    assert [request.path.partition("?")[0] for request in asked] == [f"/{BUCKET}"], "one list"


def test_merging_again_gives_the_same_bytes(
    path: Path, index: TokenIndex, receipts: Path, stored_header: CacheHeader
) -> None:
    again = path.with_name("again.h5")
    merge_parts(index, receipts, stored_header, again)
    assert again.read_bytes() == path.read_bytes()


def test_an_object_that_was_removed_is_noticed_before_the_merge(
    index: TokenIndex, receipts: Path, stored_header: CacheHeader, damaged: Damage, tmp_path: Path
) -> None:
    receipts = Path(shutil.copytree(receipts, tmp_path / "parts"))
    url = LogitCache(part_path(receipts, index.parts[1].name, stored_header)).stored[0].url
    damaged(url, lambda content: None)
    with pytest.raises(ValueError, match=f"1 of .* parts cannot be merged.*\n.*{url} is missing"):
        merge_parts(index, receipts, stored_header, receipts.parent / "merged.h5")
    assert find_missing_parts(index, receipts, stored_header) == [(1, index.parts[1])]


def test_records_of_a_batch_are_asked_for_at_once_and_held(path: Path, store: Store) -> None:
    cache = LogitCache(path)
    since = len(store.requests())
    cache.prefetch([0, 5, 9, 5])
    assert count(store, since) == 3
    held = [cache.read_record(index) for index in (0, 5, 9, 5)]
    assert count(store, since) == 3
    assert held == [LogitCache(path).read_record(index) for index in (0, 5, 9, 5)]


def test_what_is_kept_here_is_asked_for_once_and_removed_by_the_last_job(
    path: Path, merged: Path, store: Store, tmp_path: Path
) -> None:
    local = records_of(LogitCache(merged))
    with keep_blocks(LogitCache(path), str(tmp_path / "kept"), most_bytes=1 << 30) as cache:
        since = len(store.requests())
        assert records_of(cache) == local == records_of(pickle.loads(pickle.dumps(cache)))
        assert count(store, since) == len(cache.stored), "a block of each part"
        (place,) = (tmp_path / "kept").iterdir()
        assert len(list(place.glob("*.block"))) == len(cache.stored)
        assert not list(place.glob("*tmp*"))
    assert {file.name for file in place.iterdir()} <= {".lock", ".users"}


@pytest.mark.parametrize("block_bytes", [16, 100])
def test_no_more_is_kept_than_was_allowed_and_all_is_read(
    block_bytes: int,
    path: Path,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    local = LogitCache(merged)
    allowed = local.record_bytes // 2
    with keep_blocks(LogitCache(path), str(tmp_path / "kept"), most_bytes=allowed) as cache:
        cache.prefetch(range(0, len(cache), 3))
        assert records_of(cache) == records_of(local)
        (place,) = (tmp_path / "kept").iterdir()
        kept = sum(block.stat().st_size for block in place.glob("*.block"))
        assert allowed // 3 < kept <= allowed


@pytest.mark.parametrize("fault", ["changed", "cut", "removed"])
def test_a_block_that_is_damaged_here_is_read_from_the_store(
    fault: str, path: Path, merged: Path, tmp_path: Path
) -> None:
    with keep_blocks(LogitCache(path), str(tmp_path / "kept"), most_bytes=1 << 30) as cache:
        expected = records_of(cache)
        for block in (tmp_path / "kept").glob("*/*.block"):
            content = bytearray(block.read_bytes())
            content = content[:-1] if fault == "cut" else bytearray(len(content))
            block.write_bytes(content) if fault != "removed" else block.unlink()
        assert records_of(cache) == expected == records_of(LogitCache(merged))


def test_an_object_with_other_bytes_is_refused(path: Path, damaged: Damage) -> None:
    cache = LogitCache(path)
    url, offset, size = cache.stored[0]
    damaged(url, lambda whole: whole[:offset] + bytes(size) + whole[offset + size :])
    with pytest.raises(ValueError, match="record of sequence 0 does not match its checksum"):
        cache.read_targets(0)


def test_a_disk_that_is_full_keeps_nothing_and_all_is_read(
    path: Path,
    merged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with keep_blocks(LogitCache(path), str(tmp_path / "kept"), most_bytes=1 << 30) as cache:
        (place,) = (tmp_path / "kept").iterdir()
        monkeypatch.setattr(Path, "replace", _refuse)
        assert records_of(cache) == records_of(LogitCache(merged))
        assert "takes no more of the cache (No space left on device)" in caplog.text
        assert caplog.text.count("takes no more") == 1
        assert {file.name for file in place.iterdir()} <= {".lock", ".users"}


def _refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_forked_process_reads_too(path: Path, merged: Path) -> None:
    cache = LogitCache(path)
    first = cache.read_record(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(cache.read_record, (1,)) == LogitCache(merged).read_record(1)
    assert cache.read_record(0) == first


def test_parts_in_the_store_are_adopted_by_another_folder(
    receipts: Path, index: TokenIndex, stored_header: CacheHeader, tmp_path: Path
) -> None:
    names = list_sizes(FOLDER)
    for part in index.parts:
        receipt = part_path(tmp_path / "other", part.name, stored_header)
        assert adopt_part(receipt, FOLDER, names, like=[])
        assert receipt.read_bytes() == (receipts / receipt.name).read_bytes()
    assert {file.suffix for file in (tmp_path / "other").iterdir()} == {".h5"}


def test_no_part_is_adopted_that_is_damaged_or_of_another_kind(
    receipts: Path, index: TokenIndex, stored_header: CacheHeader, damaged: Damage, tmp_path: Path
) -> None:
    names, part = list_sizes(FOLDER), index.parts[0]
    receipt = part_path(tmp_path / "other", part.name, stored_header)
    other = PartKind("H100", "bfloat16", "2.9", "4.57")
    assert not adopt_part(receipt, FOLDER, names, like=[other])
    url = LogitCache(receipts / receipt.name).stored[0].url
    damaged(url, lambda content: content[:-1])
    assert not adopt_part(receipt, FOLDER, names, like=[])
    assert not adopt_part(receipt, FOLDER, [], like=[])
    assert not receipt.exists()
