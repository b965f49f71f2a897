"""Held-out metrics of a student, and of its teacher if it has one: metrics.json, with documents.csv beside it.

The metrics are defined in `metrics` (at every position) and `scores` (means, intervals, classes). The teacher's
distributions come from the features that `score_validation` stored: no teacher is loaded here.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from retort.cluster.gpus import count_threads
from retort.config.handoff import Job
from retort.config.sections import Evaluation
from retort.evaluation.breakdowns import find_classes
from retort.evaluation.card import complete_card
from retort.evaluation.inputs import Subject, read_subject
from retort.evaluation.intervals import DocumentSums
from retort.evaluation.metrics import Columns, measure_positions
from retort.evaluation.records import Metrics, Scores, TextCounts
from retort.evaluation.scores import (
    DOCUMENTS_FILE,
    OF_BOTH,
    UNITS,
    summarise,
    write_document_sums,
)
from retort.evaluation.text_bytes import count_next_bytes
from retort.io.run_record import RunRecord, describe_run
from retort.models.causal_lm import CausalLM, split_model
from retort.models.generate import sample_model
from retort.models.load import choose_device, describe_device, load_pretrained
from retort.models.samples import (
    SAMPLES_FILE,
    Samples,
    choose_prompts,
    read_samples,
    require_prompts,
    write_samples,
)
from retort.teacher.features import (
    OTHER_TOKENIZER,
    MixedFeatures,
    TeacherFeatures,
    digest_keys,
)
from retort.tokens.sequences import SequenceTable

_NO_TEXT = "several teachers are mixed position by position; their mixture has written no text"


def evaluate_student(
    student: CausalLM,
    table: SequenceTable,
    *,
    teacher: TeacherFeatures | MixedFeatures | None,
    batch_size: int,
    next_bytes: NDArray[np.int64] | str | None = None,
    token_counts: NDArray[np.int64] | None = None,
    name: str = "the model",
) -> tuple[Scores, DocumentSums]:
    """Return the scores of a student on held-out sequences, and the sums of each document.

    `next_bytes` [P]: bytes of text of the token that each counted position predicts, or why that is not defined;
    without it, no bits per byte.
    `token_counts` [V]: how often each token occurs in the training text; without it, no classes by frequency.
    Raises ValueError when there are no held-out positions, or outputs of the student, which errors call `name`, are not
    finite.
    """
    if table.num_positions == 0:
        raise ValueError(
            "no held-out position to evaluate on: raise dataset.validation_fraction, or add documents."
        )
    columns = measure_positions(student, table, teacher=teacher, batch_size=batch_size)
    _require_finite(columns, name)
    classes = find_classes(
        table, token_counts=token_counts, teacher_entropy=columns.get("teacher_entropy")
    )
    documents_P = np.repeat(table.documents, np.diff(table.position_offsets))
    return summarise(columns, documents_P, bytes_P=next_bytes, classes=classes)


def _require_finite(columns: Columns, name: str) -> None:
    """Raise ValueError when a model's own metrics are not finite: weights that are may be too large to compute with."""
    own = np.stack([columns[key] for key in ("loss", "entropy", "confidence")])
    bad_P: NDArray[np.bool_] = np.asarray(~np.isfinite(own).all(axis=0))
    if bad_P.any():
        raise ValueError(
            f"{name} diverged in training: its loss or probabilities are not finite at {bad_P.sum():,} of "
            f"{bad_P.size:,} held-out positions. Lower training.learning_rate, or raise training.warmup_steps, and "
            "train it again."
        )


def _sample_student(
    model: PreTrainedModel,
    subject: Subject,
    evaluation: Evaluation,
    *,
    features_paths: Sequence[Path],
) -> dict[str, Samples]:
    """Let the student continue the prompts that its teacher was given; return the samples of both.

    Without a tokenizer it has none. Several teachers have none: their mixture has written nothing.
    """
    if subject.no_tokenizer:
        return {"student": Samples((), missing=subject.no_tokenizer)}
    settings = evaluation.samples
    prompts = choose_prompts(
        subject.table, subject.tokenizer, settings, date=subject.index.chat_date
    )
    found = {"student": sample_model(model, subject.tokenizer, prompts, settings)}
    if len(features_paths) > 1:
        found["teacher"] = Samples(tuple(prompts), missing=_NO_TEXT)
    elif features_paths:
        teacher_path = features_paths[0].with_name(SAMPLES_FILE)
        teacher = read_samples(teacher_path, of=subject.weights, whose="teacher")["teacher"]
        if teacher.missing is None:
            require_prompts(teacher, prompts, source=teacher_path)
        found["teacher"] = replace(teacher, prompts=tuple(prompts))
    return found


