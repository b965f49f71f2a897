"""From configs to the ids and folders of all artifacts, when the Snakefile is parsed.

An id is a digest of the config keys that define the artifact, of the ids it is made from, and of the `REVISIONS` number
of its code. Keys at their defaults are left out, so that a new key changes no id. Corpora, student configs and student
checkpoints count by content, not by path. So the path of a file determines its content: the workflow only checks
existence, changing a setting and back costs nothing, and no setting resumes the work of another.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from retort.artifacts.agreement import require_agreement
from retort.artifacts.imported import build_imported_tokens, find_import
from retort.artifacts.project import (
    Corpus,
    Logits,
    Project,
    Run,
    TeacherModel,
    Tokens,
    Validation,
)
from retort.artifacts.responses import build_responses
from retort.artifacts.starts import build_pruned, starting_point, student_content
from retort.artifacts.tasks import EvaluationTask, build_tasks
from retort.config.dataset import SYNTHESIS
from retort.config.load import identity
from retort.config.schema import ConfigError, Problem, show
from retort.config.sections import Config, Dataset, Training
from retort.corpus.reading import TOKENIZING_KEYS, corpus_keys, list_corpus_files, needs_snapshot
from retort.corpus.sources import list_files, list_validation_files
from retort.io.digests import digest, digest_file, digest_file_states
from retort.io.files import is_path, require_no_file_at, suggest_path
from retort.io.fingerprints import (
    TeacherRecord,
    describe_model_file,
    fingerprint_tokenizer,
    fingerprint_weights,
)

# Increase a number when, and only when, the code makes other bytes from the same input: results are then made again.
# tests/unit/test_golden.py fails when bytes change and the number does not.
REVISIONS = {
    "answers": 1,  # of requests and of reading prompts; if increased, every answer is requested and paid for again
    "synthesis": 3,
    "corpus": 1,
    "teacher": 3,
    "demo_teacher": 2,  # the only teacher that is trained
    "tokens": 4,
    "logits": 5,
    "validation": 3,
    "pruned": 1,
    "run": 3,
    "run_at_two": 1,  # besides, of those whose temperature is 2, or may be on its way to temperature_end
    "evaluation": 4,
    "benchmark": 2,
    "report": 4,
}


def build_project(configs: Mapping[str, Config]) -> Project:
    """Return all artifacts of the runs' configs, by name of the run.

    Raises ValueError when runs disagree on what they share, a local corpus, model, tokenizer or student config is
    missing, a file is at the path of the results folder, a path is too long or may not be read, or the weights or
    tokenizer of a local teacher differ from those of its recorded results. The error of one missing file names all
    others that are missing.
    """
    try:
        return _build_project(configs)
    except ValueError as error:
        messages = dict.fromkeys([str(error), *_find_mistakes(configs)])
        raise ConfigError(*(Problem((), message) for message in messages)) from None
    except OSError as error:
        raise ValueError(
            f"The config has the path {show(str(error.filename))}, which cannot be read: {error.strerror}."
        ) from None


def _build_project(configs: Mapping[str, Config]) -> Project:
    for output in {config.output for config in configs.values()}:
        require_no_file_at(Path(output.results_dir))
        require_no_file_at(Path(output.cache_folder))
    for config in configs.values():
        for key, value in _named_folders(config).items():
            _refuse_missing_folder(key, value)
    runs = {name: _build_run(name, config) for name, config in configs.items()}
    everything = list(runs.values())
    require_agreement(everything)
    teachers = [teacher for r in everything for teacher in r.teachers] + [
        r.tokens.teacher for r in everything if r.tokens.teacher
    ]
    for teacher in {t.id: t for t in teachers}.values():
        refuse_other_teacher(teacher)
    corpora = [r.tokens.corpus for r in everything] + [t.corpus for t in teachers if t.corpus]
    evaluations: list[Any] = [[r.name, r.id, r.evaluation_id] for r in everything]
    teacher_tasks = {task.path: task for r in everything for task in _build_teacher_tasks(r)}
    ids = [[str(path)] for path in teacher_tasks]
    ids += [[r.name, r.id, task.id] for r in everything for task in r.tasks]
    return Project(
        runs=runs,
        check_id=digest(["check", evaluations, *ids]),
        report_id=digest(["report", REVISIONS["report"], evaluations, *ids]),
        syntheses={c.synthesis.id: c.synthesis for c in corpora if c.synthesis},
        corpora={c.id: c for c in corpora},
        teachers={t.id: t for t in teachers},
        tokens={r.tokens.id: r.tokens for r in everything},
        logits={found.id: found for r in everything for found in r.logits},
        validations={found.id: found for r in everything for found in r.validations},
        pruned={r.pruned.id: r.pruned for r in everything if r.pruned},
        teacher_tasks=teacher_tasks,
    )


def _find_mistakes(configs: Mapping[str, Config]) -> Iterator[str]:
    """Yield the messages of build_project's errors in single keys of the configs, once it has ended with one."""
    for config in configs.values():
        steps: list[Callable[[], Any]] = [
            partial(_refuse_missing_folder, *named) for named in _named_folders(config).items()
        ]
        steps += [
            *(
                [partial(find_import, config)]
                if config.teacher.imported
                else [
                    partial(_build_corpus, config),
                    partial(list_validation_files, config.dataset),
                ]
            ),
            partial(student_content, config.student),
            partial(build_tasks, config, Path(), revision=REVISIONS["benchmark"]),
        ]
        for step in steps:
            with suppress(OSError):  # one that cannot be read is told when no other is wrong
                try:
                    step()
                except ValueError as error:
                    yield str(error)


