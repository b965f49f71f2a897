"""Text from several places, from the config to the report: files of one's own to evaluate on, and mixtures."""

import json
from pathlib import Path
from typing import Any

import h5py
import pyarrow as pa
import pyarrow.parquet as pq

from retort.evaluation.records import Metrics
from retort.tokens.index import TokenIndex
from retort.tokens.shards import read_token_shard
from support.corpora import write_jsonl
from support.hub import NAME, Hub
from support.place import Place, tiny

RUN = {"both": {"training": {"distillation_type": "hybrid", "alpha": 0.5}}}


def split_corpus(place: Place) -> tuple[str, str]:
    """Divide the tiny corpus into a file to train on and one to evaluate on; return their text."""
    lines = (place.path / "documents.jsonl").read_text().splitlines(keepends=True)
    train, valid = "".join(lines[:100]), "".join(lines[100:])
    (place.path / "train.jsonl").write_text(train)
    (place.path / "valid.jsonl").write_text(valid)
    return train, valid


def test_a_students_scores_are_of_the_files_to_evaluate_on(fresh: Place) -> None:
    split_corpus(fresh)
    dataset = {
        "data_files": "train.jsonl",
        "validation_files": "valid.jsonl",
        "validation_fraction": 0,
    }
    fresh.write_config(tiny(dataset=dataset, training={"max_steps": 4}, runs=RUN))
    fresh.snakemake()
    (path,) = fresh.results.glob("tokens/*/index.json")
    index = TokenIndex.read(path).record
    assert (index.train.documents, index.val.documents) == (100, 20)
    held_out = _documents(path.parent, "val")
    assert held_out == set(range(100, 120)) and _documents(path.parent, "train") == set(range(100))
    (cache,) = fresh.results.glob("logits/*/teacher_logits.h5")
    with h5py.File(cache) as file:
        assert not held_out & set(file["documents"][:].tolist())
    (path,) = fresh.results.glob("runs/both/*/evaluation/*/metrics.json")
    assert Metrics.read(path).scores.student.documents == 20
    assert "both" in (fresh.results / "summary.txt").read_text()


def lay_out_sources(place: Place, hub: Path) -> list[dict[str, Any]]:
    """Put the tiny corpus into a file, a folder of text and a dataset of a Hub with pairs; return the sources."""
    rows = [json.loads(line) for line in (place.path / "documents.jsonl").read_text().splitlines()]
    write_jsonl(place.path / "train.jsonl", [*rows[:60], {"text": ""}])
    (place.path / "books").mkdir()
    for number, row in enumerate(rows[60:90]):
        (place.path / "books" / f"{number:02}.txt").write_text(row["text"])
    hub.mkdir()
    pairs = {"question": ["What is it?"] * 30, "answer": [row["text"] for row in rows[90:]]}
    pq.write_table(pa.table(pairs), hub / "train.parquet")
    columns = {"prompt_column": "question", "response_column": "answer"}
    return [
        {"name": "json", "data_files": "train.jsonl", "weight": 2},
        {"name": "text", "data_files": "books/*.txt", "label": "books"},
        {"name": NAME, "label": "pairs", **columns},
    ]


def test_a_mixture_is_scored_by_source(fresh: Place, hub: Hub, tmp_path: Path) -> None:
    sources = lay_out_sources(fresh, tmp_path / "hub")
    dataset = {"mix": sources, "name": None, "data_files": None, "validation_fraction": 0.25}
    config = tiny(dataset=dataset, training={"max_steps": 4}, runs=RUN)
    fresh.write_config(config)
    hub.publish(tmp_path / "hub")
    fresh.env.update(hub.environment)
    fresh.snakemake()
    (path,) = fresh.results.glob("tokens/*/index.json")
    index = TokenIndex.read(path).record
    found = {label: counts.read for label, counts in index.counts.documents.sources.items()}
    assert found == {"train.jsonl": 61, "books": 30, "pairs": 30}
    assert index.counts.documents.sources["train.jsonl"].skipped == {"empty": 1}
    for split in (index.train, index.val):
        assert set(split.sources) == set(found) and sum(split.sources.values()) == split.tokens
    (path,) = fresh.results.glob("runs/both/*/evaluation/*/metrics.json")
    scores = Metrics.read(path).scores
    classes = {row.name: row for row in scores.breakdown["source"]}
    assert set(classes) == set(found)
    assert sum(row.documents for row in classes.values()) == scores.student.documents
    summary = " ".join((fresh.results / "summary.txt").read_text().split())
    assert "source books: 2" in summary and "skipped: 1 empty" in summary
    assert "By source of the document" in (fresh.results / "report.html").read_text()
    assert fresh.plan() == {}


def _documents(folder: Path, split: str) -> set[int]:
    tables = [read_token_shard(path, split) for path in folder.glob("shard_*.h5")]
    return {number for table in tables for number in table.documents.tolist()}
