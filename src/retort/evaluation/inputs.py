"""What an evaluation is of: a student, its held-out text and its teacher's scores, which all must be of one training.

No teacher is loaded: its distributions come from the features that `score_validation` stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.config.handoff import Job
from retort.io.digests import compare_digests, digest_folder
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, RunRecord
from retort.teacher.features import (
    MixedFeatures,
    TeacherFeatures,
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


@dataclass(frozen=True)
class Subject:
    """A student that is to be evaluated.

    folder: final/; record: its training.json, trained: the run.json beside it; manifests: of the caches that it learned
    from; table: the held-out sequences; no_tokenizer: why `tokenizer` is None; teacher: its scores of `table`, None
    without a teacher or if that one's ids are foreign; weights: digest of the teacher's.
    """

    folder: Path
    record: TrainingRecord
    trained: RunRecord | None
    manifests: list[Manifest]
    index: TokenIndex
    table: SequenceTable
    tokenizer: Any
    no_tokenizer: str | None
    teacher: TeacherFeatures | MixedFeatures | None
    is_foreign: bool
    weights: str | None


def read_subject(
    job: Job,
    *,
    index_path: Path,
    training_path: Path,
    features_paths: Sequence[Path],
    signal_paths: Sequence[Path],
) -> Subject:
    """Return what `evaluate_run` evaluates, with these paths of it.

    Raises ValueError when final/ is not what training wrote, index, cache or run.json are not those of the training,
    or the features are of another teacher or other text.
    """
    index = TokenIndex.read(index_path)
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
    table = index.read_split("val", max_positions=job.config.evaluation.max_positions)
    tokenizer, no_tokenizer = _load_own_tokenizer(str(folder))
    is_foreign = not all(_shares_ids(path, index, tokenizer) for path in fingerprint_paths)
    weights = record.teacher
    if features_paths and weights is None:
        weights = _read_weights(fingerprint_paths, features_paths, shares)
    teacher = None
    if features_paths and not is_foreign:
        source = fingerprint_paths[0] if fingerprint_paths else training_path
        teacher = _open_teachers(features_paths, table, weights, weights=shares, made_from=source)
    return Subject(
        folder=folder,
        record=record,
        trained=trained,
        manifests=manifests,
        index=index,
        table=table,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        teacher=teacher,
        is_foreign=is_foreign,
        weights=weights,
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
