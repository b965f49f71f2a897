"""One run: checks that tokens, tokenizer, teacher and student belong together, trains, and writes training.json."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from retort.artifacts.build import REVISIONS, list_selection, training_keys
from retort.artifacts.starts import starting_point
from retort.cluster.ranks import rank
from retort.config.handoff import Job
from retort.config.sections import Student, Training
from retort.io.digests import digest, digest_folder
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import describe_run
from retort.models.causal_lm import CausalLM
from retort.models.ends import list_ends_beside
from retort.models.load import (
    fingerprint_model,
    load_recorded_teacher,
    refuse_short_context,
)
from retort.models.students import name_student, student_config
from retort.pruning.record import choose_start
from retort.tokens.index import TokenIndex
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from retort.tokens.vocabularies import require_student_ids, require_teacher_ids
from retort.training.held_out import HeldOut, open_held_out
from retort.training.job import TrainingJob
from retort.training.loop import train_student
from retort.training.origin import describe_origin
from retort.training.record import StartRecord, TrainingRecord, TrainingSummary
from retort.training.signals import (
    Signal,
    choose_source,
    copy_signal,
    describe_sources,
    describe_teachers,
    digest_signals,
    find_width,
    name_weights,
    open_signal,
    pair_features,
    read_weights,
    require_mixable,
)

logger = logging.getLogger(__name__)


def train_run(
    out: Path,
    job: Job,
    *,
    index_path: Path,
    signal_paths: Sequence[Path],
    start_path: Path | None = None,
    features_paths: Sequence[Path] = (),
) -> None:
    """Train one student on the tokens, a cache or a live teacher, and write `out` (training.json) and its folder.

    `signal_paths`: what it learns from: manifest.json or teacher_logits.h5 of a cache, or fingerprint.json of a
    teacher, which is run live unless alpha is 1; of several teachers one each, in the order of teacher.mix.
    `start_path`: pruned.json of what it starts from, if that is a part of a model. `features_paths`: the teachers'
    held-out scores, for the KL from them during the training.
    `job`: of a run; it may expect the student's digest when `out` was named.

    Raises ValueError when a teacher is needed and none is given, when a cache is of other tokens, when the student's
    files changed, when teacher, student and text use different ids or sequences are too long for them, and where
    `train_student` does.
    """
    signals, training = [open_signal(path) for path in signal_paths], job.config.training
    if training.needs_teacher:
        require_mixable(job, signals, signal_paths)
    with ExitStack() as stack:
        if training.needs_teacher:
            signals = [copy_signal(stack, signal, training) for signal in signals]
        student = choose_start(job.config.student, start_path)
        index = TokenIndex.read(index_path)
        known: list[str | None] = [read_weights(signal) for signal in signals]
        held_out = open_held_out(
            index,
            training,
            job.config.evaluation,
            features=pair_features(job, features_paths, known),
            weights=job.config.teacher.weights,
        )
        _train(
            out, job, signals, student, index=index, signal_paths=signal_paths, held_out=held_out
        )


def _train(
    out: Path,
    job: Job,
    signals: list[Signal],
    student: Student,
    *,
    index: TokenIndex,
    signal_paths: Sequence[Path],
    held_out: HeldOut | None,
) -> None:
    """Do what `train_run` says, with `signals` opened and `student` as it is loaded."""
    student, training = _pin_student(student, out.parent), job.config.training
    _require_signals(training, signals)
    used, weights = signals if training.needs_teacher else [], job.config.teacher.weights
    tokenizer = _load_tokenizer(job, index)
    source = choose_source(index, used, weights)
    _require_same_start(job)
    vocabulary = _check_student(
        job, student, tokenizer=tokenizer, signals=signals, longest=index.longest
    )
    teacher = None
    if used and isinstance(used[0], TeacherRecord):
        teacher = _load_live_teacher(
            job, signal_paths[0], tokenizer=tokenizer, longest=index.longest
        )
    about: dict[str, Any] = {}
    if used:
        about["teacher"] = describe_teachers(job, signal_paths, teacher)
    content = starting_point(job.config.model_copy(update={"student": student}))
    facts = describe_sources(index, used, weights)
    written = job.config.student if job.config.student.is_pruned else student
    path, revision = job.tokenizer
    work = TrainingJob(
        name=job.run or "student",
        identity=_identify(job, facts, content),
        source=source,
        student=student,
        training=training,
        tracking=job.config.tracking,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        teacher=teacher,
        facts={"run": out.parent.name, **facts},
        origin=describe_origin(job.config, has_teacher=training.needs_teacher),
        ends=tuple(list_ends_beside(path, tokenizer, revision=revision)),
        max_length=job.config.dataset.max_length,
        held_out=held_out,
        written=written,
    )
    summary = train_student(out.parent, work)
    _require_same_start(job)
    if rank() == 0:
        sections = {"student": written, "training": training, **about}
        made_from = name_weights(signals, weights), digest_signals(signals, weights)
        _write_records(out, work, summary, made_from, student=digest(content), made=sections)
        logger.info(f"train {work.name}  {summary.steps} steps in {summary.seconds:.0f} s")


def _require_signals(training: Training, signals: Sequence[Signal]) -> None:
    """Raise ValueError if a student of a teacher has nothing of it to learn from."""
    if training.needs_teacher and not signals:
        raise ValueError(
            f"distillation type {training.distillation_type!r} (alpha {training.alpha}) learns from a teacher: give "
            "--signal (manifest.json of a cache, or fingerprint.json of the teacher), or --set "
            "training.distillation_type=output."
        )


def _check_student(
    job: Job,
    student: Student,
    *,
    tokenizer: Any,
    signals: Sequence[Signal],
    longest: int,
) -> int:
    """Return the width of a student's output layer; raise ValueError for other ids than the tokenizer's, and for a
    context shorter than the `longest` sequence.

    It is at least the teacher's, with text alone too: so all students of one config have the same size.
    """
    if student.model_path:
        path, _ = job.tokenizer
        require_student_ids(
            tokenizer, source=path, student=student.model_path, revision=student.revision
        )
    vocabulary = max(find_width(signals), len(tokenizer))
    config = student_config(student, vocabulary=vocabulary, tokenizer=tokenizer)
    refuse_short_context(config, longest, name_student(student))
    return vocabulary


def _identify(job: Job, facts: Mapping[str, str], content: Any) -> str:
    """Return the digest of all that decides a student's weights: data (`facts`), start (`content`), settings."""
    training = job.config.training
    rows: list[Any] = [job.config.dataset.max_length] if training.packing else []
    rows += list_selection(job.config)
    return digest([REVISIONS["run"], facts, content, training_keys(training), *rows])


def _write_records(
    out: Path,
    work: TrainingJob,
    summary: TrainingSummary,
    made_from: tuple[str | None, str | None],
    *,
    student: str,
    made: dict[str, Any],
) -> None:
    """Write run.json, then training.json, whose existence means that the run is finished.

    `made_from`: the record's `teacher` and `cache`; `made`: the sections that it was made with, of the teacher only
    where there is one; `student`: its digest.
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
        teacher=made_from[0],
        cache=made_from[1],
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