def _named_folders(config: Config) -> dict[str, str | None]:
    mix = {
        f"teacher.mix[{n}].model_path": one.model_path for n, one in enumerate(config.teacher.mix)
    }
    return {
        "teacher.model_path": None if mix else config.teacher.model_path,
        **mix,
        "dataset.tokenizer": config.dataset.tokenizer,
        "student.model_path": config.student.model_path,
    }


def _refuse_missing_folder(key: str, value: str | None) -> None:
    """Raise ValueError for a model or tokenizer that is given as a path and does not exist."""
    if value is not None and Path(value).is_file():
        raise ValueError(f"{key} {value!r} is {describe_model_file(Path(value))}")
    if value is not None and is_path(value) and not Path(value).is_dir():
        raise ValueError(
            f"{key} {value!r} does not exist (looked in {Path.cwd()}).{suggest_path(Path(value))} Give a "
            "folder that save_pretrained() wrote, or the id of a model on the Hub."
        )


def refuse_other_teacher(teacher: TeacherModel) -> None:
    """Raise ValueError when a local teacher's weights or tokenizer differ from those recorded in its folder."""
    path = teacher.folder / "fingerprint.json"
    local = Path(str(teacher.section.model_path))
    if teacher.corpus or not path.exists() or not local.is_dir():
        return
    record = TeacherRecord.read(path)
    compared = {
        "weights": (record.weights, fingerprint_weights(local, record=path)),
        "tokenizer files": (record.tokenizer.fingerprint, fingerprint_tokenizer(local)),
    }
    for what, (recorded, found) in compared.items():
        if recorded != found:
            raise ValueError(
                f"teacher.model_path {str(local)!r} holds other {what} than before: fingerprint {found}, but "
                f"results were made with {recorded} (recorded in {path}). Restore the old files, or set "
                "teacher.generation.force_regenerate to a new value (for example a date) to make a new cache from the "
                "current files and keep the old one."
            )


