"""`retort init`, typed by a user: the config that it writes runs to the report as it is."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from retort.evaluation.records import Metrics
from retort.tokens.index import IndexRecord
from support.hub import MODEL, NAME, Hub
from support.place import Finished, Place, tiny
from support.tiny import CHAT_TEMPLATE


def init(place: Place, *words: str) -> Finished:
    """Type `retort init` in a place, whose shell is no terminal."""
    return place.execute([sys.executable, "-m", "retort", "init", *words])


def run(place: Place) -> dict[str, Metrics]:
    """Run the written config to its report; return the metrics of its runs."""
    place.snakemake(config="mine.yaml")
    assert (place.results / "report.html").is_file()
    paths = place.results.glob("runs/*/*/evaluation/*/metrics.json")
    return {path.parents[3].name: Metrics.read(path) for path in paths}


def test_files_and_a_teacher_become_a_config_that_runs_to_the_report(fresh: Place) -> None:
    said = init(fresh, "--corpus", "documents.jsonl", "--teacher", "teacher", "--student", "16k")
    assert said.returncode == 0, said.output
    assert said.output.endswith("\n  retort run mine.yaml\n") and "costly" not in said.output
    text = (fresh.path / "mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    config = yaml.safe_load(text)
    assert config["dataset"]["max_length"] == 128, "what the teacher can read"
    assert config["student"] == {"config": "mine.student.json"}
    assert "vocab_size" not in json.loads((fresh.path / "mine.student.json").read_text())
    assert set(run(fresh)) == {"text", "soft"} == set(config["runs"])
    again = init(fresh, "--corpus", "documents.jsonl", "--teacher", "teacher")
    assert again.returncode == 1 and "mine.yaml exists already" in again.output
    assert (fresh.path / "mine.yaml").read_text() == text


def test_chats_and_a_pretrained_student_become_a_config_that_runs_to_the_report(
    fresh: Place,
) -> None:
    (fresh.path / "teacher" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    turns = [("user", "How many?"), ("assistant", "There are {}."), ("user", "And now?")]
    chats = [
        [
            {"role": role, "content": text.format(n)}
            for role, text in [*turns, ("assistant", "One.")]
        ]
        for n in range(40)
    ]
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (fresh.path / "chats").mkdir()
    (fresh.path / "chats" / "all.jsonl").write_text(rows)
    said = init(fresh, "--corpus", "chats", "--teacher", "teacher", "--student", "teacher")
    assert said.returncode == 0, said.output
    dataset = yaml.safe_load((fresh.path / "mine.yaml").read_text())["dataset"]
    assert dataset["data_files"] == "chats/**/*.jsonl" and dataset["messages_column"] == "messages"
    assert set(run(fresh)) == {"text", "soft"}
    index = IndexRecord.read(next(fresh.results.glob("tokens/*/index.json")))
    assert 0 < index.train.positions < index.train.tokens / 2, (
        "what the assistant says, and no more"
    )


def test_a_dataset_and_a_teacher_of_the_hub_become_a_config_that_passes_the_check(
    fresh: Place, hub: Hub, tmp_path: Path
) -> None:
    hub.publish_inputs(fresh, tmp_path)
    said = init(fresh, "--corpus", NAME, "--teacher", MODEL, "--student", "16k")
    assert said.returncode == 0, said.output
    assert hub.requests["model.safetensors"] == 0, "weights are not needed to look"
    text = (fresh.path / "mine.yaml").read_text()
    assert "# 120 documents (text)" in text
    dataset = yaml.safe_load(text)["dataset"]
    assert dataset["name"] == NAME and "streaming" not in dataset, "it is small"


def test_a_costly_default_is_named_on_the_terminal_once(fresh: Place) -> None:
    fresh.write_config(tiny(cache=None, runs=None, training={"temperature": 1.0}))
    command = [sys.executable, "-m", "retort", "run", "tiny.yaml", "--cores", "2"]
    said = fresh.execute([*command, "--until", "check_inputs"])
    assert said.returncode == 0, said.output
    assert said.output.count("costly default: cache.method is left at its default") == 1
    assert said.output.count("costly default") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--corpus", "none.jsonl"], "--corpus 'none.jsonl' does not exist"),
        (["--corpus", "nobody/stories"], "dataset.name 'nobody/stories' could not be reached"),
        (["--corpus", "empty"], "--corpus 'empty' has no file that ends in .jsonl, .json"),
        (["--corpus", "odd.jsonl"], "column 'text' is not in odd.jsonl, line 1, which has 'body'"),
        (["--teacher", "nobody/teacher"], "cannot load the model 'nobody/teacher'"),
        (["--student", "5k"], "5k parameters are too few for the teacher's 320 ids"),
        (["--student", "none.json"], "--student 'none.json' does not exist"),
        (["--set", "training.seed=1"], "--set training: give keys of dataset and teacher only"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_leaves_no_file(
    fresh: Place, words: list[str], reason: str
) -> None:
    (fresh.path / "odd.jsonl").write_text(json.dumps({"body": "A text."}) + "\n")
    (fresh.path / "empty").mkdir()
    (fresh.path / "empty" / "notes.md").touch()
    good = {"--corpus": "documents.jsonl", "--teacher": "teacher", "--student": "16k"}
    given = good | dict([words])
    said = init(fresh, *(word for pair in given.items() for word in pair))
    assert said.returncode == 1
    *before, line = said.output.splitlines()
    assert line.startswith("error: ") and reason in line
    # Without a network the Hub's client may say that it tries again.
    assert not before or words[0] == "--teacher", before
    assert not [*Path(fresh.path).glob("mine*")]


def test_on_a_terminal_it_asks_for_what_no_flag_gives(fresh: Place) -> None:
    words = [sys.executable, "-m", "retort", "init", "--output", "asked.yaml"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words, cwd=fresh.path, env=fresh.environment(), stdin=theirs, stdout=subprocess.PIPE
    )
    os.write(ours, b"documents.jsonl\nteacher\n16k\n")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and said.decode().count("a model [") == 1
    config = yaml.safe_load((fresh.path / "asked.yaml").read_text())
    assert config["teacher"]["model_path"] == "teacher"
    assert config["student"] == {"config": "asked.student.json"}


def test_a_column_can_be_named_and_files_named_for_validation_are_held_out(fresh: Place) -> None:
    for name, number in (("train", 30), ("valid", 5)):
        rows = [json.dumps({"body": f"A text of {n} and {name}."}) + "\n" for n in range(number)]
        (fresh.path / f"{name}.jsonl").write_text("".join(rows))
    words = ["--corpus", "*.jsonl", "--teacher", "teacher", "--set", "dataset.text_column=body"]
    (fresh.path / "documents.jsonl").unlink()
    said = init(fresh, *words, "--output", "other.yaml")
    assert said.returncode == 0, said.output
    dataset = yaml.safe_load((fresh.path / "other.yaml").read_text())["dataset"]
    assert dataset["data_files"] == ["train.jsonl"], dataset
    assert dataset["validation_files"] == ["valid.jsonl"] and dataset["text_column"] == "body"
