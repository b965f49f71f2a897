"""Snapshots: killed anywhere, they end with the bytes of an uninterrupted one; one process at a time; flat memory."""

import gzip
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import filelock
import pytest

from retort.config.sections import Dataset
from retort.corpus.demo_text import PACKAGES
from retort.corpus.documents import Counts, make_document
from retort.corpus.snapshot import CorpusRecord, read_snapshot, write_snapshot
from support.corpora import (
    DEFAULTS,
    contents,
    make_stream,
    read_all,
    read_shards,
    write_numbered,
)
from support.jobs import config_words
from support.sections import replace

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "workflow" / "scripts" / "draw_corpus.py"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_snapshot_contains_what_reading_the_stream_gives(
    numbered: Dataset, tmp_path: Path, shuffle: bool
) -> None:
    stream = replace(
        numbered,
        streaming=True,
        max_samples=120,
        shuffle=shuffle,
        streaming_buffer_size=20,
        num_shards=3,
    )
    summary = write_snapshot(stream, tmp_path)
    shards, counts = read_shards(stream, 3)
    found_counts = Counts()
    found = [list(read_snapshot(tmp_path, shard=s, counts=found_counts)) for s in range(3)]
    assert found == shards
    assert found_counts == counts == summary.counts
    if not shuffle:
        assert found == read_shards(replace(stream, streaming=False), 3)[0]
    else:
        texts = [d.text for shard in found for d in shard]
        assert len(set(texts)) == len(texts)
        rows = [int(d.text.split()[1]) for d in sorted(chain(*found), key=lambda d: d.index)]
        assert rows != sorted(rows)


def test_two_snapshots_have_the_same_bytes_and_no_other_files(
    numbered: Dataset, tmp_path: Path
) -> None:
    stream = replace(numbered, streaming=True, max_samples=50, num_shards=2)
    for name in ("one", "two"):
        write_snapshot(stream, tmp_path / name)
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    }
    made = [files[name].pop("run.json") for name in files]
    assert all(b'"num_shards": 2' in content for content in made)
    assert files["one"] == files["two"]
    header = files["one"]["documents_00000.jsonl.gz"][:8]
    assert header[3:] == bytes(5)  # no flag (such as a file's name), no time
    assert sorted(name for name in files["one"] if not name.startswith(".draw_")) == [
        "corpus.json",
        "documents_00000.jsonl.gz",
        "documents_00001.jsonl.gz",
    ]


def test_a_failed_snapshot_leaves_no_record(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 20 + "broken\n")
    stream = replace(DEFAULTS, name="json", data_files=str(path), streaming=True, max_samples=100)
    with pytest.raises(ValueError, match="line 21 is not JSON"):
        write_snapshot(stream, tmp_path / "snapshot")
    assert not (tmp_path / "snapshot" / "corpus.json").exists()
    path.write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="no usable document: 1 read, 1 empty skipped"):
        write_snapshot(stream, tmp_path / "snapshot")


def test_a_truncated_snapshot_is_refused(numbered: Dataset, tmp_path: Path) -> None:
    write_snapshot(replace(numbered, streaming=True, max_samples=90, num_shards=1), tmp_path)
    path = tmp_path / "documents_00000.jsonl.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: content.rindex(b"\n", 0, -1) + 1], mtime=0))
    with pytest.raises(ValueError, match=r"contains 80 documents, but its record says 81"):
        list(read_snapshot(tmp_path, shard=0, counts=Counts()))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        list(read_snapshot(tmp_path, shard=0, counts=Counts()))
    with pytest.raises(ValueError, match="does not describe shard 1 of a corpus"):
        list(read_snapshot(tmp_path, shard=1, counts=Counts()))


def test_a_snapshot_of_the_demo_records_the_versions_of_its_packages(tmp_path: Path) -> None:
    dataset = replace(DEFAULTS, max_samples=40, num_shards=2, validation_fraction=0.2)
    summary = write_snapshot(dataset, tmp_path)
    assert set(summary.packages) == set(PACKAGES)
    assert summary.counts.read == summary.counts.used == 40
    documents = [d for s in range(2) for d in read_snapshot(tmp_path, shard=s, counts=Counts())]
    assert sorted(documents, key=lambda d: d.index) == read_all(dataset)
    assert summary.bytes == sum(len(d.text.encode()) for d in documents)


@pytest.mark.parametrize("keys", [{}, {"shuffle": True, "streaming_buffer_size": 7}])
def test_a_snapshot_that_fails_anywhere_is_resumed_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    stream = make_stream(tmp_path / "data", files=3, rows=40, **keys)
    write_snapshot(stream, tmp_path / "whole", step_documents=10)
    rng = random.Random(0)
    read: list[int] = []

    def fail_sometimes(*args: Any, index: int, **options: Any) -> Any:
        read.append(index)
        if rng.random() < 0.04:
            raise InterruptedError
        return make_document(*args, index=index, **options)

    monkeypatch.setattr("retort.corpus.reading.make_document", fail_sometimes)
    attempt = 0
    while not (tmp_path / "resumed" / "corpus.json").exists():
        try:
            write_snapshot(stream, tmp_path / "resumed", step_documents=10)
        except InterruptedError:  # as after a kill, a file may be longer than its record says
            attempt += 1
            with gzip.open(tmp_path / "resumed" / "documents_00001.jsonl.gz", "ab") as file:
                file.write(b"torn")
    assert attempt >= 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert len(read) - 120 <= attempt * 14  # each time, at most one step is read again


