"""The copy of a cache on a node's own disk: shared by jobs, checked, and never believed after a kill."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from retort.cache.local_copy import copy_cache
from retort.cache.merged import merge_parts
from retort.cache.reader import CacheHeader, LogitCache
from retort.tokens.index import TokenIndex

HOLDER = """
import sys, time
from pathlib import Path
from retort.cache.local_copy import copy_cache
from retort.cache.reader import LogitCache
with copy_cache(LogitCache(Path(sys.argv[1])), sys.argv[2]) as copy:
    print(copy.path, flush=True)
    time.sleep(600)
"""
Usage = namedtuple("Usage", "total used free")


def files(folder: Path) -> list[Path]:
    """The files that are large: no locks."""
    return [p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".users")]


def test_jobs_share_a_copy_which_the_last_one_removes(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    cache = LogitCache(merged)
    with copy_cache(cache, "$NODE_DISK/caches") as first:
        assert first.path.is_relative_to(tmp_path / "caches")
        assert first.path.read_bytes() == merged.read_bytes()
        written = first.path.stat()
        with copy_cache(cache, str(tmp_path / "caches")) as second:
            assert second.path.stat().st_ino == written.st_ino
        assert files(tmp_path) == [first.path], "the first still reads it"
        first.verify()
    assert not files(tmp_path) and merged.exists()


def test_a_killed_jobs_copy_is_used_once_more_and_then_removed(
    merged: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", HOLDER, str(merged), str(tmp_path)]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    left = Path(job.stdout.readline().strip())
    job.kill()
    job.wait()
    job.stdout.close()
    before = left.stat()
    with copy_cache(LogitCache(merged), str(tmp_path)) as copy:
        assert copy.path == left and left.stat().st_ino == before.st_ino
    assert not files(tmp_path)


@pytest.mark.parametrize("fault", ["cut", "changed", "another cache", "not renamed"])
def test_what_a_kill_or_a_fault_left_is_not_believed(
    fault: str, merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LogitCache(merged)
    with copy_cache(cache, str(tmp_path)) as copy:
        place = copy.path
    content = bytearray(merged.read_bytes())
    if fault == "cut":
        place.write_bytes(content[: len(content) // 2])
    elif fault == "changed":
        content[cache.byte_ranges["records"][0]] ^= 1
        place.write_bytes(content)
    elif fault == "another cache":
        shutil.copy2(next(iter(sorted((merged.parent / "parts").glob("*.h5")))), place)
    else:
        name = f".{place.name}.{os.uname().nodename}.999999999.tmp"
        place.with_name(name).write_bytes(content[:100])
    with copy_cache(cache, str(tmp_path)) as copy:
        assert copy.path.read_bytes() == merged.read_bytes()
        assert files(tmp_path) == [copy.path]
    assert ("is damaged: it is made again" in caplog.text) == (fault != "not renamed")


def test_a_damaged_cache_is_not_copied(merged: Path, tmp_path: Path) -> None:
    damaged = tmp_path / merged.name
    content = bytearray(merged.read_bytes())
    content[LogitCache(merged).byte_ranges["records"][0]] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"could not be copied intact: .*checksum"):
        copy_cache(LogitCache(damaged), str(tmp_path / "node")).__enter__()
    assert not files(tmp_path / "node")


def test_a_folder_that_cannot_hold_it_is_one_sentence(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LogitCache(merged)
    with pytest.raises(ValueError, match=r"'\$NO_SUCH/x', but there is no such environment"):
        copy_cache(cache, "$NO_SUCH/x").__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        copy_cache(cache, str(tmp_path / "file")).__enter__()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 9, 1000))
    with pytest.raises(ValueError, match=r"has 0\.0 MB free, but .* takes .* MB\. Name a larger"):
        copy_cache(cache, str(tmp_path / "full")).__enter__()
    assert not files(tmp_path / "full")


def test_a_virtual_cache_is_refused(
    index: TokenIndex, header: CacheHeader, parts: Path, tmp_path: Path
) -> None:
    merge_parts(index, parts, header, tmp_path / "virtual.h5", mode="virtual")
    with pytest.raises(ValueError, match="a virtual cache"):
        copy_cache(LogitCache(tmp_path / "virtual.h5"), str(tmp_path)).__enter__()
