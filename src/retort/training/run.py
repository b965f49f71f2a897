"""One run: checks that tokens, tokenizer, teacher and student belong together, trains, and writes training.json."""

import logging
from pathlib import Path
from typing import Any

from retort.artifacts.build import REVISIONS, student_content
from retort.cache.reader import LogitCache
from retort.cluster.ranks import rank
from retort.config.load import identity
from retort.config.sections import Student, Teacher, Tracking, Training
from retort.config.training import DEFAULT_ALPHA
from retort.io.digests import digest, digest_folder
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, describe_run
from retort.models.ends import list_ends_beside
from retort.models.load import CausalLM, load_recorded_teacher, refuse_short_context
from retort.models.students import name_student, student_config
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from retort.tokens.vocabularies import require_student_ids, require_teacher_ids
from retort.training.loop import TrainingJob, train_student
from retort.training.record import TrainingRecord, TrainingSummary

logger = logging.getLogger(__name__)


def train_run(
    out: Path,
    *,
    name: str,
    index_path: Path,
    tokenizer_path: str,
    tokenizer_revision: str | None,
    cache_path: Path | None,
    teacher_path: str | None,
    fingerprint_path: Path | None,
    student: Student,
    training: Training,
    tracking: Tracking,
    teacher_section: Teacher,
    expected_student: str | None = None,
) -> None:
    """Train one student on the tokens, a cache or a live teacher, and write `out` (training.json) and its folder.

    `expected_student`: the digest of the student's content when `out` was named.

    Raises ValueError when a teacher is needed and none is given, when the cache is of other tokens or of another
    teacher than `fingerprint_path` records, when the student's files changed, when teacher, student and text use
    different ids or sequences are too long for them, and where `train_student` does.
    """
    training = _fill_alpha(training, has_teacher=bool(cache_path or teacher_path))
    needs_teacher = training.alpha != 1.0
    index = TokenIndex.read(index_path)
    tokenizer = load_tokenizer(
        tokenizer_path,
        revision=tokenizer_revision,
        trust_remote_code=teacher_section.trust_remote_code,
    )
    _require_same_tokenizer(index, tokenizer_path, tokenizer)
    source = _open_source(index, cache_path if needs_teacher else None)
    record = TeacherRecord.read(fingerprint_path) if fingerprint_path else None
    if record is not None and isinstance(source, LogitCache):
        _require_teacher_of_cache(source, record, fingerprint_path)
    _require_same_student(student, expected_student)
    if student.model_path:
        require_student_ids(tokenizer, source=tokenizer_path, student=student.model_path)
    # The width of the teacher's output layer, with text alone too: so all students of one config have the same size.
    vocabulary = max(record.vocabulary if record else 0, len(tokenizer))
    config = student_config(student, vocabulary=vocabulary, tokenizer=tokenizer)
    refuse_short_context(config, index.longest, name_student(student))
    teacher = None
    if needs_teacher and cache_path is None:
        teacher = _load_live_teacher(
            str(teacher_path),
            teacher_section,
            record_path=fingerprint_path,
            tokenizer=tokenizer,
            source=tokenizer_path,
            longest=index.longest,
        )
    facts = _describe_sources(index, source, record if needs_teacher else None)
    job = TrainingJob(
        name=name,
        identity=digest([REVISIONS["run"], facts, student_content(student), _identity(training)]),
        source=source,
        student=student,
        training=training,
        tracking=tracking,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        teacher=teacher,
        facts={"run": out.parent.name, **facts},
        ends=tuple(list_ends_beside(tokenizer_path, tokenizer, revision=tokenizer_revision)),
    )
    summary = train_student(out.parent, job)
    _require_same_student(student, expected_student)
    if rank() == 0:
        _write_records(out, job, summary, record)
        logger.info(f"train {name}  {summary.steps} steps in {summary.seconds:.0f} s")


def _fill_alpha(training: Training, *, has_teacher: bool) -> Training:
    """Return the section with alpha filled in; raises ValueError when it needs a teacher and none is given."""
    kind = training.distillation_type
    alpha = training.alpha if training.alpha is not None else DEFAULT_ALPHA[kind]
    if alpha < 1.0 and not has_teacher:
        raise ValueError(
            f"distillation type {kind!r} (alpha {alpha}) learns from a teacher: give --cache teacher_logits.h5 or "
            "--teacher, or use --distillation-type output."
        )
    return training.model_copy(update={"alpha": alpha})


def _identity(training: Training) -> dict[str, Any]:
    """Return the keys of the section that the result depends on."""
    return identity(training) | {"alpha": training.alpha}


