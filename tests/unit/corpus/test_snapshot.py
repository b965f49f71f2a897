"""Draws: killed anywhere they end with the bytes of an undisturbed one; one at a time; memory stays flat."""

import gzip
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retort.corpus.snapshot
from retort.config.flags import section_flags
from retort.config.sections import Dataset
from retort.corpus.documents import Counts
from retort.corpus.reading import Reading
from retort.corpus.snapshot import draw_corpus, read_drawn
from unit.corpus.test_reading import DEFAULTS, read_shards, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "workflow" / "scripts" / "draw_corpus.py"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a drawn corpus; the record of its progress names the source's times, and is no part of it."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def make_stream(folder: Path, *, files: int, rows: int, **keys: Any) -> Dataset:
    folder.mkdir(exist_ok=True)
    for file in range(files):
        texts = [{"text": f"file {file} row {row} " + "word " * 20} for row in range(rows)]
        write_jsonl(folder / f"part-{file}.jsonl", texts)
    every = {"name": "json", "data_files": str(folder / "*.jsonl"), "streaming": True}
    return replace(DEFAULTS, **every | {"max_samples": files * rows, "num_shards": 3} | keys)


@settings(max_examples=40)
@given(
    shuffle=st.booleans(),
    window=st.integers(1, 30),
    max_samples=st.integers(1, 70),
    stop=st.integers(1, 70),
    shard=st.none() | st.integers(0, 1),
)
def test_a_reading_goes_on_from_any_window_with_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory,
    shuffle: bool,
    window: int,
    max_samples: int,
    stop: int,
    shard: int | None,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "readings"
    stream = make_stream(folder, files=4, rows=15, num_shards=2, max_samples=max_samples)
    stream = replace(stream, shuffle=shuffle, streaming_buffer_size=window)
    stream = stream if shard is None else replace(stream, sharding="files")
    whole = [(index, row()) for index, _, row in Reading(stream, shard=shard)]
    first = Reading(stream, shard=shard)
    seen = []
    for index, _, row in first:
        seen.append((index, row()))
        if len(seen) >= stop and first.place.documents % first.window == 0:
            break
    rest = Reading(stream, shard=shard, place=first.place)
    assert seen + [(index, row()) for index, _, row in rest] == whole
    longer = replace(stream, max_samples=max_samples + 20)
    assert [(i, row()) for i, _, row in Reading(longer, shard=shard)][: len(whole)] == whole


@pytest.mark.parametrize("keys", [{}, {"shuffle": True, "streaming_buffer_size": 7}])
def test_a_draw_that_fails_anywhere_is_gone_on_with_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    monkeypatch.setattr(retort.corpus.snapshot, "_STEP_DOCUMENTS", 10)
    monkeypatch.setattr(retort.corpus.snapshot, "_STEP_DOCUMENTS_PER_SHARD", 1)
    stream = make_stream(tmp_path / "data", files=3, rows=40, **keys)
    draw_corpus(stream, tmp_path / "undisturbed")
    chance = random.Random(0)
    read: list[int] = []
    make = retort.corpus.snapshot.make_document

    def fail_sometimes(*args: Any, index: int, **options: Any) -> Any:
        read.append(index)
        if chance.random() < 0.04:
            raise InterruptedError
        return make(*args, index=index, **options)

    monkeypatch.setattr(retort.corpus.snapshot, "make_document", fail_sometimes)
    attempt = 0
    while not (tmp_path / "disturbed" / "corpus.json").exists():
        try:
            draw_corpus(stream, tmp_path / "disturbed")
        except InterruptedError:  # files may hold more than the record says, as after a kill
            attempt += 1
            with gzip.open(tmp_path / "disturbed" / "documents_00001.jsonl.gz", "ab") as file:
                file.write(b"torn")
    assert attempt >= 2
    assert contents(tmp_path / "disturbed") == contents(tmp_path / "undisturbed")
    assert len(read) - 120 <= attempt * 14  # a step at most is read again each time


def draw_command(stream: Dataset, folder: Path) -> list[str]:
    flags = section_flags(stream)
    return [sys.executable, str(SCRIPT), "--output", str(folder / "corpus.json"), *flags]