def _build_run(name: str, config: Config) -> Run:
    results = Path(config.output.results_dir)
    training = config.training
    members = _split_teachers(config)
    teachers = [_build_teacher(member) for member in members]
    teacher = teachers[0] if teachers else None
    imported = find_import(config) if config.teacher.imported else None
    if imported:
        tokens, imported_id = build_imported_tokens(config, imported)
    else:
        tokens, imported_id = _build_tokens(config, teacher), None
    pairs = list(zip(members, teachers, strict=True))
    needs_teacher = training.distillation_type != "output"
    is_cached = needs_teacher and imported is None and training.use_cached_logits
    logits = [_build_logits(member, tokens, t) for member, t in pairs] if is_cached else []
    validations = [_build_validation(member, tokens, t) for member, t in pairs]
    weights = config.teacher.weights
    sources = logits or teachers
    supervision = imported_id or _mix_ids([s.id for s in sources], weights)
    if not needs_teacher:
        supervision = None
    student, pruned = (
        starting_point(config),
        build_pruned(
            config, teacher, tokens, root=_cache_root(config), revision=REVISIONS["pruned"]
        ),
    )
    keys = ["run", REVISIONS["run"], tokens.id, supervision, training_keys(training), student]
    keys += list_selection(config)
    run_id = digest([*keys, pruned.id] if pruned else keys)
    evaluation_id = digest(
        [
            "evaluation",
            REVISIONS["evaluation"],
            _mix_ids([validation.id for validation in validations], weights),
            identity(config.evaluation.of_student()),
        ]
    )
    folder = results / "runs" / name / run_id
    return Run(
        name=name,
        id=run_id,
        evaluation_id=evaluation_id,
        folder=folder,
        config=config,
        student=digest(student),
        tokens=tokens,
        teachers=tuple(teachers),
        logits=tuple(logits),
        validations=tuple(validations),
        pruned=pruned,
        tasks=build_tasks(config, folder, revision=REVISIONS["benchmark"]),
        imported=imported,
    )


def _split_teachers(config: Config) -> list[Config]:
    """Return the config with each of its teachers alone; none without a teacher."""
    if config.teacher.model_path is None:
        return []
    return [config.model_copy(update={"teacher": one}) for one in config.teacher.members]


def _mix_ids(ids: list[str], weights: tuple[float, ...]) -> Any:
    """Return what an id is made of that depends on one artifact, or on several with weights."""
    if len(ids) > 1:
        return [list(pair) for pair in zip(ids, weights, strict=True)]
    return ids[0] if ids else None


def _build_teacher_tasks(run: Run) -> tuple[EvaluationTask, ...]:
    """Return the tasks of a run's teachers if evaluation.benchmarks.teacher is set; runs of one teacher share them."""
    if not run.config.evaluation.benchmarks.teacher:
        return ()
    found: tuple[EvaluationTask, ...] = ()
    for teacher in run.teachers:
        section = teacher.section.model_copy(update={"model_path": teacher.model_path})
        config = run.config.model_copy(update={"teacher": section})
        found += build_tasks(config, teacher.folder, revision=REVISIONS["benchmark"])
    return found


def _build_corpus(config: Config) -> Corpus:
    if config.dataset.name == SYNTHESIS:
        return _build_synthesized_corpus(config)
    dataset = config.dataset
    keys = corpus_keys(dataset)
    files = list_corpus_files(dataset)
    for number, section in enumerate(dataset.sources):
        trained, held_out = list_files(section), list_validation_files(section)
        source = keys["mix"][number] if dataset.mix else keys
        if trained:  # local files count by content; those of a Hub dataset by name
            source.pop("data_files", None)
        if held_out:  # the last of the files in `content`
            source["validation_files"] = len(held_out)
        if dataset.mix:
            source |= {"label": dataset.labels[number], "num_files": len(trained)}
    if dataset.streaming and dataset.shuffle:
        keys["shuffle"] = "windows"  # an earlier version shuffled in another order
    memo = Path(config.output.results_dir) / ".digests.json"
    stamp = digest_file_states(
        files
    )  # before the digests, to detect edits while these are computed
    content = [digest_file(path, memos=[memo]) for path in files]
    corpus_id = digest(["corpus", REVISIONS["corpus"], keys, content])
    folder = _cache_root(config) / "corpora" / corpus_id
    return Corpus(corpus_id, folder, dataset, needs_snapshot(dataset), stamp)


def _build_synthesized_corpus(config: Config) -> Corpus:
    """Return the corpus of a synthesis; its content is not known yet, so the id is that of its request."""
    responses = build_responses(config, _cache_root(config), revisions=REVISIONS)
    keys = corpus_keys(config.dataset)
    corpus_id = digest(["corpus", REVISIONS["corpus"], keys, responses.id])
    dataset = responses.as_dataset(config.dataset)
    return Corpus(corpus_id, responses.folder, dataset, False, responses.stamp, responses)


