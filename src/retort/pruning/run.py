"""The job of `prune_teacher`: a part of a teacher, or of another model, for all students that start from it."""

import logging
import shutil
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from retort.artifacts.starts import part_keys, student_content
from retort.config.handoff import Job
from retort.config.student import FromTeacher
from retort.io.digests import digest
from retort.io.files import apply_umask, file_lock
from retort.io.fingerprints import TeacherRecord, fingerprint_weights
from retort.io.run_record import RUN_FILE, describe_run
from retort.models.load import (
    choose_device,
    describe_device,
    fingerprint_model,
    load_model_config,
    load_pretrained,
    name_dtype,
    refuse_offloaded,
    require_weights,
)
from retort.pruning.cut import keep_layers, narrow, require_prunable
from retort.pruning.importance import measure_importance
from retort.pruning.record import PruningRecord, model_folder
from retort.pruning.shapes import Plan, count_layers, plan_pruning
from retort.pruning.width import Importance
from retort.tokens.index import TokenIndex
from retort.tokens.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def prune_model(
    out: Path, job: Job, *, fingerprint_path: Path | None, index_path: Path | None
) -> None:
    """Write `out` (pruned.json), and model/ beside it: a part of the teacher, or of student.model_path if it is set.

    fingerprint_path: the teacher's record, None for another model. index_path: index.json of the text that activations
    are measured on, None if none are.

    Raises ValueError when student.from_teacher is not set or does not fit the model, the model is not the recorded one
    or cannot be pruned, and when activations are to be measured on no text.
    """
    student = job.config.student
    if not student.is_pruned:
        raise ValueError(
            "student.from_teacher is not set, so there is nothing to prune: give what to keep, such as --set "
            "student.from_teacher.layers=4."
        )
    if student.from_teacher.is_measured and index_path is None:
        raise ValueError(
            f"student.from_teacher asks for {student.start}, and what to keep is measured on text: give --index "
            "(index.json of the tokens)."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = "another process prunes this model: waiting for it"
    with file_lock(out.parent / ".lock", busy=busy):
        if not out.exists():
            _prune(out, job, fingerprint_path, index_path)


def _prune(out: Path, job: Job, fingerprint_path: Path | None, index_path: Path | None) -> None:
    started, student, section = time.monotonic(), job.config.student, job.config.teacher
    path, revision, source = _find_source(job, fingerprint_path)
    name, config = f"the model {path!r}", load_model_config(path, revision=revision)
    plan = plan_pruning(student, config, name=name)
    require_prunable(config, plan, name=name)
    torch.set_num_threads(section.generation.cpu_threads)
    device = choose_device(section.device if student.from_teacher.is_measured else "cpu")
    placed = {"device_map": "auto"} if device.type == "cuda" else {}
    whole = load_pretrained(path, revision=revision, dtype="auto", **placed)
    refuse_offloaded(getattr(whole, "hf_device_map", {}), path=path)
    num_parameters = whole.num_parameters()
    small = keep_layers(whole, plan, name=name)
    importance = _measure(whole, plan, student.from_teacher, index_path)
    del whole  # `small` is a copy
    if plan.is_narrower:
        small = narrow(small, plan, importance)
    _save(out, job, small, source=(path, revision))
    describe_run(
        section={"student": student, "teacher": section},
        dtype=name_dtype(small.dtype),
        device=describe_device(device),
        seconds=time.monotonic() - started,
    ).write(out.with_name(RUN_FILE))
    num_layers = count_layers(config)
    assert num_layers is not None
    PruningRecord(
        name=path,
        revision=revision,
        source=source,
        part=part_keys(student.from_teacher),
        layers=plan.layers,
        num_layers=num_layers,
        parameters=small.num_parameters(),
        weights=fingerprint_weights(model_folder(out), record=out),
    ).write(out)
    logger.info(
        f"{path}: layers {', '.join(map(str, plan.layers))} of {num_layers}, {small.num_parameters():,} of "
        f"{num_parameters:,} parameters"
    )


def _measure(
    whole: PreTrainedModel, plan: Plan, part: FromTeacher, index_path: Path | None
) -> Importance | None:
    """Return how active the planned layers are on a sample of the training sequences; None if that is not asked."""
    if not part.is_measured:
        return None
    assert index_path is not None
    index = TokenIndex.read(index_path)
    train = index.record.train
    positions = round(part.calibration_samples * train.positions / max(1, train.sequences))
    numbers, table = index.read_sample(num_positions=positions)
    logger.info(f"activations on {len(numbers):,} of {train.sequences:,} training sequences")
    return measure_importance(whole, plan.layers, table)


def _save(out: Path, job: Job, small: PreTrainedModel, *, source: tuple[str, str | None]) -> None:
    """Write model/ with the pruned model and the tokenizer of its `source` (path, revision), atomically."""
    temporary, folder = out.with_name(".model.tmp"), model_folder(out)
    shutil.rmtree(temporary, ignore_errors=True)
    small.save_pretrained(temporary)
    path, revision = source
    load_tokenizer(path, revision=revision).save_pretrained(temporary)
    apply_umask(temporary.glob("*.safetensors"))
    _require_same_source(job)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _find_source(job: Job, fingerprint_path: Path | None) -> tuple[str, str | None, str]:
    """Return (path or Hub id, commit, fingerprint of the weights) of the model to prune.

    Raises ValueError when it is not the recorded one.
    """
    student = job.config.student
    if student.model_path is not None:
        _require_same_source(job)
        source, commit = fingerprint_model(student.model_path, revision=student.revision)
        return student.model_path, commit, source
    path = job.teacher_path
    if fingerprint_path is None:
        source, commit = fingerprint_model(path, revision=job.config.teacher.revision)
        return path, commit, source
    record = TeacherRecord.read(fingerprint_path)
    require_weights(record, path, source=fingerprint_path)
    return path, record.revision, record.weights


def _require_same_source(job: Job) -> None:
    """Raise ValueError when the model of student.model_path is not the one that the id was made from."""
    student = job.config.student
    if job.expected.get("student") not in (None, digest(student_content(student))):
        raise ValueError(
            f"{student.model_path} changed since the command began, and the id of what is pruned from it was made from "
            "the old weights. Rerun the same command: it prunes the new ones."
        )