@pytest.mark.parametrize("edit", ["[]", "null", "{", "row", "size"])
def test_a_record_that_is_not_ours_or_was_edited_is_not_believed(
    edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retort.corpus.snapshot, "_STEP_DOCUMENTS", 10)
    monkeypatch.setattr(retort.corpus.snapshot, "_STEP_DOCUMENTS_PER_SHARD", 1)
    stream, folder = make_stream(tmp_path / "data", files=2, rows=20, num_shards=11), tmp_path / "d"
    draw_corpus(stream, folder)
    expected, record = contents(folder), folder / ".draw_00000.json"
    text = record.read_text()
    whole = json.loads(text)
    if edit == "row":
        text = json.dumps(whole | {"is_complete": False, "place": whole["place"] | {"row": 5}})
    elif edit == "size":
        text = json.dumps(whole | {"sizes": whole["sizes"] | {"0": 7}})
    else:
        text = edit
    record.write_text(text)
    draw_corpus(stream, folder)
    assert contents(folder) == expected
    assert json.loads(record.read_text()) == whole, (
        "and one of eleven shards is believed as written"
    )


@pytest.mark.slow
def test_a_draw_killed_ten_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "data", files=4, rows=10_000)
    draw_corpus(stream, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    chance = random.Random(1)
    record = folder / ".draw_00000.json"
    kills, places = 0, []
    while kills < 10:
        process = subprocess.Popen(draw_command(stream, folder), stderr=subprocess.DEVNULL)
        before = record.read_bytes() if record.exists() else b""
        while process.poll() is None and (not record.exists() or record.read_bytes() == before):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        place = json.loads(record.read_text())["place"]
        places.append((place["file"], place["row"]))
    assert kills == 10, kills
    assert places == sorted(set(places)), places  # each draw got further
    subprocess.run(draw_command(stream, folder), check=True, stderr=subprocess.DEVNULL)
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_a_draw_waits_for_another_and_finds_its_work_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retort.corpus.snapshot, "_PATIENCE_S", 0.05)
    stream = make_stream(tmp_path / "data", files=1, rows=30)
    folder = tmp_path / "drawn"
    expected = draw_corpus(stream, folder)
    (folder / "corpus.json").unlink()
    monkeypatch.setattr(retort.corpus.snapshot, "_draw", None)  # to draw again would fail
    found = []
    with filelock.FileLock(folder / ".draw_00000.lock"):
        second = threading.Thread(target=lambda: found.append(draw_corpus(stream, folder)))
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join()
    assert found == [expected]
    assert "is being drawn by another process: waiting" in caplog.text


def test_another_corpus_in_the_folder_is_drawn_from_the_beginning(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "data", files=2, rows=30)
    for seed in (1, 2):
        draw_corpus(replace(stream, seed=seed, validation_fraction=0.5), tmp_path / "one")
    draw_corpus(replace(stream, seed=2, validation_fraction=0.5), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_reader_draws_its_files_alone_and_all_readers_everything_once(tmp_path: Path) -> None:
    stream = make_stream(
        tmp_path / "data", files=5, rows=10, sharding="files", num_shards=2, max_samples=60
    )
    drawn = []
    for reader in range(2):
        summary = draw_corpus(stream, tmp_path / "drawn", reader=reader)
        assert summary["dealt"]["number"] == (3, 2)[reader]
        drawn.append(list(read_drawn(tmp_path / "drawn", shard=reader, counts=Counts())))
        assert {int(d.text.split()[1]) % 2 for d in drawn[-1]} == {reader}
    assert sorted(d.index for d in drawn[0]) == list(range(0, 60, 2))
    assert sorted(d.index for d in drawn[1]) == list(range(1, 40, 2))
    assert drawn == read_shards(replace(stream, streaming=False), 2)[0]
    with pytest.raises(ValueError, match="--reader is 2, but this corpus has 2"):
        draw_corpus(stream, tmp_path / "drawn", reader=2)


_PEAK = """
import re, sys
from pathlib import Path
from retort.config.sections import Dataset
from retort.corpus.snapshot import draw_corpus
from unit.corpus.test_snapshot import DEFAULTS, replace
folder, size, shuffle = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
draw_corpus(replace(DEFAULTS, name="json", data_files=str(folder / "*.jsonl"), streaming=True, shuffle=shuffle,
    streaming_buffer_size=1000, max_samples=size), folder / f"drawn_{size}_{shuffle}")
# Not ru_maxrss: a child inherits that of the process that started it.
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
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
        )
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    print(f"peak RSS, MB: {peaks}")
    assert peaks[1] - peaks[0] < 20, peaks