def snapshot_command(stream: Dataset, folder: Path) -> list[str]:
    flags = config_words("corpus", dataset=stream)
    return [sys.executable, str(SCRIPT), "--output", str(folder / "corpus.json"), *flags]


@pytest.mark.parametrize("edit", ["[]", "null", "{", "row", "size"])
def test_an_invalid_or_edited_progress_record_is_not_used(edit: str, tmp_path: Path) -> None:
    stream, folder = make_stream(tmp_path / "data", files=2, rows=20, num_shards=11), tmp_path / "d"
    write_snapshot(stream, folder, step_documents=10)
    expected, record = contents(folder), folder / ".draw_00000.json"
    text = record.read_text()
    whole = json.loads(text)
    if edit == "row":
        text = json.dumps(whole | {"is_complete": False, "cursor": whole["cursor"] | {"row": 5}})
    elif edit == "size":
        text = json.dumps(whole | {"sizes": whole["sizes"] | {"0": 7}})
    else:
        text = edit
    record.write_text(text)
    write_snapshot(stream, folder, step_documents=10)
    assert contents(folder) == expected
    assert json.loads(record.read_text()) == whole


@pytest.mark.slow
def test_a_snapshot_killed_ten_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "data", files=4, rows=10_000)
    write_snapshot(stream, tmp_path / "whole")
    folder = tmp_path / "killed"
    rng = random.Random(1)
    record = folder / ".draw_00000.json"
    kills, cursors = 0, []
    while kills < 10:
        process = subprocess.Popen(snapshot_command(stream, folder), stderr=subprocess.DEVNULL)
        before = record.read_bytes() if record.exists() else b""
        while process.poll() is None and (not record.exists() or record.read_bytes() == before):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        cursor = json.loads(record.read_text())["cursor"]
        cursors.append((cursor["file"], cursor["row"]))
    assert kills == 10, kills
    assert cursors == sorted(set(cursors)), cursors  # each run got further
    subprocess.run(snapshot_command(stream, folder), check=True, stderr=subprocess.DEVNULL)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_snapshot_waits_for_another_process_and_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = make_stream(tmp_path / "data", files=1, rows=30)
    folder = tmp_path / "snapshot"
    expected = write_snapshot(stream, folder)
    (folder / "corpus.json").unlink()
    monkeypatch.setattr("retort.corpus.snapshot._read_corpus", None)  # reading again would fail
    found: list[CorpusRecord] = []
    with filelock.FileLock(folder / ".draw_00000.lock"):
        second = threading.Thread(
            target=lambda: found.append(write_snapshot(stream, folder, lock_notice_s=0.05))
        )
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join()
    assert found == [expected]
    assert f"another process is writing {folder}: waiting for it" in caplog.text


def test_another_corpus_in_the_same_folder_starts_from_the_beginning(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "data", files=2, rows=30)
    for seed in (1, 2):
        write_snapshot(replace(stream, seed=seed, validation_fraction=0.5), tmp_path / "one")
    write_snapshot(replace(stream, seed=2, validation_fraction=0.5), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_each_reader_reads_its_own_files_and_all_readers_everything_once(tmp_path: Path) -> None:
    stream = make_stream(
        tmp_path / "data", files=5, rows=10, sharding="files", num_shards=2, max_samples=60
    )
    folder = tmp_path / "snapshot"
    found = []
    for reader in range(2):
        summary = write_snapshot(stream, folder, reader=reader)
        assert summary.assignment is not None and summary.assignment.number == (3, 2)[reader]
        found.append(list(read_snapshot(folder, shard=reader, counts=Counts())))
        assert {int(d.text.split()[1]) % 2 for d in found[-1]} == {reader}
    assert sorted(d.index for d in found[0]) == list(range(0, 60, 2))
    assert sorted(d.index for d in found[1]) == list(range(1, 40, 2))
    assert found == read_shards(replace(stream, streaming=False), 2)[0]
    with pytest.raises(ValueError, match="--reader is 2, but this corpus has 2"):
        write_snapshot(stream, folder, reader=2)


_PEAK = """
import re, sys
from pathlib import Path
from support.sections import replace
from retort.corpus.snapshot import write_snapshot
from support.corpora import DEFAULTS
folder, size, shuffle = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
write_snapshot(replace(DEFAULTS, name="json", data_files=str(folder / "*.jsonl"), streaming=True, shuffle=shuffle,
    streaming_buffer_size=1000, max_samples=size), folder / f"snapshot_{size}_{shuffle}")
# Not ru_maxrss, which a child inherits from its parent.
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def long_stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("long")
    make_stream(folder, files=4, rows=5_000)
    yield folder


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
def test_ten_times_the_samples_take_no_more_memory(long_stream: Path, shuffle: bool) -> None:
    peaks = []
    for size in (2000, 20_000):
        command = [sys.executable, "-c", _PEAK, str(long_stream), str(size), str(shuffle)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=REPOSITORY / "tests"
        )
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    print(f"peak RSS, MB: {peaks}")
    assert peaks[1] - peaks[0] < 20, peaks
