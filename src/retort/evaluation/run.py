"""Held-out metrics of a student, and of its teacher if it has one: metrics.json, with documents.csv beside it.

The metrics are defined in `metrics` (at every position) and `scores` (means, intervals, classes). The teacher's
distributions come from the features that `score_validation` stored: no teacher is loaded here.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from retort.cluster.gpus import count_threads
from retort.config.handoff import Job
from retort.config.sections import Evaluation
from retort.evaluation.breakdowns import find_classes
from retort.evaluation.card import complete_card
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
from retort.io.digests import compare_digests, digest, digest_folder
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, RunRecord, describe_run
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
from retort.teacher.features import OTHER_TOKENIZER, TeacherFeatures, digest_keys, read_features
from retort.teacher.records import Manifest
from retort.teacher.validation import has_tokenizer
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import load_tokenizer
from retort.tokens.vocabularies import find_difference
from retort.training.model_card import CARD
from retort.training.record import TrainingRecord


def evaluate_student(
    student: CausalLM,
    table: SequenceTable,
    *,
    teacher: TeacherFeatures | None,
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


def _load_own_tokenizer(path: str) -> tuple[Any, str | None]:
    """Return (tokenizer, None), or (None, error message) when it does not load.

    A student whose tokenizer does not load (one with custom code, for example) is measured without bits per byte.
    """
    try:
        return load_tokenizer(path), None
    except ValueError as error:
        return None, str(error)


def _shares_ids(fingerprint_path: Path | None, index: TokenIndex, tokenizer: Any) -> bool:
    """Whether the ids of a recorded teacher, if there is one, mean the same tokens as in the student's tokenizer.

    Tokenizers from equal files are not loaded; a teacher's that cannot be loaded counts as different.
    """
    if fingerprint_path is None:
        return True
    record = TeacherRecord.read(fingerprint_path)
    if tokenizer is None or has_tokenizer(record, index):
        return has_tokenizer(record, index)
    try:
        teachers = load_tokenizer(record.name, revision=record.revision)
    except ValueError:
        return False
    return len(tokenizer) <= record.vocabulary and find_difference(tokenizer, teachers) is None


def read_trained_student(source: Path) -> tuple[Path, TrainingRecord]:
    """Return final/ beside a training.json, `source`, and the record.

    Raises ValueError when the files in final/ are not those that are recorded; the card, which gets the numbers of an
    evaluation and may be edited, is not compared.
    """
    record, folder = TrainingRecord.read(source), source.parent / "final"
    recorded = {name: known for name, known in record.final.items() if name != CARD}
    if faults := compare_digests(recorded, digest_folder(folder)):
        raise ValueError(
            f"{folder} is not what {source} records: {', '.join(faults)}. Delete {source} and rerun the same command: "
            "training resumes from its last checkpoint and writes the student again."
        )
    return folder, record


def _require_sources(
    record: TrainingRecord,
    *,
    training_path: Path,
    index: TokenIndex,
    manifest_path: Path | None,
) -> tuple[Manifest | None, RunRecord | None]:
    """Return the manifest of the cache, and the run.json beside training.json; None for a file that there is not.

    Raises ValueError when the index, the cache or run.json are not those of the training.
    """
    if record.tokens != index.record.content:
        raise ValueError(
            f"{index.path} is of other tokens (content {index.record.content}) than those that the student of "
            f"{training_path} was trained on ({record.tokens}). Give --index, the index.json of its training."
        )
    manifest = Manifest.read(manifest_path) if manifest_path else None
    if manifest:
        codec = manifest.header.get("codec")
        copied = {name: getattr(manifest, name) for name in ("method", "top_k", "min_probability")}
        is_whole = isinstance(codec, dict) and copied.items() <= codec.items()
        if not is_whole or digest(manifest.header) != record.cache:
            raise ValueError(
                f"{manifest_path} does not describe the cache that {training_path} records: it was changed, or is of "
                "another cache. Give --signal, the manifest.json of its training, as it was written."
            )
    trained_path = training_path.with_name(RUN_FILE)
    trained = RunRecord.read(trained_path) if trained_path.exists() else None
    if trained:
        section = trained.config.get("training")
        settings = section if isinstance(section, dict) else {}
        names = ("distillation_type", "alpha", "temperature", "seed")
        differing = [name for name in names if settings.get(name) != getattr(record, name)]
        if trained.run not in (None, record.run):
            differing.insert(0, "run")
        if differing:
            raise ValueError(
                f"{trained_path} is of another run than {training_path} ({', '.join(differing)} differ): restore the "
                "run.json of this training, or delete it."
            )
    return manifest, trained


def _open_teacher(
    path: Path, table: SequenceTable, weights: str | None, *, made_from: Path
) -> TeacherFeatures:
    """Read the teacher's features of `table`. Raises ValueError for other sequences or other teacher weights."""
    teacher = read_features(path)
    teacher.require("val", table, source=path)
    if weights is not None:
        teacher.require_teacher(weights, source=path, made_from=made_from)
    return teacher


