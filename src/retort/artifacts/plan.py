"""What a config makes: every artefact's identity and place, known when the Snakefile is parsed.

An id is a digest of the config keys that define the artefact, of the ids it is made from, and of the
`REVISIONS` number of the code that makes it; keys left at their default do not count, so that a key added
later renames nothing. Corpora, student configs and student checkpoints count by content, not by path. So a
path says what is in the file: existence is all that the workflow has to look at, going to another setting
and back costs nothing, and no setting ever continues another's work.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retort.artifacts.benchmarks import Benchmark, plan_benchmarks
from retort.artifacts.syntheses import SynthesisPlan, plan_synthesis
from retort.config.load import identity
from retort.config.sections import Config, Dataset, Student, Teacher
from retort.config.synthesis_checks import SYNTHESIS
from retort.corpus.reading import (
    TOKENIZING_KEYS,
    corpus_files,
    corpus_keys,
    count_readers,
    is_drawn,
    record_path,
)
from retort.corpus.sources import list_files
from retort.io.digests import digest, digest_file, digest_file_states
from retort.io.files import is_path, read_json, require_no_file_at, suggest_path
from retort.io.fingerprints import fingerprint_tokenizer, fingerprint_weights

# Raise a number when the code makes other bytes from the same input: that, and only that, re-makes results.
# tests/unit/test_golden.py fails when bytes change and the number does not.
REVISIONS = {
    "answers": 1,  # raised, every answer is asked and paid for anew: what is asked, and how prompts are read
    "synthesis": 2,
    "corpus": 1,
    "teacher": 2,
    "demo_teacher": 2,  # trained here, while another teacher is only recorded
    "tokens": 3,
    "logits": 5,
    "validation": 3,
    "run": 3,
    "evaluation": 3,
    "benchmark": 1,
    "report": 3,
}


@dataclass(frozen=True)
class Corpus:
    """The documents of one `dataset` section; `is_drawn` when a rule writes them to `folder` first.

    Of a synthesis, `dataset` is the section that reads its responses.
    """

    id: str
    folder: Path
    dataset: Dataset
    is_drawn: bool
    stamp: str  # of the local files that the id's digests were taken of: whoever reads them compares it
    synthesis: SynthesisPlan | None = None

    @property
    def records(self) -> list[Path]:
        """The files that say that the corpus is there, one for each reader that draws it; none where it was there."""
        if self.synthesis:
            return [self.synthesis.record]
        if not self.is_drawn:
            return []
        return [
            record_path(self.folder, self.dataset, reader)
            for reader in range(count_readers(self.dataset))
        ]


@dataclass(frozen=True)
class TeacherModel:
    """One teacher; `folder` holds the record of its fingerprint and, for the demo's, the model itself."""

    id: str
    folder: Path
    section: Teacher
    corpus: Corpus | None  # the text that the demo's teacher is trained on

    @property
    def model_path(self) -> str:
        """A folder or Hub id that transformers can load."""
        return str(self.folder / "model") if self.corpus else str(self.section.model_path)


@dataclass(frozen=True)
class Tokens:
    """The sequences that one tokenizer makes of one corpus."""

    id: str
    folder: Path
    corpus: Corpus
    teacher: (
        TeacherModel | None
    )  # the teacher whose tokenizer is used; None: dataset.tokenizer names it
    fingerprint: str | None  # of a local dataset.tokenizer, as it was when the tokens were named

    @property
    def tokenizer(self) -> str:
        """A folder or Hub id of the tokenizer."""
        return self.teacher.model_path if self.teacher else str(self.corpus.dataset.tokenizer)


@dataclass(frozen=True)
class Logits:
    """The cache of one teacher's distributions over one set of sequences."""

    id: str
    folder: Path
    tokens: Tokens
    teacher: TeacherModel
    config: Config


@dataclass(frozen=True)
class Validation:
    """What one teacher says of the held-out sequences, at full precision."""

    id: str
    folder: Path
    tokens: Tokens
    teacher: TeacherModel
    config: Config


@dataclass(frozen=True)
class Run:
    """One student trained, its evaluation and its benchmarks."""

    name: str
    id: str
    evaluation_id: str
    folder: Path
    config: Config
    student: str  # digest of what the student starts from, as it was when the run was named
    tokens: Tokens
    teacher: TeacherModel | None
    logits: Logits | None
    validation: Validation | None
    benchmarks: tuple[Benchmark, ...]

    @property
    def metrics_path(self) -> Path:
        """The file that `evaluate` writes and `report` reads."""
        return self.folder / "evaluation" / self.evaluation_id / "metrics.json"


@dataclass(frozen=True)
class Project:
    """Everything a config makes, each artefact once, however many runs share it; dicts are keyed by id."""

    runs: dict[str, Run]
    check_id: str
    report_id: str
    syntheses: dict[str, SynthesisPlan] = field(default_factory=dict)
    corpora: dict[str, Corpus] = field(default_factory=dict)
    teachers: dict[str, TeacherModel] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)
    logits: dict[str, Logits] = field(default_factory=dict)
    validations: dict[str, Validation] = field(default_factory=dict)
    teacher_benchmarks: dict[Path, Benchmark] = field(default_factory=dict)  # by their path

    @property
    def benchmarks(self) -> dict[Path, Benchmark]:
        """All benchmarks by their path, those of teachers first."""
        of_runs = {b.path: b for run in self.runs.values() for b in run.benchmarks}
        return self.teacher_benchmarks | of_runs


