"""Documents: dealt once, split by content, cleaned, counted; and the sentence for each mistake."""

import argparse
import csv
import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.config.checks import LOADERS as CONFIG_LOADERS
from retort.config.flags import add_section_flags, section_from_args
from retort.config.sections import Dataset
from retort.corpus.demo_text import PACKAGES
from retort.corpus.documents import Counts, Document, is_held_out, make_document
from retort.corpus.hub import explain_hub_error
from retort.corpus.readers import LOADERS
from retort.corpus.reading import check_corpus, corpus_files, read_documents
from retort.corpus.snapshot import draw_corpus, read_drawn

SHARED_TEXT = Path(__file__).parents[4] / "shared" / "data" / "text"
needs_shared_data = pytest.mark.skipif(
    not SHARED_TEXT.is_dir(), reason=f"the shared data set is not at {SHARED_TEXT}"
)


def make_dataset(**keys: Any) -> Dataset:
    parser = argparse.ArgumentParser()
    add_section_flags(parser, "dataset")
    return replace(section_from_args(parser.parse_args([]), "dataset"), **keys)


DEFAULTS = make_dataset()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_shards(dataset: Dataset, num_shards: int) -> tuple[list[list[Document]], Counts]:
    """All documents, shard by shard, and the merged counts; each shard's counts reconcile."""
    total, shards = Counts(), []
    for shard in range(num_shards):
        counts = Counts()
        options = {"shard": shard, "num_shards": num_shards, "counts": counts}
        shards.append(list(read_documents(dataset, **options)))
        counts.reconcile()
        assert counts.used == len(shards[-1])
        assert counts.held_out == sum(document.split == "val" for document in shards[-1])
        total.merge(counts)
    return shards, total


def read_all(dataset: Dataset) -> list[Document]:
    return read_shards(dataset, 1)[0][0]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """137 rows in two files; row i says i, except that every tenth is empty."""
    folder = tmp_path_factory.mktemp("numbered")
    rows = [{"text": "" if i % 10 == 3 else f"document {i}"} for i in range(137)]
    write_jsonl(folder / "b.jsonl", rows[100:])
    write_jsonl(folder / "a.jsonl", rows[:100])
    return replace(DEFAULTS, name="json", data_files=str(folder / "*.jsonl"))


# --- Sharding and order


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    num_shards=st.integers(1, 200),
    sharding=st.sampled_from(["interleaved", "contiguous"]),
    max_samples=st.none() | st.integers(1, 200),
    shuffle=st.booleans(),
)
def test_every_document_is_dealt_to_exactly_one_shard(
    numbered: Dataset, num_shards: int, sharding: str, max_samples: int | None, shuffle: bool
) -> None:
    dataset = replace(numbered, sharding=sharding, max_samples=max_samples, shuffle=shuffle)
    whole = read_all(replace(dataset, sharding="interleaved"))
    shards, counts = read_shards(dataset, num_shards)
    assert sorted((d for shard in shards for d in shard), key=lambda d: d.index) == whole
    assert counts.read == min(137, max_samples or 137)
    assert all([d.index for d in shard] == sorted(d.index for d in shard) for shard in shards)


def test_index_is_the_place_in_the_files_counted_before_anything_is_skipped(
    numbered: Dataset,
) -> None:
    documents = read_all(numbered)
    assert [d.text for d in documents] == [f"document {d.index}" for d in documents]
    assert [d.index for d in documents] == [i for i in range(137) if i % 10 != 3]


def test_interleaved_deals_by_remainder_and_contiguous_by_equal_runs(numbered: Dataset) -> None:
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


# --- The held-out split


@given(text=st.text(), seed=st.integers(0, 2**32 - 1), fraction=st.floats(0, 1))
def test_more_is_held_out_by_a_larger_fraction_never_less(
    text: str, seed: int, fraction: float
) -> None:
    content = text.encode("utf-8", "replace").decode()
    assert not is_held_out(content, seed=seed, fraction=0.0)
    if is_held_out(content, seed=seed, fraction=fraction):
        assert is_held_out(content, seed=seed, fraction=(fraction + 1) / 2)


