"""One run: checks that tokens, tokenizer, teacher and student belong together, trains, and writes training.json."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from retort.artifacts.build import REVISIONS, list_selection, training_keys
from retort.artifacts.starts import starting_point
from retort.cache.local_copy import copy_cache
from retort.cache.reader import CACHE_FILE, LogitCache
from retort.cluster.ranks import rank
from retort.config.handoff import Job
from retort.config.sections import Student
from retort.io.digests import digest, digest_folder
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, describe_run
from retort.models.causal_lm import CausalLM
from retort.models.ends import list_ends_beside
from retort.models.load import (
    fingerprint_model,
    load_recorded_teacher,
    name_dtype,
    refuse_short_context,
)
from retort.models.students import name_student, student_config
from retort.pruning.record import choose_start
from retort.teacher.records import CacheRun
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from retort.tokens.vocabularies import require_student_ids, require_teacher_ids
from retort.training.held_out import HeldOut, open_held_out
from retort.training.job import TrainingJob
from retort.training.loop import train_student
from retort.training.origin import describe_origin
from retort.training.record import StartRecord, TrainingRecord, TrainingSummary

logger = logging.getLogger(__name__)

# What a student learns from: a cache, or a teacher's fingerprint.json.
Signal = LogitCache | TeacherRecord


def train_run(
    out: Path,
    job: Job,
    *,
    index_path: Path,
    signal_path: Path | None,
    start_path: Path | None = None,
    features_path: Path | None = None,
) -> None:
    """Train one student on the tokens, a cache or a live teacher, and write `out` (training.json) and its folder.

    `signal_path`: what it learns from: manifest.json or teacher_logits.h5 of a cache, or fingerprint.json of a teacher,
    which is run live unless alpha is 1. `start_path`: pruned.json of what it starts from, if that is a part of a model.
    `features_path`: the teacher's held-out scores, for its KL during the training.
    `job`: of a run; it may expect the student's digest when `out` was named.

    Raises ValueError when a teacher is needed and none is given, when the cache is of other tokens, when the student's
    files changed, when teacher, student and text use different ids or sequences are too long for them, and where
    `train_student` does.
    """
    signal, training = _open_signal(signal_path), job.config.training
    with ExitStack() as stack:
        if isinstance(signal, LogitCache) and training.cache_copy and training.needs_teacher:
            signal = stack.enter_context(copy_cache(signal, training.cache_copy))
        student = choose_start(job.config.student, start_path)
        index = TokenIndex.read(index_path)
        held_out = open_held_out(
            index,
            training,
            job.config.evaluation,
            features_path=features_path,
            weights=_weights(signal),
        )
        _train(out, job, signal, student, index=index, signal_path=signal_path, held_out=held_out)


def _train(
    out: Path,
    job: Job,
    signal: Signal | None,
    student: Student,
    *,
    index: TokenIndex,
    signal_path: Path | None,
    held_out: HeldOut | None,
) -> None:
    """Do what `train_run` says, with `signal` opened and `student` as it is loaded."""
    student, training = _pin_student(student, out.parent), job.config.training
    needs_teacher = training.needs_teacher
    if needs_teacher and signal is None:
        raise ValueError(
            f"distillation type {training.distillation_type!r} (alpha {training.alpha}) learns from a teacher: give "
            "--signal (manifest.json of a cache, or fingerprint.json of the teacher), or --set "
            "training.distillation_type=output."
        )
    path, revision = job.tokenizer
    tokenizer = _load_tokenizer(job, index)
    source = _choose_source(index, signal if needs_teacher else None)
    _require_same_start(job)
    if student.model_path:
        require_student_ids(
            tokenizer, source=path, student=student.model_path, revision=student.revision
        )
    # The width of the teacher's output layer, with text alone too: so all students of one config have the same size.
    vocabulary = max(_width(signal), len(tokenizer))
    config = student_config(student, vocabulary=vocabulary, tokenizer=tokenizer)
    refuse_short_context(config, index.longest, name_student(student))
    teacher = None
    if needs_teacher and signal_path and isinstance(signal, TeacherRecord):
        teacher = _load_live_teacher(job, signal_path, tokenizer=tokenizer, longest=index.longest)
    content = starting_point(job.config.model_copy(update={"student": student}))
    about: dict[str, Any] = {}
    if needs_teacher and signal_path:
        about["teacher"] = _describe_teacher(job, signal_path, teacher)
    facts = _describe_sources(index, signal if needs_teacher else None)
    max_length = job.config.dataset.max_length
    rows = [max_length] if training.packing else []
    rows += list_selection(job.config)
    written = job.config.student if job.config.student.is_pruned else student
    work = TrainingJob(
        name=job.run or "student",
        identity=digest([REVISIONS["run"], facts, content, training_keys(training), *rows]),
        source=source,
        student=student,
        training=training,
        tracking=job.config.tracking,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        teacher=teacher,
        facts={"run": out.parent.name, **facts},
        origin=describe_origin(job.config, has_teacher=needs_teacher),
        ends=tuple(list_ends_beside(path, tokenizer, revision=revision)),
        max_length=max_length,
        held_out=held_out,
        written=written,
    )
    summary = train_student(out.parent, work)
    _require_same_start(job)
    if rank() == 0:
        sections = {"student": written, "training": training, **about}
        _write_records(out, work, summary, signal=signal, student=digest(content), made=sections)
        logger.info(f"train {work.name}  {summary.steps} steps in {summary.seconds:.0f} s")


def _open_signal(path: Path | None) -> Signal | None:
    """Return the cache at or beside a path, or the record of a teacher.

    Raises ValueError when the cache is missing.
    """
    if path is None:
        return None
    if path.name == "fingerprint.json":
        return TeacherRecord.read(path)
    cache_path = path.with_name(CACHE_FILE) if path.suffix == ".json" else path
    if not cache_path.exists():
        raise ValueError(
            f"{cache_path} does not exist. In a workflow its manifest.json, which remains, counts as the finished "
            "cache: delete the manifest too and rerun the same command to make the cache again."
        )
    return LogitCache(cache_path)


def _width(signal: Signal | None) -> int:
    """Return the width of the teacher's output layer, 0 without a teacher."""
    if isinstance(signal, LogitCache):
        return signal.header.codec.vocabulary
    return signal.vocabulary if signal else 0