def _read_weights(fingerprint_path: Path | None, features_path: Path) -> str:
    """Return the weights' digest of the teacher that a student which had none is compared with.

    Raises ValueError without its fingerprint.json: features do not say which tokenizer their teacher has.
    """
    if fingerprint_path is None:
        raise ValueError(
            f"--features {features_path}: the student was trained without a teacher, so its record does not say whose "
            "features these are. Give --signal, the fingerprint.json of that teacher, which resolve_teacher.py wrote."
        )
    return TeacherRecord.read(fingerprint_path).weights


def _sample_student(
    model: PreTrainedModel,
    tokenizer: Any,
    table: SequenceTable,
    evaluation: Evaluation,
    *,
    features_path: Path | None,
    weights: str | None,
    date: str,
) -> dict[str, Samples]:
    """Let the student continue the prompts that its teacher was given; return the samples of both."""
    prompts = choose_prompts(table, tokenizer, evaluation.samples, date=date)
    found = {"student": sample_model(model, tokenizer, prompts, evaluation.samples)}
    if features_path is not None:
        teacher_path = features_path.with_name(SAMPLES_FILE)
        teacher = read_samples(teacher_path, of=weights, whose="teacher")["teacher"]
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
    features_path: Path | None,
    signal_path: Path | None,
) -> str:
    """Evaluate the student in final/ beside training.json, write metrics.json, return a one-line summary.

    Samples of the student and its teacher go into samples.json beside it; the teacher's come from beside
    `features_path`. `signal_path`: manifest.json of the cache that it learned from, else fingerprint.json of its
    teacher; a teacher with another tokenizer is not compared with.
    Raises ValueError when final/ is not what training wrote, index, cache or run.json are not those of the training,
    or the features are of another teacher or other text.
    """
    evaluation, training = job.config.evaluation, job.config.training
    torch.set_num_threads(count_threads(training))
    index = TokenIndex.read(index_path)
    started = time.monotonic()
    folder, record = read_trained_student(training_path)
    is_cache = signal_path is not None and signal_path.name == "manifest.json"
    manifest_path, fingerprint_path = (signal_path, None) if is_cache else (None, signal_path)
    manifest, trained = _require_sources(
        record, training_path=training_path, index=index, manifest_path=manifest_path
    )
    table = index.read_split("val", max_positions=evaluation.max_positions)
    tokenizer, no_tokenizer = _load_own_tokenizer(str(folder))
    is_foreign = not _shares_ids(fingerprint_path, index, tokenizer)
    weights = record.teacher
    if features_path is not None and weights is None:
        weights = _read_weights(fingerprint_path, features_path)
    teacher = None
    if features_path is not None and not is_foreign:
        source = fingerprint_path or training_path
        teacher = _open_teacher(features_path, table, weights, made_from=source)
    chosen = choose_device(training.device)
    model = load_pretrained(str(folder), dtype=torch.float32).to(chosen).eval()
    scores, sums = evaluate_student(
        split_model(model),
        table,
        teacher=teacher.to(chosen) if teacher else None,
        batch_size=evaluation.batch_size,
        next_bytes=no_tokenizer
        or count_next_bytes(table, tokenizer, changed=index.held_out_normalized),
        token_counts=index.read_token_counts(),
        name=f"run {record.run!r}",
    )
    samples = {"student": Samples((), missing=no_tokenizer)}
    if tokenizer:
        samples = _sample_student(
            model,
            tokenizer,
            table,
            evaluation,
            features_path=features_path,
            weights=weights,
            date=index.chat_date,
        )
    reasons = dict.fromkeys(OF_BOTH, OTHER_TOKENIZER) if is_foreign else {}
    metrics = Metrics(
        training=record,
        teacher=teacher.name if teacher else None,
        teacher_parameters=teacher.num_parameters if teacher else None,
        content=digest_keys(table),
        tokens=index.record.content,
        sequences=len(table),
        leaked_sequences=index.count_leaked(table),
        text=TextCounts(documents=index.record.counts.documents, train=index.record.train),
        units=UNITS,
        scores=scores.model_copy(update={"not_defined": scores.not_defined | reasons}),
        cache=manifest,
        trained=trained,
        made=describe_run(
            section={"evaluation": evaluation},
            seed=evaluation.samples.seed,
            dtype="float32",
            device=describe_device(chosen),
            seconds=time.monotonic() - started,
        ),
    )
    write_samples(out.with_name(SAMPLES_FILE), samples, of=record.id)
    write_document_sums(out.with_name(DOCUMENTS_FILE), sums)
    complete_card(folder, metrics)
    metrics.write(out)
    return f"evaluate {record.run}  {_describe(scores)}"


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
