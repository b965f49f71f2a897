"""Held-out metrics of a student, and of its teacher where there is one: metrics.json, and documents.csv beside it.

What each metric is: rooms `metrics` (a number at every position) and `scores` (means, intervals, classes). The
teacher's side comes from what `score_validation` stored: no teacher is loaded here.
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
    write_documents,
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
    """Return the scores of one student on held-out sequences.

    `next_bytes` [P]: bytes of text of the token that each counted position predicts; without it, no bits per byte.
    `token_counts` [V]: how often each token comes in the training text; without it, no classes by frequency.
    Raises ValueError when there is nothing held out.
    """
    if table.num_positions == 0:
        raise ValueError(
            "no held-out position to evaluate on: raise dataset.validation_fraction, or give more documents."
        )
    columns = measure_positions(student, table, teacher=teacher, batch_size=batch_size)
    classes = find_classes(
        table, token_counts=token_counts, teacher_entropy=columns.get("teacher_entropy")
    )
    documents_P = np.repeat(table.documents, np.diff(table.position_offsets))
    return summarise(columns, documents_P, bytes_P=next_bytes, classes=classes)


def _load_own_tokenizer(path: str) -> tuple[Any, str | None]:
    """Return (tokenizer, None), or (None, why) where it does not load.

    A student that has no use of its tokenizer (one with code of its own, say) is measured all the same.
    """
    try:
        return load_tokenizer(path), None
    except ValueError as error:
        return None, str(error)


def _shares_ids(record: dict[str, Any], index: TokenIndex, tokenizer: Any) -> bool:
    """Say whether a recorded teacher means the tokens of the student's tokenizer by their ids.

    Without a look at it where the files are the same; what cannot be loaded is another one.
    """
    if tokenizer is None or has_tokenizer(record, index):
        return has_tokenizer(record, index)
    try:
        teachers = load_tokenizer(record["name"], revision=record["revision"])
    except ValueError:
        return False
    has_room = len(tokenizer) <= record["vocabulary"]
    return has_room and find_difference(tokenizer, teachers) is None


def refuse_other_student(folder: Path, record: dict[str, Any], source: Path) -> None:
    """Raise ValueError when the student is not the one that training.json was written for."""
    faults = compare_digests(record["final"], digest_folder(folder))
    if faults:
        raise ValueError(
            f"{folder} is not what {source} records: {', '.join(faults)}. Delete {source} and run the same command "
            "again: training goes on from its last checkpoint and writes the student anew."
        )


def _open_teacher(
    path: Path, table: SequenceTable, weights: str | None, *, made_from: Path
) -> TeacherFeatures:
    """Read what the teacher said of the very sequences of `table`; it must be the one that was trained with, if any."""
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
    teacher_path: Path | None,
    weights: str | None,
) -> dict[str, Samples]:
    """Let the student continue the prompts that its teacher was given; return both sides."""
    prompts = choose_prompts(table, tokenizer, evaluation)
    found = {"student": sample_model(model, tokenizer, prompts, evaluation)}
    if teacher_path is not None:
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
    """Evaluate the student in final/ beside training.json, write metrics.json, return its line.

    What the student writes goes into samples.json beside it; what its teacher writes lies beside `features_path`.
    `fingerprint_path`: the teacher's record, where the student did not learn from a cache: a teacher that means other
    tokens by the ids is not compared with.
    Raises ValueError when final/ is not what training wrote, or the teacher is not the one that was trained with.
    """
    torch.set_num_threads(cpu_threads)
    index = TokenIndex.read(index_path)
    record = read_json(training_path)
    folder = training_path.parent / "final"
    refuse_other_student(folder, record, training_path)
    table = index.read_split("val", max_positions=evaluation.max_positions)
    tokenizer, why_none = _load_own_tokenizer(str(folder))
    is_foreign = fingerprint_path is not None and not _shares_ids(
        read_json(fingerprint_path), index, tokenizer
    )
    teacher = None
    if features_path is not None and not is_foreign:
        teacher = _open_teacher(features_path, table, record["teacher"], made_from=training_path)
    chosen = choose_device(device)
    model = load_pretrained(str(folder), dtype=torch.float32).to(chosen).eval()
    samples = {"student": Samples((), missing=why_none)}
    if tokenizer:
        beside = features_path.with_name(SAMPLES_FILE) if features_path else None
        samples = _sample_student(
            model,
            tokenizer,
            table,
            evaluation,
            teacher_path=beside,
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
    found = scores.sections
    found["validation"]["content"] = digest_keys(table)
    found["validation"]["leaked_sequences"] = index.count_leaked(table)
    found["validation"]["sequences"] = len(table)
    found["not_defined"] |= {"bits_per_byte": why_none} if why_none else {}
    found["not_defined"] |= dict.fromkeys(OF_BOTH, OTHER_TOKENIZER) if is_foreign else {}
    provenance = _read_provenance(training_path.with_name("run.json"))
    metrics = _describe_run(record, teacher, manifest_path) | {"trained": provenance} | found
    out.parent.mkdir(parents=True, exist_ok=True)
    write_samples(out.with_name(SAMPLES_FILE), samples, of=record["id"])
    write_documents(out.with_name(DOCUMENTS_FILE), scores.sums)
    write_json(out, metrics)
    return f"evaluate {record['run']}  {_describe(found)}"


def _describe_run(
    record: dict[str, Any], teacher: TeacherFeatures | None, manifest_path: Path | None
) -> dict[str, Any]:
    """Return what metrics.json says of a run beside its scores: training, teacher, cache."""
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
    }


def _read_provenance(path: Path) -> dict[str, Any] | None:
    """Return what the report says of where a run comes from, out of its run.json; None where there is none."""
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