def test_the_split_depends_on_content_and_seed_and_nothing_else(
    numbered: Dataset, tmp_path: Path
) -> None:
    dataset = replace(numbered, validation_fraction=0.3)
    sides = {d.text: d.split for d in read_all(dataset)}
    assert set(sides.values()) == {"train", "val"}
    rows = [{"text": text} for text in sorted(sides, reverse=True)] * 2
    copy = replace(dataset, data_files=str(write_jsonl(tmp_path / "c.jsonl", rows)), shuffle=True)
    shards, _ = read_shards(copy, 7)
    assert all(sides[d.text] == d.split for shard in shards for d in shard)
    assert sides != {d.text: d.split for d in read_all(replace(dataset, seed=5))}


def test_the_fraction_held_out_is_the_fraction_asked_for() -> None:
    for fraction in (0.01, 0.25):
        held = sum(is_held_out(f"text {i}", seed=0, fraction=fraction) for i in range(20_000))
        assert abs(held / 20_000 - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


@pytest.mark.parametrize("max_samples", [2, 10, 50])
def test_a_trial_of_few_documents_holds_out_at_least_one(
    numbered: Dataset, max_samples: int
) -> None:
    dataset = replace(numbered, max_samples=max_samples, validation_fraction=0.01)
    sides = [d.split for d in read_all(dataset)]
    assert sides[0] == "val"
    assert "train" in sides
    assert "val" not in {d.split for d in read_all(replace(dataset, validation_fraction=0.0))}


def test_the_prompt_counts_for_the_split() -> None:
    dataset = replace(
        DEFAULTS, prompt_column="p", response_column="r", validation_fraction=0.5, name="json"
    )
    rows = [{"p": f"prompt {i}", "r": "yes"} for i in range(50)]
    made = [make_document(r, dataset, index=0, split=None, counts=Counts()) for r in rows]
    assert {d.split for d in made if d} == {"train", "val"}


# --- Cleaning and counting


VALUES = st.one_of(
    st.none(),
    st.integers(),
    st.sampled_from(
        ["", " \n", "\0", "a\0b", "\ud800", "x\udfffy", "plain", "pr\u00e9t \U0001f600"]
    ),
    st.text(st.characters(), max_size=5),
)


@settings(max_examples=300)
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"prompt": VALUES, "response": VALUES})))
def test_every_row_is_used_or_skipped_for_a_reason_and_what_is_used_is_clean(
    rows: list[dict[str, Any]],
) -> None:
    dataset = replace(DEFAULTS, prompt_column="prompt", response_column="response")
    counts = Counts()
    for index, row in enumerate(rows):
        document = make_document(row, dataset, index=index, split=None, counts=counts)
        if document is not None:
            content = (document.prompt or "") + document.text
            content.encode("utf-8")
            assert "\0" not in content
            assert document.text.strip()
    counts.reconcile()
    assert counts.read == len(rows)
    assert set(counts.skipped) <= {"empty", "empty_response", "not_text"}
    assert Counts.from_json(json.loads(json.dumps(counts.to_json()))) == counts


def test_flaws_are_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "p", "response": "fine", "category": "easy", "language": 7}',
        '{"prompt": "p", "response": " \\u0000 "}',
        '{"prompt": " ", "response": ""}',
        '{"prompt": "p", "response": null}',
        '{"prompt": "p"}',
        '{"prompt": 5, "response": "r"}',
        '{"prompt": "", "response": "no prompt"}',
        '{"prompt": "a\\u0000", "response": "b\\u0000\\ud800c \\ud83d\\ude00"}',
        "",
        '{"prompt": "p", "response": ["list"]}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    dataset = replace(
        DEFAULTS,
        name="json",
        data_files=str(path),
        prompt_column="prompt",
        response_column="response",
        validation_fraction=0.0,
    )
    shards, counts = read_shards(dataset, 2)
    assert counts == Counts(
        read=9,
        used=3,
        skipped={"empty_response": 1, "empty": 1, "not_text": 4},
        cleaned={"nul": 1, "lone_surrogate": 1},
    )
    assert shards == [
        [
            Document(0, "fine", "p", "easy", "7", "train"),
            Document(6, "no prompt", "", None, None, "train"),
        ],
        [Document(7, "b\ufffdc \U0001f600", "a", None, None, "train")],
    ]


