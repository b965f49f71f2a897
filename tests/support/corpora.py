"""Corpora written for a test: a dataset section at its defaults, files of rows, and all documents of all shards."""

import json
from pathlib import Path
from typing import Any

import pytest

from retort.config.sections import Dataset
from retort.corpus.checking import check_corpus
from retort.corpus.documents import Counts, Document
from retort.corpus.reading import read_shard_documents
from support.jobs import make_job
from support.sections import replace


def make_dataset(**keys: Any) -> Dataset:
    """Return a dataset section at its defaults, except `keys`."""
    return replace(make_job().config.dataset, **keys)


DEFAULTS = make_dataset()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object per line; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_shards(dataset: Dataset, num_shards: int) -> tuple[list[list[Document]], Counts]:
    """Return all documents by shard, and the merged counts; assert that each shard's counts reconcile."""
    total, shards = Counts(), []
    for shard in range(num_shards):
        counts = Counts()
        documents = read_shard_documents(dataset, shard=shard, num_shards=num_shards, counts=counts)
        shards.append(list(documents))
        counts.reconcile()
        assert counts.used == len(shards[-1])
        assert counts.held_out == sum(document.split == "val" for document in shards[-1])
        total.merge(counts)
    return shards, total


def read_all(dataset: Dataset) -> list[Document]:
    """Return all documents of a corpus, as one shard."""
    return read_shards(dataset, 1)[0][0]


def write_numbered(folder: Path) -> Dataset:
    """Write 137 rows into two files; the text of row i is its number, but every tenth is empty."""
    rows = [{"text": "" if i % 10 == 3 else f"document {i}"} for i in range(137)]
    write_jsonl(folder / "b.jsonl", rows[100:])
    write_jsonl(folder / "a.jsonl", rows[:100])
    return replace(DEFAULTS, name="json", data_files=str(folder / "*.jsonl"))


def make_stream(folder: Path, *, files: int, rows: int, **keys: Any) -> Dataset:
    """Write files of rows; return the section that streams them."""
    folder.mkdir(exist_ok=True)
    for file in range(files):
        texts = [{"text": f"file {file} row {row} " + "word " * 20} for row in range(rows)]
        write_jsonl(folder / f"part-{file}.jsonl", texts)
    every: dict[str, Any] = {
        "name": "json",
        "data_files": str(folder / "*.jsonl"),
        "streaming": True,
    }
    return replace(DEFAULTS, **every | {"max_samples": files * rows, "num_shards": 3} | keys)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a snapshot's files, without its progress record, and what says how it was made."""
    names = (".", "run.json", "config.json")
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(names)}


def refusal(dataset: Dataset) -> str:
    """Return the message with which `check_corpus` refuses a corpus."""
    with pytest.raises(ValueError) as caught:
        check_corpus(dataset)
    return str(caught.value)
