"""What students start from: a config, a checkpoint, or a part of another model, which a rule makes."""

import json
from pathlib import Path
from typing import Any

from retort.artifacts.project import Pruned, TeacherModel, Tokens
from retort.config.load import identity
from retort.config.sections import Config, Student
from retort.config.student import FromTeacher
from retort.io.digests import digest
from retort.io.files import suggest_path
from retort.io.fingerprints import fingerprint_checkpoint, fingerprint_weights


def build_pruned(
    config: Config, teacher: TeacherModel | None, tokens: Tokens, *, root: Path, revision: int
) -> Pruned | None:
    """Return the part of a model that a run's student starts from, None for another student.

    student.model_path counts by its weights, a teacher as in its own id: by where it is, with its recorded weights in
    every job. root: the folder of what runs share; revision: of the code that prunes.
    """
    student = config.student
    if not student.is_pruned:
        return None
    content, owner = student_content(student), None if student.model_path else teacher
    source: Any = None
    if owner is not None:
        section = owner.section
        again = section.generation.force_regenerate
        source = owner.id if owner.corpus else [section.model_path, section.revision, again]
    measured: list[Any] = []
    if student.from_teacher.is_measured:
        measured = [tokens.id, config.teacher.generation.cpu_threads]
    pruned_id = digest(["pruned", revision, content, source, *measured])
    kept = {key: getattr(student, key) for key in ("model_path", "revision", "from_teacher")}
    folder = root / "pruned" / pruned_id
    return Pruned(
        id=pruned_id,
        folder=folder,
        student=Student(**kept),
        teacher=owner,
        tokens=tokens if measured else None,
        config=config,
        content=digest(content),
    )


def part_keys(part: FromTeacher) -> dict[str, Any]:
    """Return the keys that decide what of a model is kept, as JSON values."""
    keys = identity(part)
    return keys if part.is_measured else {k: v for k, v in keys.items() if k in part.sizes}


def starting_point(config: Config) -> Any:
    """Return `student_content`, with the fingerprint of training.resume_from_checkpoint where there is one.

    Raises ValueError as `student_content` does; of a checkpoint that is missing, this is its path.
    """
    content = student_content(config.student)
    if config.training.resume_from_checkpoint is None:
        return content
    folder = Path(config.training.resume_from_checkpoint)
    return [content, fingerprint_checkpoint(folder) if folder.is_dir() else str(folder)]


def student_content(student: Student) -> Any:
    """Return what a student is initialized from: the parsed JSON config, or the fingerprint of a checkpoint's weights.

    Of one that starts as a part of a model, it is what is kept, with the fingerprint of student.model_path if that is
    set. Raises ValueError when it cannot be read or is not a transformers config.
    """
    if student.is_pruned:
        whole = student.model_copy(update={"from_teacher": FromTeacher()})
        source = student_content(whole) if student.model_path is not None else None
        return {"from_teacher": part_keys(student.from_teacher), "model": source}
    if student.model_path is not None:
        folder = Path(student.model_path)
        on_hub = [student.model_path, student.revision] if student.revision else student.model_path
        return fingerprint_weights(folder) if folder.is_dir() else on_hub
    path = Path(str(student.config))
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(
            f"student.config {str(path)!r} does not exist (looked in {Path.cwd()}).{suggest_path(path)} Give the path "
            "of a transformers config as JSON; config/students/ holds some to start from."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"student.config {str(path)!r} is not JSON: {error}. Fix the file."
        ) from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(
            f"student.config {str(path)!r} has no 'model_type': expected a transformers config such as "
            '{"model_type": "llama", "hidden_size": 512, ...}; config/students/ holds some to start from.'
        )
    return content
