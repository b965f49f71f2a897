"""Files of one's own that are held out: whole, never trained on, numbered after all others."""

import os
from pathlib import Path

import pytest

from retort.config.sections import Dataset
from retort.corpus.reading import list_corpus_files, refuse_changed_files
from retort.corpus.sources import find_named_for_evaluation
from retort.io.digests import digest_file_states
from support.corpora import DEFAULTS, read_shards, refusal, write_jsonl
from support.sections import replace


@pytest.fixture
def held_out(tmp_path: Path) -> Dataset:
    """Eleven documents to train on in two files, and seven to evaluate on in two others."""
    for name, rows in {"train-a": 6, "train-b": 5, "valid-a": 4, "valid-b": 3}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(rows)])
    return replace(
        DEFAULTS,
        name="json",
        data_files=str(tmp_path / "train-*.jsonl"),
        validation_files=str(tmp_path / "valid-*.jsonl"),
    )


@pytest.mark.parametrize("keys", [{}, {"streaming": True, "max_samples": 50}, {"shuffle": True}])
@pytest.mark.parametrize("sharding", ["interleaved", "contiguous", "files"])
def test_they_are_held_out_whole(held_out: Dataset, keys: dict[str, bool], sharding: str) -> None:
    if sharding == "contiguous" and "streaming" in keys:
        return  # refused by the config
    dataset = replace(held_out, sharding=sharding, **keys)
    for num_shards in (1, 2):
        shards, counts = read_shards(dataset, num_shards)
        documents = [d for shard in shards for d in shard]
        assert len({d.index for d in documents}) == len(documents) == 18
        assert {(d.split, d.text[:5]) for d in documents} == {("train", "train"), ("val", "valid")}
        assert counts.held_out == 7
        if sharding != "files":
            assert min(d.index for d in documents if d.split == "val") == 11


def test_a_file_that_is_trained_on_as_well_is_refused(held_out: Dataset, tmp_path: Path) -> None:
    both = replace(held_out, data_files=str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"valid-a.jsonl', which is in dataset.data_files too"):
        list_corpus_files(both)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "train-b.jsonl")
    linked = replace(held_out, validation_files=str(tmp_path / "link.jsonl"))
    with pytest.raises(ValueError, match=r"link.jsonl', which is in dataset.data_files too"):
        list_corpus_files(linked)


def test_what_cannot_be_read_is_told_by_its_key(held_out: Dataset, tmp_path: Path) -> None:
    missing = replace(held_out, validation_files=str(tmp_path / "valid-c.jsonl"))
    assert refusal(missing).startswith(f"dataset.validation_files '{tmp_path}/valid-c.jsonl' does")
    write_jsonl(tmp_path / "valid-a.jsonl", [{"body": "no text"}])
    assert "column 'text' is not in" in refusal(held_out)
    write_jsonl(tmp_path / "valid-a.jsonl", [{"text": " "}])
    write_jsonl(tmp_path / "valid-b.jsonl", [{"text": ""}])
    assert "valid-*.jsonl) has no usable document: 2 read, 2 empty skipped" in refusal(held_out)


def test_an_edit_while_they_are_read_is_refused(held_out: Dataset, tmp_path: Path) -> None:
    stamp = digest_file_states(list_corpus_files(held_out))
    with (
        pytest.raises(ValueError, match=r"validation_files '.*' changed while Retort read them"),
        refuse_changed_files(held_out, stamp),
    ):
        write_jsonl(tmp_path / "valid-a.jsonl", [{"text": "another"}])


def test_files_named_for_evaluation_among_others_are_found(tmp_path: Path) -> None:
    def find(*names: str) -> list[str]:
        found = find_named_for_evaluation([tmp_path / "test" / name for name in names])
        return [os.path.relpath(path, tmp_path / "test") for path in found]

    assert find("train.jsonl", "valid.jsonl", "b/dev/1.txt") == ["valid.jsonl", "b/dev/1.txt"]
    assert find("a-00001.parquet", "my_Test-00001.parquet") == ["my_Test-00001.parquet"]
    assert find("train.jsonl", "device.jsonl", "contest.txt", "valley.txt") == []
    assert find("test.jsonl") == find("test.jsonl", "dev.jsonl") == []