def _build_teacher(config: Config) -> TeacherModel:
    section = config.teacher
    keys = {k: v for k, v in identity(section).items() if k != "generation"}
    keys["model_path"] = section.model_path
    keys["force_regenerate"] = section.generation.force_regenerate
    corpus = None
    prefix = ""
    if section.model_path == "demo":
        corpus = _build_corpus(config)
        prefix = "demo-"
        tokenizing = _tokenizing_keys(config.dataset)
        tokenizing.pop("streaming_chunk_size", None)  # its sequences are in memory
        keys |= {
            "corpus": corpus.id,
            "max_length": config.dataset.max_length,
            "tokenizing": tokenizing,
            "trained": REVISIONS["demo_teacher"],
        }
    teacher_id = prefix + digest(["teacher", REVISIONS["teacher"], keys])
    # In the cache folder: all results folders with the same cache_dir share this record.
    folder = _cache_root(config) / "teachers" / teacher_id
    return TeacherModel(teacher_id, folder, section, corpus)


def _build_tokens(config: Config, teacher: TeacherModel | None) -> Tokens:
    dataset = config.dataset
    owner: TeacherModel | None
    source: list[Any]
    fingerprint = None
    if dataset.tokenizer is not None or teacher is None:
        local = Path(str(dataset.tokenizer))
        fingerprint = fingerprint_tokenizer(local) if local.is_dir() else None
        owner, source = None, [fingerprint or dataset.tokenizer]
    elif teacher.corpus is not None:
        owner, source = teacher, [teacher.id]
    else:
        section = teacher.section
        owner, source = (
            teacher,
            [section.model_path, section.revision, section.generation.force_regenerate],
        )
    corpus = _build_corpus(config)
    keys = _tokenizing_keys(dataset)
    tokens_id = digest(["tokens", REVISIONS["tokens"], corpus.id, source, keys])
    folder = _cache_root(config) / "tokens" / tokens_id
    return Tokens(tokens_id, folder, corpus, owner, fingerprint)


def _tokenizing_keys(dataset: Dataset) -> dict[str, Any]:
    """Return the keys that decide how documents become sequences, without the tokenizer, which counts by content."""
    keys = identity(dataset).items()
    return {k: v for k, v in keys if k in TOKENIZING_KEYS and k != "tokenizer"}


def _build_logits(config: Config, tokens: Tokens, teacher: TeacherModel) -> Logits:
    generation = {
        k: v for k, v in identity(config.teacher.generation).items() if k != "force_regenerate"
    }
    logits_id = digest(
        ["logits", REVISIONS["logits"], tokens.id, teacher.id, identity(config.cache), generation]
    )
    return Logits(logits_id, _cache_root(config) / "logits" / logits_id, tokens, teacher, config)


def _build_validation(config: Config, tokens: Tokens, teacher: TeacherModel) -> Validation:
    settings = identity(config.evaluation.of_teacher())
    validation_id = digest(["validation", REVISIONS["validation"], tokens.id, teacher.id, settings])
    return Validation(
        validation_id, _cache_root(config) / "validation" / validation_id, tokens, teacher, config
    )


def training_keys(training: Training) -> dict[str, Any]:
    """Return the keys that a student's weights depend on; those of the teacher's loss only where there is one."""
    keys = identity(training) | {"alpha": training.alpha}
    unused = ["resume_from_checkpoint"]  # it counts by content, in `starting_point`
    if training.distillation_type == "output":
        unused += ["temperature", "divergence", "skew", "position_weights", "use_cached_logits"]
    elif training.temperature == 2.0 or training.temperature_end is not None:
        keys["revision"] = REVISIONS["run_at_two"]
    if training.load_best_model_at_end:  # then they decide which step's weights are kept
        for key in ("eval_steps", "eval_sequences"):
            keys[key] = getattr(training, key)
    else:
        unused.append("metric_for_best_model")
    return {k: v for k, v in keys.items() if k not in unused}


def list_selection(config: Config) -> list[Any]:
    """Return what else decides which step's weights a student has: the held-out positions, where the best are kept."""
    return [config.evaluation.max_positions] if config.training.load_best_model_at_end else []


def _cache_root(config: Config) -> Path:
    return Path(config.output.cache_folder)
