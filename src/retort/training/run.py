"""One run: from tokens, cache or teacher to training.json, which says that the student is finished."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from retort.artifacts.plan import REVISIONS, student_content
from retort.cache.reader import LogitCache
from retort.cluster.ranks import rank
from retort.config.checks import DEFAULT_ALPHA
from retort.config.load import identity
from retort.config.sections import Student, Teacher, Tracking, Training
from retort.io.digests import digest, digest_folder
from retort.io.files import read_json, write_json
from retort.io.run_record import describe_run
from retort.models.load import CausalLM, load_recorded_teacher, refuse_short_context
from retort.models.students import name_student, student_config
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from retort.tokens.tokenizer import fingerprint_of_tokenizer, load_tokenizer
from retort.tokens.vocabularies import require_student_ids, require_teacher_ids
from retort.training.loop import Job, train_student

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
    """Train one student in the folder of `out` (training.json), from the tokens, a cache or a live teacher.

    `expected_student`: the digest of the student's content by which `out` is named. Raises ValueError when the signal
    that the distillation type needs is missing, or was made of other tokens or by another teacher than
    `fingerprint_path` records, the student is another, or teacher or student mean other tokens by the same ids.
    """
    training = _fill_alpha(training, has_teacher=bool(cache_path or teacher_path))
    needs_teacher = training.alpha != 1.0
    index = TokenIndex.read(index_path)
    tokenizer = load_tokenizer(
        tokenizer_path,
        revision=tokenizer_revision,
        trust_remote_code=teacher_section.trust_remote_code,
    )
    _refuse_other_tokenizer(index, tokenizer_path, tokenizer)
    source = _open_source(index, cache_path if needs_teacher else None)
    record = read_json(fingerprint_path) if fingerprint_path else None
    if record is not None and isinstance(source, LogitCache):
        _refuse_other_teacher(source, record, fingerprint_path)
    _refuse_other_student(student, expected_student)
    if student.model_path:
        require_student_ids(tokenizer, source=tokenizer_path, student=student.model_path)
    # The width of the teacher's output layer, also for a run that learns from text alone: students of one config are of
    # one size.
    vocabulary = max(record["vocabulary"] if record else 0, len(tokenizer))
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
    facts = _describe_signal(index, source, record if needs_teacher else None)
    job = Job(
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
    )
    summary = train_student(out.parent, job)
    _refuse_other_student(student, expected_student)
    if rank() == 0:
        _write_records(out, job, summary, record)
        logger.info(f"train {name}  {summary['steps']} steps in {summary['seconds']:.0f} s")


def _fill_alpha(training: Training, *, has_teacher: bool) -> Training:
    """Return the section with alpha; raises ValueError when it needs a teacher and there is none."""
    kind = training.distillation_type
    alpha = training.alpha if training.alpha is not None else DEFAULT_ALPHA[kind]
    if alpha < 1.0 and not has_teacher:
        raise ValueError(
            f"distillation type {kind!r} (alpha {alpha}) learns from a teacher: give "
            "--cache teacher_logits.h5 or --teacher, or use --distillation-type output."
        )
    return replace(training, alpha=alpha)


def _identity(training: Training) -> dict[str, Any]:
    """Return the keys that the result depends on."""
    return identity(training) | {"alpha": training.alpha}


def _describe_signal(
    index: TokenIndex, source: SequenceTable | LogitCache, record: dict[str, Any] | None
) -> dict[str, str]:
    """Return what a student learns from, by name; `record`: the teacher's fingerprint.json."""
    facts = {"tokens": str(index.content["content"])}
    if record is not None:
        facts |= {"teacher": record["name"], "teacher's weights": record["weights"]}
    if isinstance(source, LogitCache):
        header = source.header
        facts |= {"teacher's weights": header.teacher, "logit cache": digest(header.to_json())}
        facts |= {"cache's method": header.codec.method}
    return facts


