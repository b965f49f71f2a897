"""A real client and server: streams are read like files; connection errors are retried, refusals explained."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from retort.corpus import hub
from retort.corpus.hub import explain_hub_error, read_with_retries, without_retries
from retort.corpus.snapshot import write_snapshot
from support.corpora import DEFAULTS, contents, write_jsonl
from support.hub import NAME, SHA, Fault, Hub, serve
from support.jobs import config_words
from support.sections import replace
from support.tiny import tiny_dataset, tokenize

SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"
FILES, ROWS = 4, 400
# The script and client of users, but with short waits and small steps.
_RUN_SCRIPT = f"""
import functools, runpy
from retort.corpus import hub, snapshot
hub.FIRST_WAIT_S, hub.MAX_WAIT_S, hub.MAX_RETRY_AFTER_S = 0.02, 0.1, 0.3
snapshot.write_snapshot = functools.partial(
    snapshot.write_snapshot, step_documents=100, progress_interval_s=1e9
)
runpy.run_path({str(SCRIPTS / "draw_corpus.py")!r}, run_name="__main__")
"""


@dataclass
class Finished:
    folder: Path
    returncode: int
    log: str


def make_files(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for file in range(FILES):
        rows = [{"text": f"file {file} row {row} " + "word " * 20} for row in range(ROWS)]
        if kind == "jsonl":
            write_jsonl(folder / f"part-{file}.jsonl", rows)
        else:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(rows)
            path = folder / f"part-{file}.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=150)
    return folder


STREAM = replace(DEFAULTS, streaming=True, max_samples=FILES * ROWS, num_shards=2)


def run_script(hub: Hub, folder: Path, *, reader: int = 0, **keys: Any) -> Finished:
    """Run draw_corpus.py on a stream of the server."""
    flags = config_words("corpus", dataset=replace(STREAM, name=NAME, **keys))
    words = ["--output", str(folder / "corpus.json"), "--reader", str(reader), *flags]
    environment = os.environ | hub.environment | {"HF_HOME": str(folder.parent / "home")}
    done = subprocess.run(
        [sys.executable, "-c", _RUN_SCRIPT, *words], capture_output=True, text=True, env=environment
    )
    return Finished(folder, done.returncode, done.stderr)


def texts(folder: Path) -> dict[str, bytes]:
    """The bytes of a snapshot's documents, without the record, which names the source."""
    return {name: data for name, data in contents(folder).items() if name.startswith("documents")}


def write_local(source: Path, folder: Path, kind: str, *, reader: int = 0, **keys: Any) -> Path:
    """Write the snapshot of local files."""
    loader = "json" if kind == "jsonl" else "parquet"
    dataset = replace(STREAM, name=loader, data_files=str(source / "*"), **keys)
    write_snapshot(dataset, folder, reader=reader, step_documents=100)
    return folder


def cut_and_stall(name: str, number: int) -> Any:
    """Cut two files, stall one of them, refuse the other for a while; the first two requests are for the columns."""
    if name.startswith("part-1"):
        return [("cut", 2000), "stall", None][min(number - 1, 2)]
    if name.startswith("part-2"):
        return [503, 429, ("cut", 5), None][min(number - 1, 3)]
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shuffle", "fault"),
    [
        ("jsonl", False, cut_and_stall),
        ("jsonl", True, lambda *_: None),
        ("parquet", True, cut_and_stall),
        ("parquet", False, lambda *_: None),
    ],
)
def test_a_stream_gives_the_snapshot_of_its_files_despite_connection_errors(
    tmp_path: Path, kind: str, shuffle: bool, fault: Fault
) -> None:
    source = make_files(tmp_path / "data", kind)
    keys = {"shuffle": shuffle, "streaming_buffer_size": 150}
    local = write_local(source, tmp_path / "local", kind, **keys)
    with serve(source, fault, retry_after="1") as hub:
        done = run_script(hub, tmp_path / "snapshot", **keys)
    assert done.returncode == 0, done.log
    assert texts(done.folder) == texts(local)
    assert json.loads((done.folder / "corpus.json").read_text())["revision"] == SHA
    if fault is cut_and_stall:
        assert done.log.count("connection lost at row") >= 5, done.log
        assert "Timeout" in done.log and "retrying in" in done.log
        assert "1 of 6" in done.log and "Retrying" not in done.log
    else:
        assert done.log == ""


@pytest.mark.slow
def test_a_stream_that_never_recovers_ends_in_one_sentence_and_is_resumed(tmp_path: Path) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    local = write_local(source, tmp_path / "local", "jsonl")
    with serve(source, lambda name, _: ("cut", 9) if name.startswith("part-2") else None) as hub:
        done = run_script(hub, tmp_path / "snapshot")
    assert done.returncode == 1
    last = done.log.splitlines()[-1]
    assert last.startswith(f"error: dataset.name '{NAME}' could not be reached: check the network")
    assert "what was read is kept" in last and "6 of 6" in done.log and "7 of" not in done.log
    assert json.loads((done.folder / ".draw_00000.json").read_text())["cursor"]["documents"] == 800
    with serve(source) as hub:
        done = run_script(hub, tmp_path / "snapshot")
    assert done.log == "resuming after document 800\n"
    assert texts(done.folder) == texts(local)
    assert hub.requests["part-1.jsonl"] <= 1 and hub.requests["part-0.jsonl"] <= 1  # its columns


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_dataset_is_not_retried_and_says_what_to_run(tmp_path: Path, status: int) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    with serve(source, lambda *_: status) as hub:
        done = run_script(hub, tmp_path / "snapshot")
    assert done.returncode == 1
    assert "is gated or private" in done.log and "run `hf auth login`" in done.log
    assert "retrying" not in done.log and len(done.log.splitlines()) == 1
    assert hub.requests.total() == 1


