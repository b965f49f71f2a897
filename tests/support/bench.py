"""A tiny, complete training: corpus, teacher, caches, student, and reading of its results."""

import csv
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from retort.config.load import identity
from retort.config.training import DEFAULT_ALPHA
from retort.io.digests import digest
from retort.models.causal_lm import CausalLM
from retort.models.load import load_teacher
from retort.tokens.index import TokenIndex
from retort.tokens.tokenizer import load_tokenizer
from retort.training.batches import TrainingSource
from retort.training.curve import LOG_COLUMNS
from retort.training.held_out import HeldOut, open_held_out
from retort.training.job import TrainingJob
from retort.training.loop import train_student
from retort.training.record import TrainingSummary
from support.sections import section
from support.tiny import WIDTH, make_cache, record, tokenize

SAMPLE = 9  # held-out sequences that are measured in a training
GPT2_WITH_DROPOUT = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 128,
    "resid_pdrop": 0.2,  # the state of its random numbers must be restored
}


class Bench:
    """The tiny corpus as tokens and as caches, with teacher and student."""

    def __init__(self, folder: Path, corpus: Path, teacher: Path, student: Path) -> None:
        self.folder, self.teacher_path, self.student_path = folder, teacher, student
        self.index_path = tokenize(folder / "tokens", corpus, teacher)
        self.fingerprint = record(folder, teacher)
        self.index = TokenIndex.read(self.index_path)
        self.table = self.index.read_split("train")
        self.cache = make_cache(folder / "top8", self.index_path, teacher, top_k=8)
        self.full = make_cache(folder / "full", self.index_path, teacher, top_k="full")

    def train(
        self,
        folder: Path,
        source: TrainingSource,
        *,
        live: bool = False,
        **training: Any,
    ) -> TrainingSummary:
        student = training.pop("student", self.student_path)
        interval_s = training.pop("progress_interval_s", 10.0)
        keys: dict[str, Any] = {
            "max_steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "temperature": 1.0,
            "device": "cpu",
            "dataloader_num_workers": 0,  # starting one takes as long as the training
        } | training
        teacher_section = section("teacher", device="cpu")
        job = self.job(
            source,
            student=student,
            tracking=keys.pop("tracking", None),
            teacher=load_teacher(str(self.teacher_path), teacher_section) if live else None,
            facts=keys.pop("facts", None),
            held_out=keys.pop("held_out", None),
            **keys,
        )
        return train_student(folder, job, progress_interval_s=interval_s)

    def hold_out(self, features: Path | None, **training: Any) -> HeldOut:
        """Return a sample of the held-out sequences, with the scores of `score_held_out` if there are any."""
        keys: dict[str, Any] = {"eval_sequences": SAMPLE, "eval_steps": 3}
        found = open_held_out(
            self.index,
            section("training", **(keys | training)),
            section("evaluation"),
            features={features: None} if features else {},
        )
        assert found is not None
        return found

    def job(
        self,
        source: TrainingSource,
        *,
        student: Path | None = None,
        teacher: CausalLM | None = None,
        tracking: dict[str, Any] | None = None,
        facts: dict[str, str] | None = None,
        held_out: HeldOut | None = None,
        **keys: Any,
    ) -> TrainingJob:
        """Return a training of the tiny student; its identity is that of its keys."""
        kind = keys.get("distillation_type", "hybrid")
        training = section("training", **({"alpha": DEFAULT_ALPHA[kind]} | keys))
        start = student or self.student_path
        return TrainingJob(
            name="run",
            identity=digest(identity(training)),
            source=source,
            student=section(
                "student", **{"model_path" if start.is_dir() else "config": str(start)}
            ),
            training=training,
            tracking=section("tracking", **(tracking or {})),
            tokenizer=load_tokenizer(str(self.teacher_path)),
            vocabulary=WIDTH,
            teacher=teacher,
            facts=facts or {},
            max_length=96,  # twice the longest
            held_out=held_out,
        )


def train_in_a_process(bench: Bench, folder: Path, log: Path, keys: dict[str, Any]) -> None:
    """Train from the cache, with the messages in a log; what a process of `real_processes` runs."""
    library = logging.getLogger("retort")
    library.setLevel(logging.INFO)
    library.addHandler(logging.FileHandler(log))
    bench.train(folder, bench.cache, **keys)


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    return weights


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "training_log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = read_weights(one), read_weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def assert_same_curve(one: Path, other: Path) -> None:
    """Compare all columns but the last, which is the machine's speed."""
    for mine, theirs in zip(read_log(one), read_log(other), strict=True):
        assert {k: mine[k] for k in LOG_COLUMNS[:-1]} == {k: theirs[k] for k in LOG_COLUMNS[:-1]}
