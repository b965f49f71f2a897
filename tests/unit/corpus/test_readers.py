"""Files of every format give the same documents; a bad file is refused with its name, the line and what to do."""

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from retort.config.dataset import LOADERS as CONFIG_LOADERS
from retort.corpus.checking import check_corpus
from retort.corpus.readers import LOADERS
from retort.corpus.reading import list_corpus_files
from support.corpora import DEFAULTS, read_all, read_shards, refusal, write_jsonl
from support.sections import replace

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
        (folder / "part.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig")
    elif name in ("semicolon", "tab", "utf-16"):
        text = io.StringIO("\r\n;;\r\n" if name == "semicolon" else "", newline="")
        text.seek(0, io.SEEK_END)
        delimiter = {"semicolon": ";", "tab": "\t"}.get(name, ",")
        rows = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
        rows.writeheader()
        rows.writerows(ROWS)
        encoding = "utf-16" if name == "utf-16" else "utf-8-sig"
        (folder / "part.csv").write_bytes(text.getvalue().encode(encoding))
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


CSV = ("csv", "semicolon", "tab", "utf-16")


@pytest.mark.parametrize("name", ["json", "array", "gz", "zst", *CSV, "parquet", "hub"])
def test_all_formats_give_the_same_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_source(tmp_path / "data", name)
    if (
        name == "hub"
    ):  # a folder with the layout of a Hub dataset is read by `datasets`, like a Hub id
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        keys: dict[str, Any] = {"name": str(folder), "num_proc": 1}
    else:
        loader = "csv" if name in CSV else name if name in LOADERS else "json"
        keys = {"name": loader, "data_files": [str(folder / "part.*")]}
    dataset = replace(DEFAULTS, validation_fraction=0.3, **keys)
    documents = read_all(dataset)
    assert [(d.index, d.text, d.category) for d in documents] == [
        (row["id"], row["text"], row["category"]) for row in ROWS
    ]
    shards, _ = read_shards(replace(dataset, sharding="contiguous", shuffle=True), 4)
    assert {d.text for shard in shards for d in shard} == {row["text"] for row in ROWS}
    assert check_corpus(dataset)["scanned"]["used"] == len(ROWS)
    assert len(list_corpus_files(dataset)) == 1
    streamed = replace(dataset, streaming=True, max_samples=100)
    assert read_all(streamed) == documents
    mixed = read_all(replace(streamed, shuffle=True, streaming_buffer_size=10))
    assert {d.text for d in mixed} == {d.text for d in documents}
    assert [d.text for d in mixed] != [d.text for d in documents]


def test_a_document_of_ten_megabytes_is_one_document(tmp_path: Path) -> None:
    text = "0123456789abcde\n" * 655_360
    write_jsonl(tmp_path / "big.jsonl", [{"text": text}, {"text": "small"}])
    with (tmp_path / "big.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [text], ["small"]])
    for name in ("json", "csv"):
        pattern = str(tmp_path / f"*.{name}*")
        documents = read_all(replace(DEFAULTS, name=name, data_files=pattern))
        assert [len(d.text) for d in documents] == [10_485_760, 5]


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


def test_the_config_knows_the_loaders_that_there_are() -> None:
    assert LOADERS == CONFIG_LOADERS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}\n{"text": \n', "rows.jsonl, line 2 is not JSON"),
        ('{"text": "a"}\n[1, 2]\n', "rows.jsonl, line 2 holds [1, 2], not an object"),
        ('{"txt": "a", "id": 1}\n', "column 'text' is not in"),
        ('{"txt": "a", "id": 1}\n', "which has 'txt', 'id'. Did you mean 'txt'? Set"),
        ("", "has no usable document: 0 read, none skipped"),
        (
            '{"text": ""}\n{"text": null}\n',
            "2 read, 1 empty, 1 not_text skipped (first documents empty: 0; not_text: 1). Expected",
        ),
        ("plain text\n", "it starts with 'plain text'. Expected one object per line"),
        ("[{}]", "which has no columns"),
    ],
)
def test_a_bad_json_file_is_refused_with_file_line_and_remedy(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert said in refusal(replace(DEFAULTS, name="json", data_files=str(path)))


def test_a_row_that_is_not_json_is_found_by_the_shard_that_it_belongs_to(tmp_path: Path) -> None:
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
        ("csv", b"id;words\n1;b\n", "which has 'id', 'words'"),
        (
            "csv",
            b"\n\ntext;n\na;b;c\n",
            "line 4 has 3 values, but the header names 2 columns: quote",
        ),
        ("csv", b"text;n\na,b;c\nd;e;f\n", "quote values that contain ';'"),
        ("csv", b"text,n,text\na,b,c\n", "names the column 'text' 2 times"),
        ("json", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "is damaged or cut short"),
        ("parquet", b"no parquet", "is not a readable Parquet file"),
        ("json", b'\x80abc"\n', "line 1 is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, loader: str, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    message = refusal(replace(DEFAULTS, name=loader, data_files=str(path)))
    assert said in message
    assert str(path) in message


def test_a_real_play_becomes_passages_without_losing_a_word(shared_data: Path) -> None:
    path = shared_data / "text" / "tinyshakespeare" / "input.txt"
    dataset = replace(DEFAULTS, name="text", data_files=str(path))
    documents = read_all(dataset)
    words = " ".join(d.text for d in documents).split()
    assert words == path.read_text(encoding="utf-8").split()
    assert 250 < len(documents) < 280


def test_a_delimiter_is_one_with_which_the_named_columns_exist(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    files = {
        "text\na; b\tc\n": "a; b\tc",  # one column: nothing separates
        "n,a;text\n1,2;a, b\n": "a, b",  # a comma in the name of another column
        "sep=;\nn;text\n1;a, b\n": "a, b",
        'n|"text"\n1|"a;\nb"\n': "a;\nb",
        '"other\ncolumn",text\n1,a\n': "a",
    }
    for content, text in files.items():
        path.write_text(content)
        documents = read_all(replace(DEFAULTS, name="csv", data_files=str(path)))
        assert [d.text for d in documents] == [text], content
