"""Without check_inputs too, a model with fewer positions than the longest sequence is refused before any scoring."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from retort.teacher.validation import score_validation
from retort.teacher.worker import generate_logits
from retort.tokens.index import TokenIndex
from retort.training.run import train_run
from support.jobs import make_job
from support.sections import section
from support.tiny import WIDTH, record, tokenize

LONGEST = 48
SIZES = {"vocab_size": WIDTH, "n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def index_path(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_teacher: Path
) -> Path:
    return tokenize(tmp_path_factory.mktemp("tokens"), tiny_corpus, tiny_teacher)


def make_teacher(folder: Path, tiny_teacher: Path, *, context: int) -> Path:
    """A GPT-2, whose position embeddings end with its context, and the tiny tokenizer."""
    GPT2LMHeadModel(GPT2Config(n_positions=context, **SIZES)).save_pretrained(folder)
    for path in tiny_teacher.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def load_as(teacher: Path) -> Any:
    return section("teacher", model_path=str(teacher), device="cpu")


def score_training(folder: Path, index_path: Path, teacher: Path) -> None:
    generate_logits(
        folder / "metadata_worker0.json",
        make_job(teacher=load_as(teacher), cache=section("cache", top_k=4)),
        index_path=index_path,
        fingerprint_path=record(folder, teacher),
        worker=0,
        num_workers=1,
    )


def score_held_out(folder: Path, index_path: Path, teacher: Path) -> None:
    score_validation(
        folder / "teacher_validation.safetensors",
        make_job(teacher=load_as(teacher)),
        index_path=index_path,
        fingerprint_path=record(folder, teacher),
    )


def train(folder: Path, index_path: Path, teacher: Path, student: Path, **given: Any) -> None:
    job = make_job(
        teacher=load_as(teacher),
        student=section("student", config=str(student)),
        training=section("training", **({"max_steps": 1, "device": "cpu", "alpha": 0.5} | given)),
    )
    signal = record(folder, teacher)
    train_run(folder / "abc" / "training.json", job, index_path=index_path, signal_paths=[signal])


def train_from_it(folder: Path, index_path: Path, teacher: Path) -> None:
    train(folder, index_path, teacher, write_student(folder, context=LONGEST))


def write_student(folder: Path, *, context: int) -> Path:
    path = folder / "student.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_positions": context} | SIZES))
    return path


def test_the_index_knows_the_longest_sequence(index_path: Path) -> None:
    index = TokenIndex.read(index_path)
    found = {split: int(index.read_split(split).lengths.max()) for split in ("train", "val")}
    assert {"train": index.record.train.longest, "val": index.record.val.longest} == found
    assert index.longest == max(found.values()) == LONGEST


@pytest.mark.slow
@pytest.mark.parametrize("use", [score_training, score_held_out, train_from_it])
def test_a_teacher_too_short_for_the_longest_sequence_is_refused_before_anything_is_scored(
    use: Any, index_path: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = make_teacher(tmp_path / "short", tiny_teacher, context=LONGEST - 1)
    says = rf"longest sequence is 48 tokens, but teacher '{teacher}' has at most 47 .*: 47"
    with pytest.raises(ValueError, match=says) as caught:
        use(tmp_path, index_path, teacher)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.rglob("*.h5"), *tmp_path.rglob("teacher_validation*")]
    use(tmp_path, index_path, make_teacher(tmp_path / "long", tiny_teacher, context=LONGEST))


def test_a_student_too_short_for_the_longest_sequence_is_refused(
    index_path: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    short = write_student(tmp_path, context=LONGEST - 1)
    with pytest.raises(ValueError, match=r"48 tokens, but the student .* at most 47 positions"):
        train(tmp_path, index_path, tiny_teacher, short, distillation_type="output", alpha=1.0)
    assert not (tmp_path / "abc").exists()