def _describe_sources(
    index: TokenIndex, source: SequenceTable | LogitCache, record: TeacherRecord | None
) -> dict[str, str]:
    """Return what a student is trained on, by name; `record`: the teacher's fingerprint.json, None without a teacher.

    The run's identity is a digest of this too, so its keys must stay.
    """
    facts = {"tokens": index.record.content}
    if record is not None:
        facts |= {"teacher": record.name, "teacher's weights": record.weights}
    if isinstance(source, LogitCache):
        header = source.header
        facts |= {"teacher's weights": header.teacher, "logit cache": digest(header.to_json())}
        facts |= {"cache's method": header.codec.method}
    return facts


def _write_records(
    out: Path, job: TrainingJob, summary: TrainingSummary, record: TeacherRecord | None
) -> None:
    """Write run.json, then training.json, whose existence means that the run is finished."""
    training = job.training
    made = describe_run(
        section={"student": job.student, "training": training},
        seed=training.seed,
        dtype=summary.dtype,
        device=summary.device,
        seconds=summary.seconds,
    )
    made.write(out.with_name(RUN_FILE))
    TrainingRecord(
        run=job.name,
        id=out.parent.name,
        distillation_type=training.distillation_type,
        alpha=training.alpha,
        temperature=training.temperature,
        seed=training.seed,
        teacher=record.weights if record else None,
        summary=summary,
        final=digest_folder(out.parent / "final"),
    ).write(out)


def _require_same_student(student: Student, expected: str | None) -> None:
    """Raise ValueError when the student's config or weights are not those that the run's id was made from."""
    if expected not in (None, digest(student_content(student))):
        raise ValueError(
            f"{student.config or student.model_path} changed since the command began, and the run's id was made from "
            "its old content. Rerun the same command: it trains the new student, as another run."
        )


def _require_same_tokenizer(index: TokenIndex, path: str, tokenizer: Any) -> None:
    """Raise ValueError when the tokenizer, which is saved in final/, is not the one that made the tokens."""
    made_by = index.record.tokenizer.fingerprint
    found = identify_tokenizer(path, tokenizer).fingerprint
    if found != made_by:
        raise ValueError(
            f"the tokenizer in {path!r} is not the one that made the tokens: its fingerprint is {found}, but "
            f"{index.path} records {made_by}. The student would be saved with a tokenizer that it was not trained "
            f"with. Restore the old tokenizer, or delete {index.path.parent} to tokenize the corpus again."
        )


def _require_teacher_of_cache(
    cache: LogitCache, record: TeacherRecord, fingerprint_path: Path | None
) -> None:
    """Raise ValueError when `record`, which goes into training.json, is not of the teacher that made the cache."""
    if cache.header.teacher != record.weights:
        raise ValueError(
            f"{cache.path} holds the distributions of teacher {cache.header.teacher}, but {fingerprint_path} records "
            f"{record.weights} ({record.name}). Give the fingerprint.json of the teacher that made the cache."
        )


def _load_live_teacher(
    path: str,
    section: Teacher,
    *,
    record_path: Path | None,
    tokenizer: Any,
    source: str,
    longest: int,
) -> CausalLM:
    """Load a live teacher; `source`: where the text's `tokenizer` was loaded from.

    Raises ValueError when it has no record or is not the recorded one, or its tokenizer gives other ids than the
    text's.
    """
    if record_path is None:
        raise ValueError(
            f"--teacher {path} needs --fingerprint, the record of that teacher. Make it with python "
            f"workflow/scripts/resolve_teacher.py --teacher-model-path {path} --output fingerprint.json, and give "
            "--fingerprint fingerprint.json."
        )
    record = TeacherRecord.read(record_path)
    teachers = load_tokenizer(
        path,
        revision=None if Path(path).is_dir() else record.revision,
        trust_remote_code=section.trust_remote_code,
    )
    width = record.vocabulary
    require_teacher_ids(tokenizer, teachers, width=width, source=source, teacher=path)
    return load_recorded_teacher(path, section, record_path=record_path, longest=longest)


def _open_source(index: TokenIndex, cache_path: Path | None) -> SequenceTable | LogitCache:
    """Return the training split, or the cache; raises ValueError when it is missing or not of the index's tokens."""
    if cache_path is None:
        return index.read_split("train")
    if not cache_path.exists():
        raise ValueError(
            f"{cache_path} is gone. In a workflow its manifest.json, which remains, counts as the finished cache: "
            "delete the manifest too and rerun the same command to make the cache again."
        )
    cache = LogitCache(cache_path)
    if cache.header.tokens != index.record.content:
        raise ValueError(
            f"{cache_path} holds distributions for other tokens (content {cache.header.tokens}) than {index.path} "
            f"lists ({index.record.content}). Give the cache that was made from this index."
        )
    return cache
