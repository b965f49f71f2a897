"""The demo's teacher, made small: the same from the same text, without held-out documents."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from retort.config.schema import flatten
from retort.config.sections import Student
from retort.corpus.documents import Counts, Document
from retort.corpus.reading import read_shard_documents
from retort.io.fingerprints import TeacherRecord, fingerprint_tokenizer, fingerprint_weights
from retort.io.run_record import RunRecord
from retort.models.students import student_config
from retort.pipeline.demo_teacher import (
    DEMO_TEACHER,
    DemoTokenizer,
    make_demo_teacher,
    train_tokenizer,
)
from support.jobs import make_job
from support.tiny import tiny_dataset

SMALL = replace(
    DEMO_TEACHER,
    vocabulary=290,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    max_steps=6,
    batch_size=8,
    cpu_threads=1,
    tokenizer_documents=60,
)


def read_all(corpus: Path, **values: Any) -> list[Document]:
    dataset = tiny_dataset(corpus, num_shards=1, **values)
    return list(read_shard_documents(dataset, shard=0, num_shards=1, counts=Counts()))


def make(folder: Path, corpus: Path, **values: Any) -> Path:
    dataset = tiny_dataset(corpus, **values)
    job = make_job(dataset=dataset)
    make_demo_teacher(folder / "fingerprint.json", job, snapshot=None, size=SMALL)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    return make(tmp_path_factory.mktemp("teacher"), tiny_corpus)


def test_tokenizer_has_the_size_asked_for_and_loses_no_text(tiny_corpus: Path) -> None:
    documents = read_all(tiny_corpus)
    tokenizer = train_tokenizer(iter(documents), SMALL)
    assert len(tokenizer) == SMALL.vocabulary
    for text in (documents[3].text, "naïve — 日本語 \t\n  two  spaces", "<p>&amp;"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    longest = max(documents, key=lambda d: len(d.text)).text
    assert len(tokenizer(longest)["input_ids"]) < 0.75 * len(
        longest.encode()
    )  # merges were learned


def test_tokenizer_is_the_same_from_the_same_text(tiny_corpus: Path, tmp_path: Path) -> None:
    documents = read_all(tiny_corpus)
    for name in ("one", "two"):
        train_tokenizer(iter(documents), SMALL).save_pretrained(tmp_path / name)
    assert fingerprint_tokenizer(tmp_path / "one") == fingerprint_tokenizer(tmp_path / "two")


def test_tokenizer_reads_no_more_documents_than_given(tiny_corpus: Path, tmp_path: Path) -> None:
    documents = read_all(tiny_corpus)
    others = documents[: SMALL.tokenizer_documents] + [
        replace(d, text="zzyzx qqfq " * 50) for d in documents[SMALL.tokenizer_documents :]
    ]
    train_tokenizer(iter(documents), SMALL).save_pretrained(tmp_path / "one")
    train_tokenizer(iter(others), SMALL).save_pretrained(tmp_path / "two")
    assert fingerprint_tokenizer(tmp_path / "one") == fingerprint_tokenizer(tmp_path / "two")


def test_the_tokenizer_is_as_predicted_before_its_training(made: Path, tmp_path: Path) -> None:
    before, tokenizer = (
        DemoTokenizer(SMALL.vocabulary),
        AutoTokenizer.from_pretrained(made / "model"),
    )
    assert len(before) == len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(before, name) == getattr(tokenizer, name)
    path = tmp_path / "student.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}))
    configs = [
        student_config(Student(config=str(path)), vocabulary=len(t), tokenizer=t).to_dict()
        for t in (before, tokenizer)
    ]
    assert configs[0] == configs[1]


def test_teacher_is_a_model_that_transformers_loads(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    assert model.config.vocab_size == len(tokenizer) == SMALL.vocabulary
    assert model.config.max_position_embeddings == 48  # dataset.max_length
    out = model.generate(
        **tokenizer("The ", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert out.shape[1] > 1
    record = TeacherRecord.read(made / "fingerprint.json")
    assert record.weights == fingerprint_weights(made / "model")
    assert record.tokenizer.model_dump() == {
        "fingerprint": fingerprint_tokenizer(made / "model"),
        "size": SMALL.vocabulary,
    }
    assert (record.name, record.vocabulary, record.revision) == ("demo", 290, None)
    assert dict(flatten(RunRecord.read(made / "run.json").config))["demo_teacher.hidden_size"] == 16


def test_teacher_is_the_same_from_the_same_text(
    made: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    again = make(tmp_path, tiny_corpus)
    assert TeacherRecord.read(again / "fingerprint.json") == TeacherRecord.read(
        made / "fingerprint.json"
    )
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (made, again)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_teacher_never_sees_what_is_held_out(tiny_corpus: Path, tmp_path: Path) -> None:
    documents = read_all(tiny_corpus)
    held_out = [d for d in documents if d.split == "val"]
    assert len(held_out) > 10
    rest = tmp_path / "rest.jsonl"
    rows = [{"text": d.text} for d in documents if d.split == "train"]
    rest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with_them = make(tmp_path / "with", tiny_corpus, num_shards=1)
    without = make(tmp_path / "without", rest, num_shards=1, validation_fraction=0.0)
    found = [TeacherRecord.read(f / "fingerprint.json") for f in (with_them, without)]
    assert found[0] == found[1]


def test_a_finished_teacher_is_made_again_into_the_same(made: Path, tiny_corpus: Path) -> None:
    before = TeacherRecord.read(made / "fingerprint.json")
    (made / "fingerprint.json").unlink()  # killed just before its last step
    assert TeacherRecord.read(make(made, tiny_corpus) / "fingerprint.json") == before


@pytest.mark.parametrize("break_it", [lambda row: row | {"text": " "}, lambda row: {"text": ""}])
def test_a_corpus_without_text_is_refused(
    break_it: Callable[[dict[str, str]], dict[str, str]], tiny_corpus: Path, tmp_path: Path
) -> None:
    rows = [break_it(json.loads(line)) for line in tiny_corpus.read_text().splitlines()]
    (tmp_path / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"no document is left to train.*max_samples"):
        make(tmp_path / "teacher", tmp_path / "empty.jsonl")


def test_one_document_which_is_held_out_is_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no document is left to train.*now 1\)"):
        make(tmp_path / "teacher", tiny_corpus, max_samples=1)
