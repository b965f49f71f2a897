"""Text from several places, from the config to the report: files of one's own to evaluate on."""

from pathlib import Path

import h5py

from retort.evaluation.records import Metrics
from retort.tokens.index import TokenIndex
from retort.tokens.shards import read_token_shard
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


def _documents(folder: Path, split: str) -> set[int]:
    tables = [read_token_shard(path, split) for path in folder.glob("shard_*.h5")]
    return {number for table in tables for number in table.documents.tolist()}