def _weights(signal: Signal | None) -> str | None:
    """Return the fingerprint of the teacher's weights."""
    if isinstance(signal, LogitCache):
        return signal.header.teacher
    return signal.weights if signal else None


def _describe_sources(index: TokenIndex, signal: Signal | None) -> dict[str, str]:
    """Return what a student is trained on, by name. The identity of its checkpoints is a digest of this too."""
    facts = {"tokens": index.record.content}
    if weights := _weights(signal):
        facts |= {"teacher's weights": weights}
    if isinstance(signal, LogitCache):
        header = signal.header
        facts |= {"logit cache": digest(header.to_json()), "cache's method": header.codec.method}
    return facts


def _describe_teacher(
    job: Job, signal_path: Path, teacher: CausalLM | None
) -> dict[str, JsonValue]:
    """Return the settings of the live teacher, or of the one that made a cache, with the dtype that it had."""
    settings: dict[str, JsonValue] = job.config.teacher.model_dump(mode="json")
    dtype = name_dtype(teacher.model.dtype) if teacher else None
    made_path = signal_path.with_name(RUN_FILE)
    if signal_path.name == "manifest.json" and made_path.exists():
        for made in (worker.made for worker in CacheRun.read(made_path).workers):
            if made.dtype and isinstance(own := made.config.get("teacher"), dict):
                settings, dtype = own, made.dtype
    settings = {key: value for key, value in settings.items() if key != "generation"}
    return settings | {"dtype": dtype or settings["dtype"]}