def test_a_document_of_ten_megabytes_is_one_document(tmp_path: Path) -> None:
    text = "0123456789abcde\n" * 655_360
    write_jsonl(tmp_path / "big.jsonl", [{"text": text}, {"text": "small"}])
    with (tmp_path / "big.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [text], ["small"]])
    for name in ("json", "csv"):
        pattern = str(tmp_path / f"*.{name}*")
        documents = read_all(replace(DEFAULTS, name=name, data_files=pattern))
        assert [len(d.text) for d in documents] == [10_485_760, 5]


# --- Sources


ROWS = [
    {"id": i, "text": f'row {i}, "quoted",\nsecond line \u00e9', "category": "abc"[i % 3]}
    for i in range(23)
]


def write_source(folder: Path, name: str) -> Path:
    folder.mkdir()
    if name == "csv":
        with (folder / "part.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif name == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "part.parquet")
    elif name == "array":
        (folder / "part.json").write_text(json.dumps(ROWS, indent=1))
    elif name == "zst":
        import zstandard

        frames = [zstandard.compress(json.dumps(row).encode() + b"\n") for row in ROWS]
        (folder / "part.jsonl.zst").write_bytes(b"".join(frames))
    elif name == "gz":
        with gzip.open(folder / "part.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    else:
        write_jsonl(folder / "part.jsonl", ROWS)
    return folder


@pytest.mark.parametrize("name", ["json", "array", "gz", "zst", "csv", "parquet", "hub"])
def test_all_formats_give_the_same_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_source(tmp_path / "data", name)
    if name == "hub":  # a folder laid out as a dataset is read by `datasets`, as a Hub id is
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        keys: dict[str, Any] = {"name": str(folder), "num_proc": 1}
    else:
        loader = name if name in LOADERS else "json"
        keys = {"name": loader, "data_files": [str(folder / "part.*")]}
    dataset = replace(DEFAULTS, validation_fraction=0.3, **keys)
    documents = read_all(dataset)
    assert [(d.index, d.text, d.category) for d in documents] == [
        (row["id"], row["text"], row["category"]) for row in ROWS
    ]
    shards, _ = read_shards(replace(dataset, sharding="contiguous", shuffle=True), 4)
    assert {d.text for shard in shards for d in shard} == {row["text"] for row in ROWS}
    assert check_corpus(dataset)["scanned"]["used"] == len(ROWS)
    assert len(corpus_files(dataset)) == 1
    streamed = replace(dataset, streaming=True, max_samples=100)
    assert read_all(streamed) == documents
    mixed = read_all(replace(streamed, shuffle=True, streaming_buffer_size=10))
    assert {d.text for d in mixed} == {d.text for d in documents}
    assert [d.text for d in mixed] != [d.text for d in documents]


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


def test_a_text_file_becomes_passages_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}.\n" + "word " * (i % 50) for i in range(400)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n" + "\n\n\n".join(paragraphs) + "\n", encoding="utf-8")
    documents = read_all(replace(DEFAULTS, name="text", data_files=str(path)))
    assert re.findall(r"Paragraph \d+", "".join(d.text for d in documents)) == [
        f"Paragraph {i}" for i in range(400)
    ]
    assert all(d.text.startswith("Paragraph") for d in documents)
    assert all(3990 <= len(d.text) < 4400 for d in documents[:-1])
    (tmp_path / "lines.txt").write_text("one line\n" * 10_000)
    lines = read_all(replace(DEFAULTS, name="text", data_files=str(tmp_path / "lines.txt")))
    assert sum(d.text.count("one line") for d in lines) == 10_000
    assert max(len(d.text) for d in lines) < 8100
    (tmp_path / "blank.txt").write_text("\n \n\n")
    assert read_all(replace(DEFAULTS, name="text", data_files=str(tmp_path / "blank.txt"))) == []


def test_globs_are_sorted_and_lists_keep_their_order_without_repeats(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": name}])
    dataset = replace(DEFAULTS, name="json")

    def names(*patterns: str) -> list[str]:
        files = corpus_files(
            replace(dataset, data_files=tuple(str(tmp_path / p) for p in patterns))
        )
        return [path.name for path in files]

    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("b.jsonl", "*.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_relative_paths_start_where_the_program_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path / "work")
    for pattern in ("../a.jsonl", "../*.jsonl"):
        assert read_all(replace(DEFAULTS, name="json", data_files=pattern))[0].text == "a"


def test_the_loaders_read_are_those_that_the_config_knows() -> None:
    assert LOADERS == CONFIG_LOADERS


# --- Mistakes


def refused(dataset: Dataset) -> str:
    with pytest.raises(ValueError) as caught:
        check_corpus(dataset)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": \n', "rows.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n[1, 2]\n', "rows.jsonl, line 2 holds [1, 2], not an object"),
        ('{"txt": "a", "id": 1}\n', "column 'text' is not in"),
        ('{"txt": "a", "id": 1}\n', "which has 'txt', 'id'. Did you mean 'txt'? Set"),
        ("", "has no usable document: 0 read, none skipped"),
        ('{"text": ""}\n{"text": null}\n', "2 read, 1 empty, 1 not_text skipped. Expected"),
        ("plain text\n", "it starts with 'plain text'. Expected one object per line"),
        ("[{}]", "which has no columns"),
    ],
)
def test_a_bad_json_file_is_refused_with_file_line_and_remedy(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert said in refused(replace(DEFAULTS, name="json", data_files=str(path)))


def test_a_row_that_is_no_json_is_found_by_the_shard_that_owns_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 4999 + "{'text': 'b'}\n")
    dataset = replace(DEFAULTS, name="json", data_files=str(path))
    with pytest.raises(ValueError, match=r"line 5000 is not JSON .* starts with \"\{'text"):
        read_shards(dataset, 4)


@pytest.mark.parametrize(
    ("loader", "content", "said"),
    [
        ("text", b"caf\xe9 au lait", "is not UTF-8 text (byte 0xe9"),
        ("csv", b"text\ncaf\xe9\n", "is not UTF-8 text (byte 0xe9"),
        ("csv", b'text,n\n"open,1\n', "line 2 is not CSV (unexpected end of data)"),
        ("csv", b"text,n\na,b,c\n", "line 2 has 3 values, but the header names 2 columns"),
        ("csv", b"words,n\na,b\n", "column 'text' is not in the header of"),
        ("json", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "is damaged or cut short"),
        ("parquet", b"no parquet", "is not a readable Parquet file"),
        ("json", b'\x80abc"\n', "line 1 is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, loader: str, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    message = refused(replace(DEFAULTS, name=loader, data_files=str(path)))
    assert said in message
    assert str(path) in message


def test_every_file_of_a_glob_is_looked_at(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "b.jsonl", [{"body": "b"}])
    said = refused(replace(DEFAULTS, name="json", data_files=str(tmp_path / "*.jsonl")))
    assert "b.jsonl, line 1, which has 'body'" in said


def test_the_usable_document_may_come_late(tmp_path: Path) -> None:
    rows = [{"text": ""}] * 3000 + [{"text": "at last"}]
    dataset = replace(
        DEFAULTS, name="json", data_files=str(write_jsonl(tmp_path / "late.jsonl", rows))
    )
    assert check_corpus(dataset)["scanned"]["used"] == 1
    said = refused(replace(dataset, max_samples=10))
    assert "10 read, 10 empty skipped" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data_files": "nowhere/*.jsonl"}, "'nowhere/*.jsonl' matches no file (looked in "),
        ({"data_files": "train.jsnl"}, "'train.jsnl' does not exist (looked in "),
        ({"data_files": "train.jsnl"}, "Did you mean 'train.jsonl'?"),
        ({"data_files": "."}, "is a folder: name its files, as in"),
        ({"data_files": "https://x.org/a.jsonl"}, "is an address, but local files are read"),
        ({"data_files": None}, "dataset.data_files is not set: give paths or globs"),
        ({"split": "test"}, "dataset.split is 'test', but only a dataset on the Hub has one"),
        ({"revision": "main"}, "dataset.revision is 'main', but only a dataset on the Hub"),
        ({"validation_split": "test"}, "dataset.validation_fraction holds documents out"),
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
    assert said in refused(dataset)


def test_hub_errors_say_whether_it_is_the_network_the_login_or_the_name() -> None:
    from datasets.exceptions import DatasetNotFoundError

    dataset = replace(DEFAULTS, name="some/aggregated")

    def said(error: Exception) -> str:
        return str(explain_hub_error(dataset, error))

    assert "could not be reached: check the network" in said(ConnectionError("Couldn't reach it"))
    assert "was not found on the Hub" in said(DatasetNotFoundError("'some/aggregated' not found"))
    gated = said(DatasetNotFoundError("Dataset 'x' is a gated dataset. You must be authenticated"))
    assert "type `hf auth login`" in gated
    assert "https://huggingface.co/datasets/some/aggregated" in gated
    wrong = said(ValueError('Unknown split "x". Should be one of ["train"].'))
    assert "check dataset.config_name, split" in wrong
    assert 'Unknown split "x"' in wrong


def test_a_hub_out_of_reach_is_said_in_one_sentence(tmp_path: Path) -> None:
    code = (
        "from tests.unit.corpus.test_reading import DEFAULTS, check_corpus, replace\n"
        "try: check_corpus(replace(DEFAULTS, name='nobody/no-such-dataset'))\n"
        "except ValueError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[3]
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=root
    ).stdout
    assert printed.startswith("dataset.name 'nobody/no-such-dataset' could not be reached: check")


# --- Drawn corpora


def test_a_stream_shorter_than_its_buffer_is_shuffled_whole(numbered: Dataset) -> None:
    stream = replace(numbered, streaming=True, max_samples=500, shuffle=True)
    places = [int(d.text.split()[1]) for d in read_all(stream)]
    assert sorted(places) == [i for i in range(137) if i % 10 != 3]
    assert sum(abs(place - i) for i, place in enumerate(places)) > 137 * 20


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_drawn_stream_holds_what_reading_it_gives(
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
    summary = draw_corpus(stream, tmp_path / "drawn")
    shards, counts = read_shards(stream, 3)
    drawn_counts = Counts()
    drawn = [
        list(read_drawn(tmp_path / "drawn", shard=shard, counts=drawn_counts)) for shard in range(3)
    ]
    assert drawn == shards
    assert drawn_counts == counts == Counts.from_json(summary["counts"])
    if not shuffle:
        assert drawn == read_shards(replace(stream, streaming=False), 3)[0]
    else:
        texts = [d.text for shard in drawn for d in shard]
        assert len(set(texts)) == len(texts)
        places = [int(d.text.split()[1]) for d in sorted(chain(*drawn), key=lambda d: d.index)]
        assert places != sorted(places)


def test_drawing_twice_gives_the_same_bytes_and_leaves_nothing_else(
    numbered: Dataset, tmp_path: Path
) -> None:
    stream = replace(numbered, streaming=True, max_samples=50, num_shards=2)
    for name in ("one", "two"):
        draw_corpus(stream, tmp_path / name)
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    }
    assert files["one"] == files["two"]
    header = files["one"]["documents_00000.jsonl.gz"][:8]
    assert header[3:] == bytes(5)  # no flag (such as a file's name), no time
    assert sorted(name for name in files["one"] if not name.startswith(".draw_")) == [
        "corpus.json",
        "documents_00000.jsonl.gz",
        "documents_00001.jsonl.gz",
    ]


def test_a_failed_draw_leaves_no_record_behind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 20 + "broken\n")
    stream = replace(DEFAULTS, name="json", data_files=str(path), streaming=True, max_samples=100)
    with pytest.raises(ValueError, match="line 21 is not JSON"):
        draw_corpus(stream, tmp_path / "drawn")
    assert not (tmp_path / "drawn" / "corpus.json").exists()
    path.write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="no usable document: 1 read, 1 empty skipped"):
        draw_corpus(stream, tmp_path / "drawn")


def test_a_drawn_file_cut_short_is_refused(numbered: Dataset, tmp_path: Path) -> None:
    draw_corpus(replace(numbered, streaming=True, max_samples=90, num_shards=1), tmp_path)
    path = tmp_path / "documents_00000.jsonl.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: content.rindex(b"\n", 0, -1) + 1], mtime=0))
    with pytest.raises(ValueError, match=r"holds 80 documents, but its record says 81"):
        list(read_drawn(tmp_path, shard=0, counts=Counts()))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        list(read_drawn(tmp_path, shard=0, counts=Counts()))
    with pytest.raises(ValueError, match="does not describe shard 1 of a corpus"):
        list(read_drawn(tmp_path, shard=1, counts=Counts()))


@pytest.mark.slow
def test_a_stream_holds_no_more_than_its_shuffle_buffer_in_memory(tmp_path: Path) -> None:
    """Ten times the documents, the same peak of what Python itself has allocated."""
    import tracemalloc

    peaks = []
    for size in (2000, 20_000):
        rows = [{"text": f"{i} " + "x" * 500} for i in range(size)]
        path = write_jsonl(tmp_path / f"{size}.jsonl", rows)
        del rows
        stream = replace(
            DEFAULTS,
            name="json",
            data_files=str(path),
            streaming=True,
            max_samples=size,
            shuffle=True,
            streaming_buffer_size=100,
        )
        tracemalloc.start()
        draw_corpus(stream, tmp_path / f"drawn{size}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_the_demo_is_drawn_with_its_packages_versions(tmp_path: Path) -> None:
    dataset = replace(DEFAULTS, max_samples=40, num_shards=2, validation_fraction=0.2)
    summary = draw_corpus(dataset, tmp_path)
    assert set(summary["packages"]) == set(PACKAGES)
    assert summary["counts"]["read"] == summary["counts"]["used"] == 40
    documents = [d for s in range(2) for d in read_drawn(tmp_path, shard=s, counts=Counts())]
    assert sorted(documents, key=lambda d: d.index) == read_all(dataset)
    assert summary["bytes"] == sum(len(d.text.encode()) for d in documents)


# --- Real data


@needs_shared_data
def test_real_stories_are_all_read_and_dealt() -> None:
    dataset = replace(
        DEFAULTS, name="json", data_files=str(SHARED_TEXT / "tinystories" / "train.jsonl")
    )
    assert check_corpus(dataset)["columns"] == ["text"]
    shards, counts = read_shards(dataset, 8)
    assert counts.read == counts.used == 2016
    assert [len(shard) for shard in shards] == [252] * 8
    assert 5 <= counts.held_out <= 40


@needs_shared_data
def test_a_real_play_becomes_passages_without_losing_a_word() -> None:
    path = SHARED_TEXT / "tinyshakespeare" / "input.txt"
    dataset = replace(DEFAULTS, name="text", data_files=str(path))
    documents = read_all(dataset)
    words = " ".join(d.text for d in documents).split()
    assert words == path.read_text(encoding="utf-8").split()
    assert 250 < len(documents) < 280
