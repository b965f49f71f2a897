"""YAML is read as it is written, with lines, and what is not YAML is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.config.config_files import load_source, read_files
from retort.config.load import load_runs
from retort.config.yaml_source import Source, parse_yaml, read_yaml

STUDENT = "student: {config: s.json}\n"


def values(text: str) -> dict[str, Any]:
    """Return the values of a text without mistakes."""
    source = parse_yaml(text, "mine.yaml")
    assert not source.problems, source.problems
    return source.values


def refusal(text: str) -> str:
    """Return the message that refuses a text."""
    with pytest.raises(ValueError) as caught:
        parse_yaml(text, "mine.yaml").refuse_problems()
    return str(caught.value)


def test_scalars_are_what_is_written_and_only_plain_nulls_are_null() -> None:
    text = "a: 010\nb: no\nc: 2026-01-01\nd: 1.10\ne: 0x12\nf: 1:30\ng: 1_000\nh: 'no'\ni: =\nno: y\n12: z\n"
    assert list(values(text).values()) == [
        "010",
        "no",
        "2026-01-01",
        "1.10",
        "0x12",
        "1:30",
        "1_000",
        "no",
        "=",
        "y",
        "z",
    ]
    assert list(values(text))[-2:] == ["no", "12"]
    assert values("a:\nb: null\nc: ~\nd: 'null'\ne: ''\n") == {
        "a": None,
        "b": None,
        "c": None,
        "d": "null",
        "e": "",
    }


@pytest.mark.parametrize(
    "key, written, read",
    [
        ("dataset.config_name", "2024_10", "2024_10"),
        ("dataset.config_name", "1.10", "1.10"),
        ("dataset.config_name", "no", "no"),
        ("dataset.split", "on", "on"),
        ("teacher.revision", "0123456", "0123456"),
        ("teacher.revision", "0x12", "0x12"),
        ("teacher.revision", "1e5", "1e5"),
        ("teacher.revision", "2026-01-01", "2026-01-01"),
        ("teacher.revision", "null", None),
        ("teacher.generation.gpus", "'0,1'", "0,1"),
        ("teacher.generation.gpus", "[0, 010]", ("0", "010")),
        ("teacher.generation.force_regenerate", "no", False),
        ("teacher.generation.force_regenerate", "2026-05-31", "2026-05-31"),
        ("teacher.generation.packing", "on", True),
        ("training.max_steps", "20_000", 20000),
        ("training.max_steps", "1e3", 1000),
        ("training.learning_rate", "3e-4", 3e-4),
        ("training.weight_decay", ".5", 0.5),
        ("training.weight_decay", "0", 0.0),
        ("evaluation.batch_size", '"8"', 8),
    ],
)
def test_the_type_of_a_key_decides(key: str, written: str, read: Any) -> None:
    section, *rest = key.split(".")
    inner = written
    for name in reversed(rest):
        inner = f"{{{name}: {inner}}}"
    (config,) = load_source(parse_yaml(f"{STUDENT}{section}: {inner}", "mine.yaml")).values()
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    assert (type(found), found) == (type(read), read)


def test_names_of_runs_are_taken_as_written() -> None:
    names = ["no", "on", "1", "010", "2026-01-01", "1e5", "null", "true", "0x12"]
    text = STUDENT + "runs:\n" + "".join(f"  {name}: {{}}\n" for name in names)
    assert list(load_source(parse_yaml(text, "mine.yaml"))) == names


def test_a_config_of_python_is_refused_where_yaml_made_something_else_of_a_name() -> None:
    raw = yaml.safe_load(STUDENT + "runs: {no: {}, 2026-01-01: {}, 7: {}}")
    with pytest.raises(ValueError) as caught:
        load_source(Source(raw))
    assert "runs has the key False, which YAML makes of a word" in str(caught.value)
    assert "runs has the key 2026-01-01" in str(caught.value) and "quotes" in str(caught.value)
    del raw["runs"][False]
    raw["runs"].popitem(), raw["runs"].popitem()
    load_source(Source(raw))


def test_every_key_and_item_knows_its_line() -> None:
    source = parse_yaml("a:\n  b: 1\n\n  c:\n  - x\n  - y\nd: {e: 1,\n  f: 2}\n", "mine.yaml")
    lines = {".".join(path): place.line for path, place in source.places.items()}
    assert lines == {
        "a": 1,
        "a.b": 2,
        "a.c": 4,
        "a.c.0": 5,
        "a.c.1": 6,
        "d": 7,
        "d.e": 7,
        "d.f": 8,
    }
    assert str(source.place(("a", "c", 1))) == "mine.yaml:6"
    assert str(source.place(("a", "q", "r"))) == "mine.yaml:1"
    assert str(source.place(("z",))) == "mine.yaml"


def test_anchors_and_merge_keys_work_and_keep_the_lines_where_they_are_written() -> None:
    text = "a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\nc: *a\nd: {<<: [*a, {z: 1}]}\n"
    source = parse_yaml(text, "mine.yaml")
    assert source.values == yaml.load(
        text.replace("<<: [*a, {z: 1}]", "x: 1, y: 2, z: 1"), yaml.BaseLoader
    ) | {"b": {"x": "1", "y": "3"}}
    assert source.place(("b", "x")) == source.place(("a", "x"))
    assert str(source.place(("b", "y"))) == "mine.yaml:6"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "mine.yaml has no keys"),
        ("# nothing\n", "mine.yaml has no keys"),
        ("- a\n- b\n", "mine.yaml is a list"),
        ("hello\n", "mine.yaml is one value"),
        ("a: 1\n---\nb: 2\n", "mine.yaml:2: '---' begins a second document."),
        ("a: [1 2, [}\n", "mine.yaml:1: the brackets of 'a: [1 2, [}' do not match."),
        ("a: {b: 1 c: 2}\n", "mine.yaml:1: in '{b: 1 c: 2}' a comma is missing"),
        ("a: &x [*x]\n", "mine.yaml:1: an alias refers to the value that it is in."),
        ("a: 1\n}\n", "mine.yaml:2: '}' closes a bracket that was not opened."),
        ('a: "\\ud83d"\n', "mine.yaml:1: the text has half a character"),
        ("{{ a }}: 1\n", "mine.yaml:1: braces or brackets are in place of a key."),
        ('{"a": 1, "a": 2}', "mine.yaml: 'a' is set twice in one section."),
        ("a: \n- b\n c: 1\n", "mine.yaml:3: "),
    ],
)
def test_what_is_no_config_is_one_sentence(text: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith(words) and message.count("\n") == 0, message


def test_aliases_that_grow_without_end_are_refused() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    assert "more values" in refusal(text)
    assert "nested" in refusal("a: " + "[" * 5000 + "]" * 5000)


def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: \xc3\xa9\r\n")
    source = read_yaml(path, "mine.yaml")
    assert source.values == {"a": "1", "b": {"c": "é"}}
    assert str(source.place(("b", "c"))) == "mine.yaml:3"


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"mine\.yaml:2: the file is not UTF-8 text\. Save it as UTF-8"
    ):
        read_yaml(path)
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_json_is_read_as_written_with_the_files_name() -> None:
    raw = {"teacher": {"revision": "\ud83d\ude00"}, "training": {"alpha": 1.5, "seed": 3}}
    source = parse_yaml(json.dumps(raw), "mine.json")
    assert source.values == {
        "teacher": {"revision": "😀"},
        "training": {"alpha": "1.5", "seed": "3"},
    }
    assert str(source.place(("training", "alpha"))) == "mine.json"


def test_files_and_the_command_line_are_laid_over_each_other_key_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(STUDENT + "training:\n  alpha: 2\n  seed: 1\n  max_steps: 0\n")
    (tmp_path / "b.yaml").write_text("training:\n  seed: x\ncache: {top_k: 0}\n")
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    source = read_files(files, {"training": {"max_steps": "none", "batch_size": "0"}})
    assert source is not None
    with pytest.raises(ValueError) as caught:
        load_source(source)
    lines = str(caught.value).splitlines()
    assert [line.split(" is ")[0] for line in lines[1:]] == [
        "a.yaml:3: training.alpha",
        "b.yaml:2: training.seed",
        "b.yaml:3: cache.top_k",
        "--config: training.batch_size",
    ]


def test_a_template_is_left_to_snakemake(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("__use_yte__: true\n" + STUDENT)
    assert read_files([path], {}) is None


def test_a_config_with_defaults_is_the_same_from_a_file_and_from_python() -> None:
    text = (
        STUDENT
        + "training: {alpha: 0.25, max_steps: 5}\ncache: {top_k: full}\nruns: {a: , b: {cache: {top_k: 8}}}\n"
    )
    assert load_source(parse_yaml(text, "mine.yaml")) == load_runs(yaml.safe_load(text))
