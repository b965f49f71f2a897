"""Held-out metrics of a student, and of its teacher if it has one: metrics.json, with documents.csv beside it.

The metrics are defined in `metrics` (at every position) and `scores` (means, intervals, classes). The teacher's
distributions come from the features that `score_validation` stored: no teacher is loaded here.
"""

import time
from collections.abc import Sequence
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
from retort.io.digests import compare_digests, digest_folder
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
from retort.teacher.features import (
    OTHER_TOKENIZER,
    MixedFeatures,
    TeacherFeatures,
    digest_keys,
    name_mixture,
    read_features,
)
from retort.teacher.records import Manifest
from retort.teacher.validation import has_tokenizer
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import load_tokenizer
from retort.tokens.vocabularies import find_difference
from retort.training.model_card import CARD
from retort.training.record import TrainingRecord, digest_caches

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


def _load_own_tokenizer(path: str) -> tuple[Any, str | None]:
    """Return (tokenizer, None), or (None, error message) when it does not load.

    A student whose tokenizer does not load (one with custom code, for example) is measured without bits per byte.
    """
    try:
        return load_tokenizer(path), None
    except ValueError as error:
        return None, str(error)


def _require_one_of_each(job: Job, features_paths: Sequence[Path]) -> None:
    """Raise ValueError unless there are features of each teacher, or of none."""
    count = len(job.config.teacher.members)
    if features_paths and len(features_paths) != count:
        raise ValueError(
            f"--features names {len(features_paths)} files, but there are {count} teachers (teacher.mix): give the "
            "teacher_validation.safetensors of each, in their order."
        )


def _shares_ids(fingerprint_path: Path, index: TokenIndex, tokenizer: Any) -> bool:
    """Whether the ids of a recorded teacher mean the same tokens as in the student's tokenizer.

    Tokenizers from equal files are not loaded; a teacher's that cannot be loaded counts as different.
    """
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
    manifest_paths: Sequence[Path],
    weights: tuple[float, ...],
) -> tuple[list[Manifest], RunRecord | None]:
    """Return the manifests of the caches, and the run.json beside training.json, None if there is none.

    weights: of several teachers. Raises ValueError when the index, the caches or run.json are not those of the
    training.
    """
    if record.tokens != index.record.content:
        raise ValueError(
            f"{index.path} is of other tokens (content {index.record.content}) than those that the student of "
            f"{training_path} was trained on ({record.tokens}). Give --index, the index.json of its training."
        )
    manifests = [Manifest.read(path) for path in manifest_paths]
    found = digest_caches([m.header for m in manifests], weights) if manifests else record.cache
    for path, manifest in zip(manifest_paths, manifests, strict=True):
        codec = manifest.header.get("codec")
        copied = {name: getattr(manifest, name) for name in ("method", "top_k", "min_probability")}
        is_whole = isinstance(codec, dict) and copied.items() <= codec.items()
        if not is_whole or found != record.cache:
            raise ValueError(
                f"{path} does not describe the cache that {training_path} records: it was changed, or is of "
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
    return manifests, trained


def _open_teachers(
    paths: Sequence[Path],
    table: SequenceTable,
    known: str | None,
    *,
    weights: tuple[float, ...],
    made_from: Path,
) -> TeacherFeatures | MixedFeatures:
    """Read the features of `table` of a teacher, or of several with `weights`.

    known: the digest of the teacher's weights, or of all teachers'. Raises ValueError for other sequences or teachers.
    """
    members = [read_features(path) for path in paths]
    for path, member in zip(paths, members, strict=True):
        member.require("val", table, source=path)
    if len(members) == 1:
        if known is not None:
            members[0].require_teacher(known, source=paths[0], made_from=made_from)
        return members[0]
    found = name_mixture([member.teacher for member in members], weights)
    if known is not None and found != known:
        raise ValueError(
            f"{', '.join(map(str, paths))} were scored by teachers {found}, but {made_from} records {known}. Give "
            "--features in the order of teacher.mix, with the weights of the training; if a teacher's files have "
            "changed, delete them and rerun the same command."
        )
    return MixedFeatures(tuple(members), weights)


def _read_weights(
    fingerprint_paths: Sequence[Path], features_paths: Sequence[Path], weights: tuple[float, ...]
) -> str:
    """Return the weights' digest of the teacher that a student which had none is compared with, or of several.

    Raises ValueError without its fingerprint.json: features do not say which tokenizer their teacher has.
    """
    if len(fingerprint_paths) != len(features_paths):
        raise ValueError(
            f"--features {', '.join(map(str, features_paths))}: the student was trained without a teacher, so its "
            "record does not say whose features these are. Give --signal, the fingerprint.json of that teacher, which "
            "resolve_teacher.py wrote."
        )
    return name_mixture([TeacherRecord.read(path).weights for path in fingerprint_paths], weights)


def _sample_student(
    model: PreTrainedModel,
    tokenizer: Any,
    table: SequenceTable,
    evaluation: Evaluation,
    *,
    features_paths: Sequence[Path],
    weights: str | None,
    date: str,
) -> dict[str, Samples]:
    """Let the student continue the prompts that its teacher was given; return the samples of both.

    Several teachers have none: their mixture has written nothing.
    """
    prompts = choose_prompts(table, tokenizer, evaluation.samples, date=date)
    found = {"student": sample_model(model, tokenizer, prompts, evaluation.samples)}
    if len(features_paths) > 1:
        found["teacher"] = Samples(tuple(prompts), missing=_NO_TEXT)
    elif features_paths:
        teacher_path = features_paths[0].with_name(SAMPLES_FILE)
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
    features_paths: Sequence[Path],
    signal_paths: Sequence[Path],
) -> str:
    """Evaluate the student in final/ beside training.json, write metrics.json, return a one-line summary.

    Samples of the student and its teacher go into samples.json beside it; the teacher's come from beside
    `features_paths`. `signal_paths`: manifest.json of the cache that it learned from, else fingerprint.json of its
    teacher; a teacher with another tokenizer is not compared with. Of several teachers one of each, in the order of
    teacher.mix: the student is compared with their mixture.
    Raises ValueError when final/ is not what training wrote, index, cache or run.json are not those of the training,
    or the features are of another teacher or other text.
    """
    evaluation, training = job.config.evaluation, job.config.training
    torch.set_num_threads(count_threads(training))
    index = TokenIndex.read(index_path)
    started = time.monotonic()
    folder, record = read_trained_student(training_path)
    shares = job.config.teacher.weights
    _require_one_of_each(job, features_paths)
    manifest_paths = [path for path in signal_paths if path.name == "manifest.json"]
    fingerprint_paths = [path for path in signal_paths if path not in manifest_paths]
    manifests, trained = _require_sources(
        record,
        training_path=training_path,
        index=index,
        manifest_paths=manifest_paths,
        weights=shares,
    )
    table = index.read_split("val", max_positions=evaluation.max_positions)
    tokenizer, no_tokenizer = _load_own_tokenizer(str(folder))
    is_foreign = not all(_shares_ids(path, index, tokenizer) for path in fingerprint_paths)
    weights = record.teacher
    if features_paths and weights is None:
        weights = _read_weights(fingerprint_paths, features_paths, shares)
    teacher = None
    if features_paths and not is_foreign:
        source = fingerprint_paths[0] if fingerprint_paths else training_path
        teacher = _open_teachers(features_paths, table, weights, weights=shares, made_from=source)
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
            features_paths=features_paths,
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
        cache=manifests[0] if manifests else None,
        other_caches=tuple(manifests[1:]),
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
