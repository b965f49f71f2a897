"""A real client against a real server: streams are read like files; drops and stalls are survived, refusals said."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from retort.config.flags import section_flags
from retort.corpus.snapshot import draw_corpus, replace
from support.hub import NAME, SHA, Fault, Hub, serve
from support.tiny import tiny_dataset, tokenize
from unit.corpus.test_reading import DEFAULTS, write_jsonl
from unit.corpus.test_snapshot import contents

SCRIPTS = Path(__file__).resolve().parents[3] / "workflow" / "scripts"
FILES, ROWS = 4, 400
# The script itself, with short waits and small steps; the client is what users have.
_DRAW = f"""
import sys, runpy, retort.corpus.snapshot
from retort.corpus import hub
hub.FIRST_WAIT_S, hub.LONGEST_WAIT_S, hub.LONGEST_WAIT_ASKED_S = 0.02, 0.1, 0.3
retort.corpus.snapshot._STEP_DOCUMENTS, retort.corpus.snapshot._STEP_DOCUMENTS_PER_SHARD = 100, 1
runpy.run_path({str(SCRIPTS / "draw_corpus.py")!r}, run_name="__main__")
"""


@dataclass
class Drawn:
    folder: Path
    returncode: int
    said: str


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


def draw(hub: Hub, folder: Path, *, reader: int = 0, **keys: Any) -> Drawn:
    flags = section_flags(replace(STREAM, name=NAME, **keys))
    words = ["--output", str(folder / "corpus.json"), "--reader", str(reader), *flags]
    environment = os.environ | hub.environment | {"HF_HOME": str(folder.parent / "home")}
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, *words], capture_output=True, text=True, env=environment
    )
    return Drawn(folder, done.returncode, done.stderr)


def texts(folder: Path) -> dict[str, bytes]:
    """The drawn documents' bytes, without the record, which names the source."""
    return {name: data for name, data in contents(folder).items() if name.startswith("documents")}


def draw_locally(source: Path, folder: Path, kind: str, monkeypatch: Any, **keys: Any) -> Path:
    monkeypatch.setattr("retort.corpus.snapshot._STEP_DOCUMENTS", 100)
    monkeypatch.setattr("retort.corpus.snapshot._STEP_DOCUMENTS_PER_SHARD", 1)
    loader = "json" if kind == "jsonl" else "parquet"
    dataset = replace(STREAM, name=loader, data_files=str(source / "*"), **keys)
    draw_corpus(dataset, folder)
    return folder


def cut_and_stall(name: str, number: int) -> Any:
    """Every file is cut once, one stalls, one is refused for a while; the first two requests are for the columns."""
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
def test_a_stream_is_drawn_like_files_whatever_happens_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shuffle: bool, fault: Fault
) -> None:
    source = make_files(tmp_path / "data", kind)
    keys = {"shuffle": shuffle, "streaming_buffer_size": 150}
    local = draw_locally(source, tmp_path / "local", kind, monkeypatch, **keys)
    with serve(source, fault, retry_after="1") as hub:
        drawn = draw(hub, tmp_path / "drawn", **keys)
    assert drawn.returncode == 0, drawn.said
    assert texts(drawn.folder) == texts(local)
    assert json.loads((drawn.folder / "corpus.json").read_text())["revision"] == SHA
    if fault is cut_and_stall:
        assert drawn.said.count("the stream dropped at row") >= 5, drawn.said
        assert "Timeout" in drawn.said and "trying again in" in drawn.said
        assert "1 of 6" in drawn.said and "Retrying" not in drawn.said
    else:
        assert drawn.said == ""


@pytest.mark.slow
def test_a_stream_that_never_recovers_ends_in_one_sentence_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    local = draw_locally(source, tmp_path / "local", "jsonl", monkeypatch)
    with serve(source, lambda name, _: ("cut", 9) if name.startswith("part-2") else None) as hub:
        drawn = draw(hub, tmp_path / "drawn")
    assert drawn.returncode == 1
    last = drawn.said.splitlines()[-1]
    assert last.startswith(f"error: dataset.name '{NAME}' could not be reached: check the network")
    assert "what was drawn is kept" in last and "6 of 6" in drawn.said and "7 of" not in drawn.said
    assert json.loads((drawn.folder / ".draw_00000.json").read_text())["place"]["documents"] == 800
    with serve(source) as hub:
        drawn = draw(hub, tmp_path / "drawn")
    assert drawn.said == "going on after document 800, where the last draw ended\n"
    assert texts(drawn.folder) == texts(local)
    assert hub.requests["part-1.jsonl"] <= 1 and hub.requests["part-0.jsonl"] <= 1  # its columns


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_dataset_is_not_tried_again_and_says_what_to_type(
    tmp_path: Path, status: int
) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    with serve(source, lambda *_: status) as hub:
        drawn = draw(hub, tmp_path / "drawn")
    assert drawn.returncode == 1
    assert "is gated or private" in drawn.said and "type `hf auth login`" in drawn.said
    assert "trying again" not in drawn.said and len(drawn.said.splitlines()) == 1
    assert hub.requests.total() == 1


@pytest.mark.slow
def test_a_reader_opens_its_own_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    with serve(source) as hub:
        drawn = draw(hub, tmp_path / "drawn", reader=1, sharding="files")
    assert drawn.returncode == 0, drawn.said
    # Of the first file the columns are read, by every reader.
    assert hub.requests == {"part-0.jsonl": 1, "part-1.jsonl": 1, "part-3.jsonl": 1}
    monkeypatch.setattr("retort.corpus.snapshot._STEP_DOCUMENTS", 100)
    monkeypatch.setattr("retort.corpus.snapshot._STEP_DOCUMENTS_PER_SHARD", 1)
    dataset = replace(STREAM, name="json", data_files=str(source / "*"), sharding="files")
    draw_corpus(dataset, tmp_path / "local", reader=1)
    assert texts(drawn.folder) == texts(tmp_path / "local")


@pytest.mark.slow
def test_more_shards_than_files_are_refused_with_both_numbers(tmp_path: Path) -> None:
    source = make_files(tmp_path / "data", "jsonl")
    with serve(source) as hub:
        drawn = draw(hub, tmp_path / "drawn", sharding="files", num_shards=9)
    assert "dataset.num_shards is 9, but the source has 4 files" in drawn.said
    assert "Set dataset.num_shards: 4 or less" in drawn.said


def test_a_dataset_that_is_not_streamed_becomes_the_tokens_of_its_files_without_pytorch(
    tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_corpus, tmp_path / "data" / "train.jsonl")
    dataset = replace(tiny_dataset(tiny_corpus), name=NAME, data_files=None, num_proc=2)
    out = tmp_path / "shard.h5"
    words = ["--shard", "1", "--tokenizer", str(tiny_teacher), "--output", str(out)]
    script = [sys.executable, "-X", "importtime", str(SCRIPTS / "tokenize_shard.py")]
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with serve(tmp_path / "data") as hub:
        done = subprocess.run(
            [*script, *words, *section_flags(dataset)],
            capture_output=True,
            text=True,
            env=os.environ | hub.environment | own,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert {"transformers", "datasets"} <= loaded and "torch" not in loaded
    tokenize(tmp_path / "local", tiny_corpus, tiny_teacher)
    assert out.read_bytes() == (tmp_path / "local" / "shard_1.h5").read_bytes()
