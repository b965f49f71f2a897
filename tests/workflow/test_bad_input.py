"""A user's mistake is one clear message, before any expensive job."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retort.tokens.index import IndexRecord
from support.place import Place, tiny

CHEAP_JOBS = {"check_inputs"}
Prepare = Callable[[Path], object]


def refuse(place: Place, config: dict[str, Any], *words: str) -> str:
    """Run a config that must be refused before any expensive job, by a line with all these words; return that line."""
    place.write_config(config)
    done = place.try_snakemake()
    assert done.returncode != 0, done.output
    started = {path.name for path in place.path.glob("logs/*")}
    assert started <= CHEAP_JOBS, started
    assert "Traceback" not in done.output, done.output
    lines = [line for line in done.output.splitlines() if all(word in line for word in words)]
    assert lines, f"no line with {words} in:\n{done.output}"
    assert not place.results.exists() or not list(place.results.glob("[!.c]*/*"))
    return lines[0]


def over(**sections: Any) -> dict[str, Any]:
    """Return the tiny config with some sections changed."""
    return tiny(**sections)


SEEN_IN_THE_CONFIG = {
    "unknown key": (
        over(training={"alhpa": 0.5}),
        ["Unknown config key training.alhpa", "Did you mean training.alpha?"],
    ),
    "unknown section": (over(trainign={"alpha": 0.5}), ["trainign", "training"]),
    "old name": (over(teacher={"teacher_model_path": "x"}), ["teacher_model_path", "model_path"]),
    "old name in another section": (
        over(training={"num_train_epochs": 3}),
        ["num_train_epochs", "training.num_epochs"],
    ),
    "wrong type": (
        over(training={"max_steps": "many"}),
        ["training.max_steps", "'many'", "integer"],
    ),
    "out of range": (over(training={"learning_rate": -1}), ["training.learning_rate", "-1"]),
    "no such choice": (
        over(training={"distillation_type": "soft"}),
        ["training.distillation_type", "'soft'", "logit"],
    ),
    "in one run": (
        over(runs={"both": {"training": {"alpha": 2.0}}}),
        ["runs.both.training.alpha", "2.0"],
    ),
    "an endless stream": (
        over(dataset={"name": "json", "streaming": True}),
        ["dataset.streaming", "dataset.max_samples", "for instance"],
    ),
    "a model larger than the GPUs": (
        over(teacher={"generation": {"gpus": "0,1", "gpus_per_model": 4}}),
        ["gpus_per_model is 4", "0,1", "List at least 4"],
    ),
    "responses that nobody reads": (
        over(synthesis={"provider": "openai"}),
        ["synthesis.provider is 'openai'", "Set dataset.name: synthesis"],
    ),
    "a batch that GPUs cannot share": (
        over(training={"gpus": 3}),
        ["training.gpus x training.nodes is 3", "is 4 sequences a step"],
    ),
    "missing file": (
        over(dataset={"data_files": "documents.json"}),
        ["'documents.json' does not exist", "Did you mean 'documents.jsonl'"],
    ),
    "no file matches": (
        over(dataset={"data_files": "no/*.jsonl"}),
        ["'no/*.jsonl' matches no file"],
    ),
    "missing student": (
        over(student={"config": "nobody.json"}),
        ["student.config 'nobody.json' does not exist", "config/students/"],
    ),
    "no JSON of a student": (
        over(student={"config": "documents.jsonl"}),
        ["student.config 'documents.jsonl' is not JSON", "Fix the file"],
    ),
}


@pytest.mark.parametrize("name", SEEN_IN_THE_CONFIG)
def test_a_mistake_in_the_config_stops_everything(fresh: Place, name: str) -> None:
    config, words = SEEN_IN_THE_CONFIG[name]
    refuse(fresh, config, *words)
    assert not (fresh.path / "logs").exists(), "nothing was started"


def test_a_model_larger_than_the_machines_gpus_is_refused(fresh: Place) -> None:
    small = Place(fresh.path, env={"CUDA_VISIBLE_DEVICES": "0,1"})
    config = over(teacher={"generation": {"gpus_per_model": 4}})
    refuse(small, config, "gpus_per_model is 4", "only 2 GPUs (0,1)", "Lower it")


def _write_documents(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _break_a_line(folder: Path) -> None:
    lines = (folder / "documents.jsonl").read_text().splitlines()
    lines[2] = lines[2][:20]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")


def _remove_weights(folder: Path) -> None:
    (folder / "teacher" / "model.safetensors").unlink()


def _add_tokens_beyond_the_output_layer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(50)])
    tokenizer.save_pretrained(folder / "teacher")


def _shrink_the_students_vocabulary(folder: Path) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 299}))


def _swap_two_tokens(folder: Path) -> None:
    shutil.copytree(folder / "teacher", folder / "other")
    path = folder / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def _nothing(folder: Path) -> None:
    pass


SEEN_BY_THE_CHECK: dict[str, tuple[Prepare, dict[str, Any], list[str]]] = {
    "missing column": (
        _nothing,
        over(dataset={"text_column": "body"}),
        ["documents.jsonl", "'body'", "text"],
    ),
    "empty corpus": (
        lambda folder: (folder / "documents.jsonl").write_text(""),
        over(),
        ["no usable document", "0 read"],
    ),
    "all documents empty": (
        lambda folder: _write_documents(
            folder / "documents.jsonl", {"text": ""}, {"text": " \n"}, {"text": "\0"}
        ),
        over(),
        ["no usable document", "3 read", "3 empty", "dataset.text_column"],
    ),
    "a line that is no JSON": (
        _break_a_line,
        over(),
        ["documents.jsonl, line 3 is not JSON", "fix or remove the line"],
    ),
    "a folder without weights": (
        _remove_weights,
        over(),
        ["no model weights in 'teacher'", "Hub id"],
    ),
    "a path that is no model": (
        lambda folder: (folder / "notes").mkdir(),
        over(teacher={"model_path": "notes"}),
        ["'notes'", "config.json"],
    ),
    "a name that nobody knows": (
        _nothing,
        over(teacher={"model_path": "nobody/no-model"}),
        ["'nobody/no-model'"],
    ),
    "a tokenizer beyond the output layer": (
        _add_tokens_beyond_the_output_layer,
        over(),
        ["the tokenizer", "350 tokens", "only 320", "they do not belong together"],
    ),
    "a live teacher of another tokenizer": (
        _swap_two_tokens,
        over(
            dataset={"tokenizer": "other"},
            training={"use_cached_logits": False},
            runs={"live": {"training": {"distillation_type": "logit"}}},
        ),
        ["'other'", "the teacher 'teacher'", "different ids: 'b', id", "2 of 300 tokens differ"],
    ),
    "a student of another tokenizer": (
        _swap_two_tokens,
        over(student={"config": None, "model_path": "other"}),
        ["the student 'other'", "different ids: 'a', id", "2 of 300 tokens differ"],
    ),
    "a student's vocabulary too small": (
        _shrink_the_students_vocabulary,
        over(),
        ["vocab_size is 299", "the 300 ids of the tokenizer", "leave it out"],
    ),
    "longer sequences than the teacher knows": (
        _nothing,
        over(dataset={"max_length": 256}),
        ["dataset.max_length is 256", "128", "dataset.max_length: 128 or less"],
    ),
}


@pytest.mark.parametrize("name", SEEN_BY_THE_CHECK)
def test_a_mistake_in_the_inputs_is_found_by_check_inputs(fresh: Place, name: str) -> None:
    prepare, config, words = SEEN_BY_THE_CHECK[name]
    prepare(fresh.path)
    said = refuse(fresh, config, *words)
    assert said.startswith("error: ")


def test_a_results_folder_that_cannot_be_written_is_refused(fresh: Place) -> None:
    (fresh.path / "full").write_text("a file, not a folder")
    for folder in ("full/results", "/proc/results"):
        config = over(output={"results_dir": folder})
        refuse(fresh, config, "cannot write to", folder, "set output.results_dir")
        assert not (fresh.path / "logs").exists(), "nothing was started"


def test_odd_documents_are_handled_counted_and_reported(fresh: Place) -> None:
    rows = [json.loads(line) for line in (fresh.path / "documents.jsonl").read_text().splitlines()]
    odd = [
        {"text": ""},
        {"text": "\0 \0"},
        {"text": None},
        {"text": 7},
        {"text": "a\0b in one word"},
        {"text": "half of a pair: \ud800 alone"},
        {"text": "".join(rows[i % 100]["text"] for i in range(60_000))[:10_000_000]},
    ]
    _write_documents(fresh.path / "documents.jsonl", *rows, *odd)
    fresh.write_config(over(dataset={"num_shards": 1, "long_documents": "truncate"}))
    path = fresh.find_output(r"^results/tokens/\w+/index\.json$")
    said = fresh.snakemake(path)
    index = IndexRecord.read(fresh.path / path)

    documents, tokens = index.counts.documents, index.counts.tokens
    assert documents.read == len(rows) + len(odd)
    assert documents.skipped == {"empty": 2, "not_text": 2}
    assert documents.cleaned == {"lone_surrogate": 1, "nul": 1}
    assert documents.used == documents.read - 4
    accounted = ("stored", "truncated", "without_loss", "too_short")
    assert tokens.read == sum(getattr(tokens, key) for key in accounted)
    assert tokens.stored == index.train.tokens + index.val.tokens
    assert tokens.truncated > 1_000_000
    line = rf"documents: {documents.read} read = {documents.used} used \+ skipped "
    line += r"\(2 empty \(rows \d+, \d+\), 2 not_text \(rows \d+, \d+\)\)"
    assert re.search(line, said)