def evaluate_run(
    out: Path,
    job: Job,
    *,
    index_path: Path,
    training_path: Path,
    features_paths: Sequence[Path],
    signal_paths: Sequence[Path],
) -> str:
    """Evaluate the student in final/ beside training.json, write metrics.json, return a one-line summary.

    Samples of the student and its teacher go into samples.json beside it; the teacher's come from beside
    `features_paths`. `signal_paths`: manifest.json of the cache that it learned from, else fingerprint.json of its
    teacher; a teacher with another tokenizer is not compared with. Of several teachers one of each, in the order of
    teacher.mix: the student is compared with their mixture.
    Raises ValueError as `read_subject` and `evaluate_student` do.
    """
    started = time.monotonic()
    torch.set_num_threads(count_threads(job.config.training))
    subject = read_subject(
        job,
        index_path=index_path,
        training_path=training_path,
        features_paths=features_paths,
        signal_paths=signal_paths,
    )
    device = choose_device(job.config.training.device)
    model = load_pretrained(str(subject.folder), dtype=torch.float32).to(device).eval()
    scores, sums = _score(model, subject, batch_size=job.config.evaluation.batch_size)
    samples = _sample_student(model, subject, job.config.evaluation, features_paths=features_paths)
    made = describe_run(
        section={"evaluation": job.config.evaluation},
        seed=job.config.evaluation.samples.seed,
        dtype="float32",
        device=describe_device(device),
        seconds=time.monotonic() - started,
    )
    metrics = _gather(subject, scores, made)
    write_samples(out.with_name(SAMPLES_FILE), samples, of=subject.record.id)
    write_document_sums(out.with_name(DOCUMENTS_FILE), sums)
    complete_card(subject.folder, metrics)
    metrics.write(out)
    return f"evaluate {subject.record.run}  {_describe(scores)}"


def _score(
    model: PreTrainedModel, subject: Subject, *, batch_size: int
) -> tuple[Scores, DocumentSums]:
    """Return what `evaluate_student` does of a subject whose student is loaded."""
    next_bytes: NDArray[np.int64] | str = subject.no_tokenizer or count_next_bytes(
        subject.table, subject.tokenizer, changed=subject.index.held_out_normalized
    )
    return evaluate_student(
        split_model(model),
        subject.table,
        teacher=subject.teacher.to(model.device) if subject.teacher else None,
        batch_size=batch_size,
        next_bytes=next_bytes,
        token_counts=subject.index.read_token_counts(),
        name=f"run {subject.record.run!r}",
    )


def _gather(subject: Subject, scores: Scores, made: RunRecord) -> Metrics:
    """Return the record of an evaluation."""
    teacher, index = subject.teacher, subject.index
    reasons = dict.fromkeys(OF_BOTH, OTHER_TOKENIZER) if subject.is_foreign else {}
    return Metrics(
        training=subject.record,
        teacher=teacher.name if teacher else None,
        teacher_parameters=teacher.num_parameters if teacher else None,
        content=digest_keys(subject.table),
        tokens=index.record.content,
        sequences=len(subject.table),
        leaked_sequences=index.count_leaked(subject.table),
        text=TextCounts(documents=index.record.counts.documents, train=index.record.train),
        units=UNITS,
        scores=scores.model_copy(update={"not_defined": scores.not_defined | reasons}),
        cache=subject.manifests[0] if subject.manifests else None,
        other_caches=tuple(subject.manifests[1:]),
        trained=subject.trained,
        made=made,
    )


def _describe(scores: Scores) -> str:
    metrics = scores.student.metrics
    loss = metrics["loss"]
    interval = f" ({loss.ends[0]:.4f} to {loss.ends[1]:.4f})" if loss.ends else ""
    against = (
        f", KL to the teacher {metrics['kl_to_teacher'].value:.4f}, agreement {metrics['agreement'].value:.1%}"
        if scores.teacher
        else ""
    )
    return f"held-out loss {loss.value:.4f} nats/token{interval}{against}"