def _write_records(
    out: Path,
    work: TrainingJob,
    summary: TrainingSummary,
    *,
    signal: Signal | None,
    student: str,
    made: dict[str, Any],
) -> None:
    """Write run.json, then training.json, whose existence means that the run is finished.

    `made`: the sections that it was made with, of the teacher only where there is one; `student`: its digest.
    """
    training = work.training
    record = describe_run(
        section=made,
        seed=training.seed,
        dtype=summary.dtype,
        device=summary.device,
        seconds=summary.seconds,
    )
    record.write(out.with_name("run.json"))
    TrainingRecord(
        run=work.name,
        id=out.parent.name,
        distillation_type=training.distillation_type,
        alpha=training.alpha,
        temperature=training.temperature,
        seed=training.seed,
        tokens=work.facts["tokens"],
        teacher=_weights(signal),
        cache=digest(signal.header.to_json()) if isinstance(signal, LogitCache) else None,
        student=student,
        summary=summary,
        final=digest_folder(out.parent / "final"),
    ).write(out)


def _pin_student(student: Student, folder: Path) -> Student:
    """Return the section with the commit of a student on the Hub: its newest when the run in `folder` first started."""
    if student.model_path is None or Path(student.model_path).is_dir():
        return student
    path = folder / "student.json"
    known = StartRecord.read(path) if path.exists() else None
    if known is None or (known.name, known.revision) != (student.model_path, student.revision):
        _, commit = fingerprint_model(student.model_path, revision=student.revision)
        known = StartRecord(name=student.model_path, revision=student.revision, commit=commit)
        if rank() == 0:
            known.write(path)
    return student.model_copy(update={"revision": known.commit})


def _require_same_start(job: Job) -> None:
    """Raise ValueError when what the student starts from is not what the run's id was made from."""
    if job.expected.get("student") not in (None, digest(starting_point(job.config))):
        student, start = job.config.student, job.config.training.resume_from_checkpoint
        files = f"{student.start}{f' or {start}' if start else ''}"
        raise ValueError(
            f"{files} changed since the command began, and the run's id was made from the old content. Rerun the same "
            "command: it trains the new student, as another run."
        )


def _load_tokenizer(job: Job, index: TokenIndex) -> Any:
    """Load the tokenizer, which is saved in final/. Raises ValueError when it is not the one that made the tokens."""
    path, revision = job.tokenizer
    trust = job.config.teacher.trust_remote_code
    tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust)
    made_by = index.record.tokenizer.fingerprint
    found = identify_tokenizer(path, tokenizer).fingerprint
    if found != made_by:
        raise ValueError(
            f"the tokenizer in {path!r} is not the one that made the tokens: its fingerprint is {found}, but "
            f"{index.path} records {made_by}. The student would be saved with a tokenizer that it was not trained "
            f"with. Restore the old tokenizer, or delete {index.path.parent} to tokenize the corpus again."
        )
    return tokenizer


def _load_live_teacher(job: Job, record_path: Path, *, tokenizer: Any, longest: int) -> CausalLM:
    """Load a live teacher; `tokenizer`: of the text.

    Raises ValueError when it is not the recorded one, or its tokenizer gives other ids than the text's.
    """
    path, section = job.teacher_path, job.config.teacher
    record = TeacherRecord.read(record_path)
    teachers = load_tokenizer(
        path,
        revision=None if Path(path).is_dir() else record.revision,
        trust_remote_code=section.trust_remote_code,
    )
    width = record.vocabulary
    require_teacher_ids(tokenizer, teachers, width=width, source=job.tokenizer[0], teacher=path)
    return load_recorded_teacher(path, section, record_path=record_path, longest=longest)


def _choose_source(index: TokenIndex, signal: Signal | None) -> SequenceTable | LogitCache:
    """Return the cache if that is the signal, else the training split.

    Raises ValueError for a cache of other tokens.
    """
    if not isinstance(signal, LogitCache):
        return index.read_split("train")
    cache = signal
    if cache.header.tokens != index.record.content:
        raise ValueError(
            f"{cache.path} holds distributions for other tokens (content {cache.header.tokens}) than {index.path} "
            f"lists ({index.record.content}). Give the cache that was made from this index."
        )
    return cache