@pytest.mark.slow
def test_a_reader_opens_only_its_own_files(tmp_path: Path) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    with serve(source) as hub:
        done = run_script(hub, tmp_path / "snapshot", reader=1, sharding="files")
    assert done.returncode == 0, done.log
    # Every reader reads the columns of the first file.
    assert hub.requests == {"part-0.jsonl": 1, "part-1.jsonl": 1, "part-3.jsonl": 1}
    local = write_local(source, tmp_path / "local", "jsonl", reader=1, sharding="files")
    assert texts(done.folder) == texts(local)


@pytest.mark.slow
def test_more_shards_than_files_are_refused_with_both_numbers(tmp_path: Path) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    with serve(source) as hub:
        done = run_script(hub, tmp_path / "snapshot", sharding="files", num_shards=9)
    assert "dataset.num_shards is 9, but the source has 4 files" in done.log
    assert "Set dataset.num_shards: 4 or less" in done.log


def test_a_dataset_that_is_not_streamed_gives_the_tokens_of_its_files_without_pytorch(
    tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_corpus, tmp_path / "data" / "train.jsonl")
    dataset = replace(tiny_dataset(tiny_corpus), name=NAME, data_files=None, num_proc=2)
    out = tmp_path / "shard.h5"
    dataset = replace(dataset, tokenizer=str(tiny_teacher))
    words = ["--shard", "1", "--output", str(out), *config_words("tokens", dataset=dataset)]
    script = [sys.executable, "-X", "importtime", str(SCRIPTS / "tokenize_shard.py")]
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with serve(tmp_path / "data") as hub:
        done = subprocess.run(
            [*script, *words],
            capture_output=True,
            text=True,
            env=os.environ | hub.environment | own,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert {"transformers", "datasets"} <= loaded and "torch" not in loaded
    tokenize(tmp_path / "local", tiny_corpus, tiny_teacher)
    assert out.read_bytes() == (tmp_path / "local" / "shard_1.h5").read_bytes()


def test_hub_errors_say_whether_the_network_the_login_or_the_name_is_wrong() -> None:
    from datasets.exceptions import DatasetNotFoundError

    dataset = replace(DEFAULTS, name="some/aggregated")

    def said(error: Exception) -> str:
        return str(explain_hub_error(dataset, error))

    assert "could not be reached: check the network" in said(ConnectionError("Couldn't reach it"))
    assert "was not found, neither on the Hub" in said(
        DatasetNotFoundError("'some/aggregated' not found")
    )
    gated = said(DatasetNotFoundError("Dataset 'x' is a gated dataset. You must be authenticated"))
    assert "run `hf auth login`" in gated
    assert "https://huggingface.co/datasets/some/aggregated" in gated
    wrong = said(ValueError('Unknown split "x". Should be one of ["train"].'))
    assert "check dataset.config_name, split" in wrong
    assert 'Unknown split "x"' in wrong


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "from support.sections import replace; from support.corpora import DEFAULTS, refusal\n"
        "print(refusal(replace(DEFAULTS, name='nobody/no-such-dataset')))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    tests = SCRIPTS.parents[1] / "tests"
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=tests
    ).stdout
    assert printed.startswith("dataset.name 'nobody/no-such-dataset' could not be reached: check")


def test_one_thread_gives_up_while_another_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "FIRST_WAIT_S", 0.01)
    dataset = tiny_dataset(tmp_path / "corpus.jsonl")
    is_inside, both_failing = threading.Event(), threading.Barrier(2)

    def read_once_broken() -> list[int]:
        attempts = []

        def open_at(row: int) -> Iterator[int]:
            attempts.append(row)
            if len(attempts) == 1:
                both_failing.wait(30)
                raise ConnectionError("reset by peer")
            yield from range(row, 3)

        return list(read_with_retries(open_at, 0, dataset, where="a file"))

    def read_without_retries() -> list[int]:
        with without_retries():
            is_inside.set()
            return read_once_broken()

    def read_patiently() -> list[int]:
        assert is_inside.wait(30)
        return read_once_broken()

    with ThreadPoolExecutor(2) as threads:
        patient, hasty = threads.submit(read_patiently), threads.submit(read_without_retries)
        assert patient.result(60) == [0, 1, 2]
        with pytest.raises(ValueError, match="could not be reached"):
            hasty.result(60)
    assert hub._max_retries.get() == 6
