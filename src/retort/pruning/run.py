"""The job of `prune_teacher`: a part of a teacher, or of another model, for all students that start from it."""

import logging
import shutil
import time
from pathlib import Path

from retort.artifacts.starts import student_content
from retort.config.handoff import Job
from retort.config.load import identity
from retort.io.digests import digest
from retort.io.files import apply_umask, file_lock
from retort.io.fingerprints import TeacherRecord, fingerprint_weights
from retort.io.run_record import RUN_FILE, describe_run
from retort.models.load import (
    fingerprint_model,
    load_model_config,
    load_pretrained,
    require_weights,
)
from retort.pruning.cut import keep_layers
from retort.pruning.record import PruningRecord, model_folder
from retort.pruning.shapes import list_kept_layers, shape_config
from retort.tokens.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def prune_model(out: Path, job: Job, *, fingerprint_path: Path | None) -> None:
    """Write `out` (pruned.json), and model/ beside it: a part of the teacher, or of student.model_path if it is set.

    fingerprint_path: the teacher's record, None for another model. Raises ValueError when student.from_teacher is not
    set or does not fit the model, the model is not the recorded one, or it cannot be pruned.
    """
    student = job.config.student
    if not student.is_pruned:
        raise ValueError(
            "student.from_teacher is not set, so there is nothing to prune: give what to keep, such as --set "
            "student.from_teacher.layers=4."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = "another process prunes this model: waiting for it"
    with file_lock(out.parent / ".lock", busy=busy):
        if not out.exists():
            _prune(out, job, fingerprint_path)


def _prune(out: Path, job: Job, fingerprint_path: Path | None) -> None:
    started, student = time.monotonic(), job.config.student
    path, revision, source = _find_source(job, fingerprint_path)
    name = f"the model {path!r}"
    config = load_model_config(path, revision=revision)
    shaped = shape_config(student, config, name=name)
    kept = list_kept_layers(student.from_teacher, config)
    whole = load_pretrained(path, revision=revision, dtype="auto")
    small = keep_layers(whole, shaped, kept, name=name)
    temporary, folder = out.with_name(".model.tmp"), model_folder(out)
    shutil.rmtree(temporary, ignore_errors=True)
    small.save_pretrained(temporary)
    load_tokenizer(path, revision=revision).save_pretrained(temporary)
    apply_umask(temporary.glob("*.safetensors"))
    _require_same_source(job)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    seconds = time.monotonic() - started
    describe_run(section={"student": student}, seconds=seconds).write(out.with_name(RUN_FILE))
    num_layers, parameters = (
        whole.config.get_text_config().num_hidden_layers,
        small.num_parameters(),
    )
    PruningRecord(
        name=path,
        revision=revision,
        source=source,
        part=identity(student.from_teacher),
        layers=kept,
        num_layers=num_layers,
        parameters=parameters,
        weights=fingerprint_weights(folder, record=out),
    ).write(out)
    logger.info(
        f"{path}: layers {', '.join(map(str, kept))} of {num_layers}, {parameters:,} of "
        f"{whole.num_parameters():,} parameters"
    )


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
