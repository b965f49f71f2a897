"""Held-out metrics of a student, and of its teacher if it has one: metrics.json, with documents.csv beside it.

The metrics are defined in `metrics` (at every position) and `scores` (means, intervals, classes). The teacher's
distributions come from the features that `score_validation` stored: no teacher is loaded here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from retort.config.sections import Evaluation
from retort.evaluation.breakdowns import find_classes
from retort.evaluation.metrics import measure_positions
from retort.evaluation.scores import (
    DOCUMENTS_FILE,
    METRICS_FORMAT,
    METRICS_VERSION,
    OF_BOTH,
    Scores,
    summarise,
    write_document_sums,
)
from retort.evaluation.text_bytes import count_next_bytes
from retort.io.digests import compare_digests, digest_folder
from retort.io.files import read_json, write_json
from retort.models.generate import sample_model
from retort.models.load import CausalLM, choose_device, load_pretrained, split_model
from retort.models.samples import (
    SAMPLES_FILE,
    Samples,
    choose_prompts,
    read_samples,
    require_prompts,
    write_samples,
)
from retort.teacher.features import OTHER_TOKENIZER, TeacherFeatures, digest_keys, read_features
from retort.teacher.validation import has_tokenizer
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import load_tokenizer
from retort.tokens.vocabularies import find_difference

METRICS_FROM_TRAINING = (
    "run",
    "id",
    "distillation_type",
    "alpha",
    "temperature",
    "seed",
    "student_parameters",
    "steps",
    "device",
)
METRICS_FROM_MANIFEST = (
    "bytes_per_position",
    "positions",
    "method",
    "top_k",
    "min_probability",
    "tail_mass",
    "fidelity_kl",
    "fidelity_agreement",
)


def evaluate_student(
    student: CausalLM,
    table: SequenceTable,
    *,
    teacher: TeacherFeatures | None,
    batch_size: int,
    next_bytes: NDArray[np.int64] | None = None,
    token_counts: NDArray[np.int64] | None = None,
) -> Scores:
    """Return the scores of a student on held-out sequences.

    `next_bytes` [P]: bytes of text of the token that each counted position predicts; without it, no bits per byte.
    `token_counts` [V]: how often each token occurs in the training text; without it, no classes by frequency.
    Raises ValueError when there are no held-out positions.
    """
    if table.num_positions == 0:
        raise ValueError(
            "no held-out position to evaluate on: raise dataset.validation_fraction, or add documents."
        )
    columns = measure_positions(student, table, teacher=teacher, batch_size=batch_size)
    classes = find_classes(
        table, token_counts=token_counts, teacher_entropy=columns.get("teacher_entropy")
    )
    documents_P = np.repeat(table.documents, np.diff(table.position_offsets))
    return summarise(columns, documents_P, bytes_P=next_bytes, classes=classes)


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
    record = read_json(fingerprint_path)
    if tokenizer is None or has_tokenizer(record, index):
        return has_tokenizer(record, index)
    try:
        teachers = load_tokenizer(record["name"], revision=record["revision"])
    except ValueError:
        return False
    return len(tokenizer) <= record["vocabulary"] and find_difference(tokenizer, teachers) is None


def require_trained_student(folder: Path, record: dict[str, Any], source: Path) -> None:
    """Raise ValueError when the files of a student are not those that its training.json, `source`, records."""
    faults = compare_digests(record["final"], digest_folder(folder))
    if faults:
        raise ValueError(
            f"{folder} is not what {source} records: {', '.join(faults)}. Delete {source} and rerun the same command: "
            "training resumes from its last checkpoint and writes the student again."
        )


def _open_teacher(
    path: Path, table: SequenceTable, weights: str | None, *, made_from: Path
) -> TeacherFeatures:
    """Read the teacher's features of `table`. Raises ValueError for other sequences or other teacher weights."""
    teacher = read_features(path)
    teacher.require("val", table, source=path)
    if weights is not None:
        teacher.require_teacher(weights, source=path, made_from=made_from)
    return teacher


def _sample_student(
    model: PreTrainedModel,
    tokenizer: Any,
    table: SequenceTable,
    evaluation: Evaluation,
    *,
    features_path: Path | None,
    weights: str | None,
) -> dict[str, Samples]:
    """Let the student continue the prompts that its teacher was given; return the samples of both."""
    prompts = choose_prompts(table, tokenizer, evaluation)
    found = {"student": sample_model(model, tokenizer, prompts, evaluation)}
    if features_path is not None:
        teacher_path = features_path.with_name(SAMPLES_FILE)
        teacher = read_samples(teacher_path, of=weights, whose="teacher")["teacher"]
        if teacher.missing is None:
            require_prompts(teacher, prompts, source=teacher_path)
        found["teacher"] = replace(teacher, prompts=tuple(prompts))
    return found


