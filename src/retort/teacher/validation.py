"""The teacher reads the held-out text and a sample of the training text, once for all students."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retort.config.handoff import Job
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, describe_run
from retort.models.causal_lm import CausalLM
from retort.models.generate import sample_model
from retort.models.heads import Head
from retort.models.load import choose_device, describe_device, load_recorded_teacher, name_dtype
from retort.models.samples import SAMPLES_FILE, Samples, choose_prompts, write_samples
from retort.teacher.features import OTHER_TOKENIZER, TeacherFeatures, digest_keys, write_features
from retort.teacher.scoring import Scorer, score_features
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def score_validation(out: Path, job: Job, *, index_path: Path, fingerprint_path: Path) -> None:
    """Write the teacher's features of the held-out sequences and of an evenly spaced sample of the training sequences.

    samples.json beside them holds the teacher's continuations of some prompts, run.json how it was made. A student of
    text alone may have another tokenizer: without the teacher's tokenizer no prompt is continued, and with ids that the
    teacher does not know the features are empty too. Raises ValueError when no document is held out, or the teacher is
    not the recorded one or cannot read sequences that long.
    """
    section, evaluation, teacher_path = job.config.teacher, job.config.evaluation, job.teacher_path
    torch.set_num_threads(section.generation.cpu_threads)
    started = time.monotonic()
    index = TokenIndex.read(index_path)
    validation = index.read_split("val", max_positions=evaluation.max_positions)
    if validation.num_positions == 0:
        raise ValueError(
            "no document is held out, so no student can be evaluated: raise dataset.validation_fraction, or add "
            f"documents (there are {index.record.train.documents} to train on)."
        )
    record = TeacherRecord.read(fingerprint_path)
    samples, dtype = Samples((), missing=OTHER_TOKENIZER), None
    if index.record.tokenizer.size > record.vocabulary:
        logger.info(f"the teacher does not know the tokens of this text: {OTHER_TOKENIZER}.")
        found = _build_empty(record, validation)
    else:
        teacher = load_recorded_teacher(
            teacher_path, section, record_path=fingerprint_path, longest=index.longest
        )
        dtype = name_dtype(teacher.model.dtype)
        if has_tokenizer(record, index):
            tokenizer = load_tokenizer(
                teacher_path, revision=record.revision, trust_remote_code=section.trust_remote_code
            )
            prompts = choose_prompts(
                validation, tokenizer, evaluation.samples, date=index.chat_date
            )
            samples = sample_model(teacher.model, tokenizer, prompts, evaluation.samples)
        train_sequences, training = index.read_sample(num_positions=evaluation.fidelity_positions)
        logger.info(
            f"{validation.num_positions:,} held-out positions, {training.num_positions:,} to measure the cache with"
        )
        found = score_tables(
            teacher,
            fingerprint=record.weights,
            name=record.name,
            num_tokens=index.record.tokenizer.size,
            validation=validation,
            training=training,
            train_sequences=train_sequences,
            batch_size=section.generation.batch_size,
        )
        teacher.require_unchanged()
    write_samples(out.with_name(SAMPLES_FILE), {"teacher": samples}, of=record.weights)
    describe_run(
        section={"teacher": section, "evaluation": evaluation},
        dtype=dtype,
        device=describe_device(choose_device(section.device)),
        seconds=time.monotonic() - started,
    ).write(out.with_name(RUN_FILE))
    write_features(out, found)


def has_tokenizer(record: TeacherRecord, index: TokenIndex) -> bool:
    """Say whether the tokens were made by the tokenizer of a recorded teacher (its fingerprint.json)."""
    return record.tokenizer.fingerprint == index.record.tokenizer.fingerprint


def score_tables(
    teacher: CausalLM,
    *,
    fingerprint: str,
    name: str,
    num_tokens: int,
    validation: SequenceTable,
    training: SequenceTable,
    train_sequences: NDArray[np.int64],
    batch_size: int,
) -> TeacherFeatures:
    """Return the teacher's features of the held-out sequences and of the sample of training sequences.

    fingerprint, name, num_tokens: as in `TeacherFeatures`. train_sequences int64 [S]: indices of the S sequences of
    `training` among all training sequences. Raises ValueError where memory runs out with a single sequence.
    """
    tables = {"val": validation, "train": training}
    total = sum(len(t.ids) for t in tables.values())
    seen = 0

    def on_batch(tokens: int) -> None:
        nonlocal seen
        before, seen = seen, seen + tokens
        if before * 10 // max(1, total) != seen * 10 // max(1, total):
            logger.info(f"scored {seen:,} of {total:,} tokens")

    features = {
        split: collect_features(teacher, table, batch_size=batch_size, on_batch=on_batch)
        for split, table in tables.items()
    }
    return TeacherFeatures(
        features=features,
        train_sequences=train_sequences,
        head=teacher.head,
        num_tokens=num_tokens,
        teacher=fingerprint,
        name=name,
        num_parameters=teacher.num_parameters,
        keys={split: digest_keys(table) for split, table in tables.items()},
    )


def collect_features(
    teacher: CausalLM, table: SequenceTable, *, batch_size: int, on_batch: Callable[[int], None]
) -> Tensor:
    """Return the features [P, D] at all counted positions of a table, in the table's order, on the CPU."""
    pieces: list[Tensor] = [torch.empty(0)] * len(table)
    for index, features_PD in score_features(Scorer(teacher, batch_size), table, on_batch=on_batch):
        pieces[index] = features_PD.cpu()
    return torch.cat(pieces) if pieces else torch.empty((0, 0))


def _build_empty(record: TeacherRecord, validation: SequenceTable) -> TeacherFeatures:
    """Return the features of a teacher that has read no sequence."""
    splits = ("val", "train")
    return TeacherFeatures(
        features=dict.fromkeys(splits, torch.empty((0, 0))),
        train_sequences=np.zeros(0, np.int64),
        head=Head(weight=None),
        num_tokens=0,
        teacher=record.weights,
        name=record.name,
        num_parameters=0,
        keys=dict.fromkeys(splits, digest_keys(validation.slice(0, 0))),
    )