def plan_project(configs: Mapping[str, Config]) -> Project:
    """Name every artefact that the runs' configs make.

    Raises ValueError where a local corpus or student config is missing, where a file stands in the results' place,
    or where the weights or the tokenizer under a local teacher's path are not those that its recorded results were
    made with.
    """
    for output in {config.output for config in configs.values()}:
        require_no_file_at(Path(output.results_dir))
        require_no_file_at(Path(output.cache_dir or output.results_dir))
    for config in configs.values():
        _refuse_missing_folders(config)
    runs = {name: _plan_run(name, config) for name, config in configs.items()}
    everything = list(runs.values())
    teachers = [r.teacher for r in everything if r.teacher] + [
        r.tokens.teacher for r in everything if r.tokens.teacher
    ]
    for teacher in {t.id: t for t in teachers}.values():
        refuse_other_teacher(teacher)
    corpora = [r.tokens.corpus for r in everything] + [t.corpus for t in teachers if t.corpus]
    evaluations: list[Any] = [[r.name, r.id, r.evaluation_id] for r in everything]
    teacher_benchmarks = {b.path: b for r in everything for b in _plan_teacher_benchmarks(r)}
    ids = [[str(b.path)] for b in teacher_benchmarks.values()]
    ids += [[r.name, r.id, b.id] for r in everything for b in r.benchmarks]
    return Project(
        runs=runs,
        check_id=digest(["check", evaluations, *ids]),
        report_id=digest(["report", REVISIONS["report"], evaluations, *ids]),
        syntheses={c.synthesis.id: c.synthesis for c in corpora if c.synthesis},
        corpora={c.id: c for c in corpora},
        teachers={t.id: t for t in teachers},
        tokens={r.tokens.id: r.tokens for r in everything},
        logits={r.logits.id: r.logits for r in everything if r.logits},
        validations={r.validation.id: r.validation for r in everything if r.validation},
        teacher_benchmarks=teacher_benchmarks,
    )


def _refuse_missing_folders(config: Config) -> None:
    """Raise ValueError for a model or tokenizer that is written as a path, not as a Hub id, and is not there."""
    named = {
        "teacher.model_path": config.teacher.model_path,
        "dataset.tokenizer": config.dataset.tokenizer,
        "student.model_path": config.student.model_path,
    }
    for key, value in named.items():
        if value is not None and is_path(value) and not Path(value).is_dir():
            raise ValueError(
                f"{key} {value!r} does not exist (looked in {Path.cwd()}).{suggest_path(Path(value))} Give a "
                "folder that save_pretrained() wrote, without ~, or the id of a model on the Hub."
            )


def refuse_other_teacher(teacher: TeacherModel) -> None:
    """Raise ValueError when a local teacher's weights or tokenizer are not those recorded in its folder."""
    path = teacher.folder / "fingerprint.json"
    local = Path(str(teacher.section.model_path))
    if teacher.corpus or not path.exists() or not local.is_dir():
        return
    record = read_json(path)
    compared = {
        "weights": (record["weights"], fingerprint_weights(local)),
        "tokenizer files": (record["tokenizer"]["fingerprint"], fingerprint_tokenizer(local)),
    }
    for what, (recorded, found) in compared.items():
        if recorded != found:
            raise ValueError(
                f"teacher.model_path {str(local)!r} holds other {what} than before: fingerprint {found}, but "
                f"results were made with {recorded} (recorded in {path}). Put the old files back, or set "
                f"teacher.generation.force_regenerate to a new value (a date, say): it makes a new cache from "
                "what is there now and leaves the old one where it is."
            )


