"""The documents of a corpus in one order, in shards; what is wrong with a corpus, and what to do."""

from pathlib import Path
from typing import Any

import pytest

from retort.config.sections import Dataset
from retort.corpus.checking import check_corpus
from retort.corpus.reading import list_corpus_files
from support.corpora import DEFAULTS, read_all, read_shards, refusal, write_jsonl, write_numbered
from support.sections import replace


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_numbered(tmp_path_factory.mktemp("numbered"))


def test_indices_count_rows_before_anything_is_skipped(
    numbered: Dataset,
) -> None:
    documents = read_all(numbered)
    assert [d.text for d in documents] == [f"document {d.index}" for d in documents]
    assert [d.index for d in documents] == [i for i in range(137) if i % 10 != 3]


def test_interleaved_shards_go_by_remainder_and_contiguous_ones_are_equal_runs(
    numbered: Dataset,
) -> None:
    shards, _ = read_shards(numbered, 5)
    assert all(d.index % 5 == shard for shard in range(5) for d in shards[shard])
    runs, _ = read_shards(replace(numbered, sharding="contiguous"), 5)
    ends = [137 * shard // 5 for shard in range(6)]
    assert all(ends[s] <= d.index < ends[s + 1] for s in range(5) for d in runs[s])


def test_shuffle_is_a_permutation_that_the_seed_decides(numbered: Dataset) -> None:
    first, again = (read_all(replace(numbered, shuffle=True, seed=1)) for _ in range(2))
    other = read_all(replace(numbered, shuffle=True, seed=2))
    assert first == again
    assert [d.text for d in first] != [d.text for d in other]
    assert (
        {d.text for d in first} == {d.text for d in other} == {d.text for d in read_all(numbered)}
    )


def test_max_samples_takes_a_prefix_of_the_shuffled_order(numbered: Dataset) -> None:
    whole = read_all(replace(numbered, validation_fraction=0.4, shuffle=True))
    prefix = read_all(replace(numbered, validation_fraction=0.4, shuffle=True, max_samples=50))
    assert prefix == [d for d in whole if d.index < 50]


def test_a_stream_shorter_than_its_buffer_is_shuffled_whole(numbered: Dataset) -> None:
    stream = replace(numbered, streaming=True, max_samples=500, shuffle=True)
    places = [int(d.text.split()[1]) for d in read_all(stream)]
    assert sorted(places) == [i for i in range(137) if i % 10 != 3]
    assert sum(abs(place - i) for i, place in enumerate(places)) > 137 * 20


def test_a_validation_split_follows_the_training_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": f"train {i}"} for i in range(10)])
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"text": f"held {i}"} for i in range(6)])
    dataset = replace(
        DEFAULTS, name=str(tmp_path / "data"), validation_split="test", num_proc=1, max_samples=8
    )
    expected = [(i, f"train {i}", "train") for i in range(8)]
    expected += [(8 + i, f"held {i}", "val") for i in range(6)]
    for streaming in (False, True):
        for num_shards in (1, 3):
            shards, counts = read_shards(replace(dataset, streaming=streaming), num_shards)
            documents = sorted((d for s in shards for d in s), key=lambda d: d.index)
            assert [(d.index, d.text, d.split) for d in documents] == expected
            assert counts.held_out == 6


def test_globs_are_sorted_and_lists_keep_their_order_without_repeats(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": name}])
    dataset = replace(DEFAULTS, name="json")

    def names(*patterns: str) -> list[str]:
        files = list_corpus_files(
            replace(dataset, data_files=tuple(str(tmp_path / p) for p in patterns))
        )
        return [path.name for path in files]

    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("b.jsonl", "*.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_relative_paths_start_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path / "work")
    for pattern in ("../a.jsonl", "../*.jsonl"):
        assert read_all(replace(DEFAULTS, name="json", data_files=pattern))[0].text == "a"


def test_every_file_of_a_glob_is_checked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "b.jsonl", [{"body": "b"}])
    said = refusal(replace(DEFAULTS, name="json", data_files=str(tmp_path / "*.jsonl")))
    assert "b.jsonl, line 1, which has 'body'" in said


def test_the_first_usable_document_may_be_late(tmp_path: Path) -> None:
    rows = [{"text": ""}] * 3000 + [{"text": "at last"}]
    dataset = replace(
        DEFAULTS, name="json", data_files=str(write_jsonl(tmp_path / "late.jsonl", rows))
    )
    assert check_corpus(dataset)["scanned"]["used"] == 1
    said = refusal(replace(dataset, max_samples=10))
    assert "10 read, 10 empty skipped" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data_files": "nowhere/*.jsonl"}, "'nowhere/*.jsonl' matches no file (looked in "),
        ({"data_files": "train.jsnl"}, "'train.jsnl' does not exist (looked in "),
        ({"data_files": "train.jsnl"}, "Did you mean 'train.jsonl'?"),
        ({"data_files": "."}, "is a folder: give its files, as in"),
        ({"data_files": "https://x.org/a.jsonl"}, "is an address, but must be a local file"),
        ({"data_files": None}, "dataset.data_files is not set: give paths or globs"),
        ({"split": "test"}, "dataset.split is 'test', but applies only to a dataset on the Hub"),
        ({"revision": "main"}, "dataset.revision is 'main', but applies only to"),
        ({"validation_split": "test"}, "dataset.validation_fraction sets how much is held out"),
        ({"text_column": "body"}, "column 'body' is not in"),
        ({"category_column": "topic"}, "column 'topic' is not in"),
        ({"name": "text", "text_column": "body"}, "column 'body' is not in train.jsonl (a text fi"),
        ({"name": "demo", "data_files": None, "text_column": "x"}, "is not in the demo's text"),
    ],
)
def test_a_bad_key_is_refused_with_value_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], said: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    dataset = replace(DEFAULTS, **{"name": "json", "data_files": "train.jsonl"} | keys)
    assert said in refusal(dataset)


def test_real_stories_are_all_read_and_assigned(shared_data: Path) -> None:
    dataset = replace(
        DEFAULTS, name="json", data_files=str(shared_data / "text" / "tinystories" / "train.jsonl")
    )
    assert check_corpus(dataset)["columns"] == ["text"]
    shards, counts = read_shards(dataset, 8)
    assert counts.read == counts.used == 2016
    assert [len(shard) for shard in shards] == [252] * 8
    assert 5 <= counts.held_out <= 40