def _write_records(
    out: Path, job: Job, summary: dict[str, Any], record: dict[str, Any] | None
) -> None:
    """Write run.json, then training.json, which says that the run is finished."""
    training = job.training
    about = {
        "run": job.name,
        "id": out.parent.name,
        "distillation_type": training.distillation_type,
        "alpha": training.alpha,
        "temperature": training.temperature,
        "seed": training.seed,
        "teacher": record["weights"] if record else None,
        **summary,
        "final": digest_folder(out.parent / "final"),
    }
    section = {"student": asdict(job.student), "training": asdict(training)}
    run = describe_run(
        section=section, seed=training.seed, device=summary["device"], seconds=summary["seconds"]
    )
    write_json(out.parent / "run.json", run)
    write_json(out, about)


def _refuse_other_student(student: Student, expected: str | None) -> None:
    """Raise ValueError when the student's config or weights are not those that its run is named by."""
    if expected not in (None, digest(student_content(student))):
        raise ValueError(
            f"{student.config or student.model_path} changed since the command began, and the run is named by what it "
            "was. Run the same command again: it trains what is there now, as another run."
        )


def _refuse_other_tokenizer(index: TokenIndex, path: str, tokenizer: Any) -> None:
    """Raise ValueError when the tokens were made by another tokenizer than the one that would go into final/."""
    made_by = index.content["tokenizer"]["fingerprint"]
    found = fingerprint_of_tokenizer(path, tokenizer)["fingerprint"]
    if found != made_by:
        raise ValueError(
            f"the tokenizer in {path!r} is not the one that made the tokens: its fingerprint is {found}, but "
            f"{index.path} records {made_by}. The student would be shipped with a tokenizer that it was not trained "
            f"with. Put the old tokenizer back, or delete {index.path.parent} to tokenize the corpus again."
        )


def _refuse_other_teacher(
    cache: LogitCache, record: dict[str, Any], fingerprint_path: Path | None
) -> None:
    """Raise ValueError when a cache was made by another teacher than the one that would be recorded."""
    if cache.header.teacher != record["weights"]:
        raise ValueError(
            f"{cache.path} holds the distributions of teacher {cache.header.teacher}, but {fingerprint_path} records "
            f"{record['weights']} ({record['name']}). Give the fingerprint.json of the teacher that made the cache."
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
    """Load the teacher that a student learns from directly; `source`: where the text's `tokenizer` was loaded from.

    Raises ValueError where it has no record or is another one, or means other tokens by the ids of the text.
    """
    if record_path is None:
        raise ValueError(
            f"--teacher {path} needs --fingerprint, the record of which teacher that is. Type: python "
            f"workflow/scripts/resolve_teacher.py --teacher-model-path {path} --output fingerprint.json, and give "
            "--fingerprint fingerprint.json."
        )
    record = read_json(record_path)
    teachers = load_tokenizer(
        path,
        revision=None if Path(path).is_dir() else record["revision"],
        trust_remote_code=section.trust_remote_code,
    )
    width = record["vocabulary"]
    require_teacher_ids(tokenizer, teachers, width=width, source=source, teacher=path)
    return load_recorded_teacher(path, section, record_path=record_path, longest=longest)


def _open_source(index: TokenIndex, cache_path: Path | None) -> SequenceTable | LogitCache:
    """Return what is trained on; a cache must be of the very tokens of the index."""
    if cache_path is None:
        return index.read_split("train")
    if not cache_path.exists():
        raise ValueError(
            f"{cache_path} is gone, but its manifest.json remains, so it passes for made. Delete the manifest too and "
            "run the same command again: the teacher makes the cache anew."
        )
    cache = LogitCache(cache_path)
    if cache.header.tokens != index.content["content"]:
        raise ValueError(
            f"{cache_path} holds distributions for other tokens (content {cache.header.tokens}) than {index.path} "
            f"lists ({index.content['content']}). Give the cache that was made from this index."
        )
    return cache