def _plan_run(name: str, config: Config) -> Run:
    results = Path(config.output.results_dir)
    training = config.training
    teacher = _plan_teacher(config) if config.teacher.model_path else None
    tokens = _plan_tokens(config, teacher)
    needs_teacher = teacher is not None and training.distillation_type != "output"
    logits = (
        _plan_logits(config, tokens, teacher)
        if teacher and needs_teacher and training.use_cached_logits
        else None
    )
    validation = _plan_validation(config, tokens, teacher) if teacher else None
    keys = identity(training) | {"alpha": training.alpha}
    if training.distillation_type == "output":
        keys = {
            k: v
            for k, v in keys.items()
            if k not in ("temperature", "divergence", "use_cached_logits")
        }
    signal = logits.id if logits else teacher.id if teacher and needs_teacher else None
    student = student_content(config.student)
    run_id = digest(["run", REVISIONS["run"], tokens.id, signal, keys, student])
    evaluation_id = digest(
        [
            "evaluation",
            REVISIONS["evaluation"],
            validation.id if validation else None,
            identity(config.evaluation.without_benchmarks()),
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
        teacher=teacher,
        logits=logits,
        validation=validation,
        benchmarks=plan_benchmarks(config, folder, revision=REVISIONS["benchmark"]),
    )


def _plan_teacher_benchmarks(run: Run) -> tuple[Benchmark, ...]:
    """Name those of a run's teacher, where it is asked for; its folder is that of all runs that share it."""
    if run.teacher is None or not run.config.evaluation.benchmark_teacher:
        return ()
    return plan_benchmarks(run.config, run.teacher.folder, revision=REVISIONS["benchmark"])


def _plan_corpus(config: Config) -> Corpus:
    if config.dataset.name == SYNTHESIS:
        return _plan_made_corpus(config)
    dataset = config.dataset
    keys = corpus_keys(dataset)
    files = corpus_files(dataset)
    if list_files(dataset):
        keys.pop("data_files", None)  # these count by content; a Hub dataset's files, by name
    if dataset.streaming and dataset.shuffle:
        keys["shuffle"] = (
            "windows"  # once it was a buffer that was refilled row by row, another order
        )
    memo = Path(config.output.results_dir) / ".digests.json"
    stamp = digest_file_states(
        files
    )  # before the digests: an edit while they are taken must show too
    content = [digest_file(path, memo=memo) for path in files]
    corpus_id = digest(["corpus", REVISIONS["corpus"], keys, content])
    folder = _cache_root(config) / "corpora" / corpus_id
    return Corpus(corpus_id, folder, dataset, is_drawn(dataset), stamp)


def _plan_made_corpus(config: Config) -> Corpus:
    """Name the corpus of a synthesis, whose bytes are not known yet, by what it is made of."""
    plan = plan_synthesis(config, _cache_root(config), revisions=REVISIONS)
    keys = corpus_keys(config.dataset)
    corpus_id = digest(["corpus", REVISIONS["corpus"], keys, plan.id])
    dataset = plan.as_dataset(config.dataset)
    return Corpus(corpus_id, plan.folder, dataset, False, plan.stamp, plan)


def _plan_teacher(config: Config) -> TeacherModel:
    section = config.teacher
    keys = {k: v for k, v in identity(section).items() if k != "generation"}
    keys["model_path"] = section.model_path
    keys["force_regenerate"] = section.generation.force_regenerate
    corpus = None
    prefix = ""
    if section.model_path == "demo":
        corpus = _plan_corpus(config)
        prefix = "demo-"
        trained = REVISIONS["demo_teacher"]
        keys |= {
            "corpus": corpus.id,
            "max_length": config.dataset.max_length,
            "trained": trained,
        }
    teacher_id = prefix + digest(["teacher", REVISIONS["teacher"], keys])
    # Beside what is made from it: every results_dir that shares a cache_dir shares this record.
    folder = _cache_root(config) / "teachers" / teacher_id
    return TeacherModel(teacher_id, folder, section, corpus)


def _plan_tokens(config: Config, teacher: TeacherModel | None) -> Tokens:
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
    corpus = _plan_corpus(config)
    keys = {k: v for k, v in identity(dataset).items() if k in TOKENIZING_KEYS}
    keys.pop("tokenizer", None)  # `source` says which it is
    tokens_id = digest(["tokens", REVISIONS["tokens"], corpus.id, source, keys])
    folder = _cache_root(config) / "tokens" / tokens_id
    return Tokens(tokens_id, folder, corpus, owner, fingerprint)


def _plan_logits(config: Config, tokens: Tokens, teacher: TeacherModel) -> Logits:
    generation = {
        k: v for k, v in identity(config.teacher.generation).items() if k != "force_regenerate"
    }
    logits_id = digest(
        ["logits", REVISIONS["logits"], tokens.id, teacher.id, identity(config.cache), generation]
    )
    return Logits(logits_id, _cache_root(config) / "logits" / logits_id, tokens, teacher, config)


def _plan_validation(config: Config, tokens: Tokens, teacher: TeacherModel) -> Validation:
    asked = identity(config.evaluation.of_teacher())
    validation_id = digest(["validation", REVISIONS["validation"], tokens.id, teacher.id, asked])
    return Validation(
        validation_id, _cache_root(config) / "validation" / validation_id, tokens, teacher, config
    )


def student_content(student: Student) -> Any:
    """Return what a student starts from, by content: a parsed JSON config, or a checkpoint's weights.

    Raises ValueError, with the next step, when it cannot be read.
    """
    if student.model_path is not None:
        folder = Path(student.model_path)
        return fingerprint_weights(folder) if folder.is_dir() else student.model_path
    path = Path(str(student.config))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"student.config {str(path)!r} does not exist (looked in {Path.cwd()}).{suggest_path(path)} Give the path "
            "of a transformers config as JSON; config/students/ holds some to start from."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"student.config {str(path)!r} is not JSON: {error}. Mend the file."
        ) from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(
            f"student.config {str(path)!r} has no 'model_type': expected a transformers config such as "
            '{"model_type": "llama", "hidden_size": 512, ...}; config/students/ holds some to start from.'
        )
    return content


def _cache_root(config: Config) -> Path:
    return Path(config.output.cache_dir or config.output.results_dir)