def evaluate_run(
    out: Path,
    *,
    index_path: Path,
    training_path: Path,
    features_path: Path | None,
    manifest_path: Path | None,
    evaluation: Evaluation,
    device: str,
    cpu_threads: int,
    fingerprint_path: Path | None = None,
) -> str:
    """Evaluate the student in final/ beside training.json, write metrics.json, return a one-line summary.

    Samples of the student and its teacher go into samples.json beside it; the teacher's come from beside
    `features_path`. `fingerprint_path`: the teacher's fingerprint.json, for a student that did not learn from a cache;
    a teacher with another tokenizer is not compared with.
    Raises ValueError when final/ is not what training wrote, or the features are of another teacher or other text.
    """
    torch.set_num_threads(cpu_threads)
    index = TokenIndex.read(index_path)
    record = read_json(training_path)
    folder = training_path.parent / "final"
    require_trained_student(folder, record, training_path)
    table = index.read_split("val", max_positions=evaluation.max_positions)
    tokenizer, no_tokenizer = _load_own_tokenizer(str(folder))
    is_foreign = not _shares_ids(fingerprint_path, index, tokenizer)
    teacher = None
    if features_path is not None and not is_foreign:
        teacher = _open_teacher(features_path, table, record["teacher"], made_from=training_path)
    chosen = choose_device(device)
    model = load_pretrained(str(folder), dtype=torch.float32).to(chosen).eval()
    samples = {"student": Samples((), missing=no_tokenizer)}
    if tokenizer:
        samples = _sample_student(
            model,
            tokenizer,
            table,
            evaluation,
            features_path=features_path,
            weights=record["teacher"],
        )
    scores = evaluate_student(
        split_model(model),
        table,
        teacher=teacher.to(chosen) if teacher else None,
        batch_size=evaluation.batch_size,
        next_bytes=count_next_bytes(table, tokenizer) if tokenizer else None,
        token_counts=index.read_token_counts(),
    )
    reasons = {"bits_per_byte": no_tokenizer} if no_tokenizer else {}
    reasons |= dict.fromkeys(OF_BOTH, OTHER_TOKENIZER) if is_foreign else {}
    about = _describe_run(record, teacher, manifest_path, training_path.with_name("run.json"))
    metrics = about | _add_facts(scores.sections, table, index, reasons)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_samples(out.with_name(SAMPLES_FILE), samples, of=record["id"])
    write_document_sums(out.with_name(DOCUMENTS_FILE), scores.sums)
    write_json(out, metrics)
    return f"evaluate {record['run']}  {_describe(metrics)}"


def _add_facts(
    found: dict[str, Any], table: SequenceTable, index: TokenIndex, reasons: dict[str, str]
) -> dict[str, Any]:
    """Add to the scores what was measured on, and reasons for metrics that are not defined."""
    found["validation"]["content"] = digest_keys(table)
    found["validation"]["leaked_sequences"] = index.count_leaked(table)
    found["validation"]["sequences"] = len(table)
    found["not_defined"] |= reasons
    return found


def _describe_run(
    record: dict[str, Any],
    teacher: TeacherFeatures | None,
    manifest_path: Path | None,
    run_path: Path,
) -> dict[str, Any]:
    """Return the keys of metrics.json other than the scores: training, teacher, cache."""
    manifest = read_json(manifest_path) if manifest_path else None
    is_measured = manifest is not None and manifest["fidelity_kl"] is not None
    return {
        "format": METRICS_FORMAT,
        "version": METRICS_VERSION,
        **{name: record[name] for name in METRICS_FROM_TRAINING},
        "trained_tokens": record["trained_positions"],
        "training_seconds": record["seconds"],
        "teacher_parameters": teacher.num_parameters if teacher else None,
        "teacher": teacher.name if teacher else None,
        "cache": {name: manifest[name] for name in METRICS_FROM_MANIFEST}
        if manifest and is_measured
        else None,
        "trained": _read_provenance(run_path),
    }


def _read_provenance(path: Path) -> dict[str, Any] | None:
    """Return the parts of a run.json that the report shows; None when there is no such file."""
    if not path.exists():
        return None
    run: dict[str, Any] = read_json(path)
    kept = ("commit", "uncommitted_changes", "python", "versions", "finished")
    found: dict[str, Any] = {name: run[name] for name in kept} | run["config"]
    return found


def _describe(found: dict[str, Any]) -> str:
    scores, ends = found["validation"], found["intervals"]["validation"]["loss"]
    interval = f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
    against = (
        f", KL to the teacher {scores['kl_to_teacher']:.4f}, agreement {scores['agreement']:.1%}"
        if found["teacher_validation"]
        else ""
    )
    return f"held-out loss {scores['loss']:.4f} nats/token{interval}{against}"
