"""The artifacts of a config: one record per kind, with its id, its folder and what it is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from retort.artifacts.responses import Responses
from retort.artifacts.tasks import EvaluationTask, task_path
from retort.config.sections import Config, Dataset, Student, Teacher
from retort.corpus.reading import count_readers, snapshot_record_path
from retort.corpus.sources import is_hub


@dataclass(frozen=True)
class Corpus:
    """The documents of one `dataset` section; for a synthesis, `dataset` is the section that reads its responses."""

    id: str
    folder: Path
    dataset: Dataset
    needs_snapshot: bool  # a rule writes the documents to `folder` before they are tokenized
    stamp: str  # of the local files when the id was computed (see `digest_file_states`); jobs that read them compare it
    synthesis: Responses | None = None

    @property
    def records(self) -> list[Path]:
        """The files that exist once the corpus is complete: of a synthesis, or of each reader of a snapshot."""
        if self.synthesis:
            return [self.synthesis.record]
        if not self.needs_snapshot:
            return []
        return [
            snapshot_record_path(self.folder, self.dataset, reader)
            for reader in range(count_readers(self.dataset))
        ]


@dataclass(frozen=True)
class TeacherModel:
    """One teacher; `folder` contains the record of its fingerprint and, for the demo, the model itself."""

    id: str
    folder: Path
    section: Teacher
    corpus: Corpus | None  # that the demo's teacher is trained on, else None

    @property
    def model_path(self) -> str:
        """Folder or Hub id of the model, for transformers."""
        return str(self.folder / "model") if self.corpus else str(self.section.model_path)


@dataclass(frozen=True)
class Tokens:
    """The token shards of one corpus and one tokenizer."""

    id: str
    folder: Path
    corpus: Corpus
    teacher: TeacherModel | None  # whose tokenizer is used; None: dataset.tokenizer
    fingerprint: str | None  # of a local dataset.tokenizer when the id was computed

    @property
    def tokenizer(self) -> str:
        """Folder or Hub id of the tokenizer."""
        return self.teacher.model_path if self.teacher else str(self.corpus.dataset.tokenizer)


@dataclass(frozen=True)
class Logits:
    """The cache of one teacher's distributions for one set of sequences."""

    id: str
    folder: Path
    tokens: Tokens
    teacher: TeacherModel
    config: Config


@dataclass(frozen=True)
class Validation:
    """One teacher's distributions for the held-out sequences, at full precision."""

    id: str
    folder: Path
    tokens: Tokens
    teacher: TeacherModel
    config: Config

    @property
    def features(self) -> Path:
        """The output of `score_validation`."""
        return self.folder / "teacher_validation.safetensors"


@dataclass(frozen=True)
class Pruned:
    """The part of a model that students start from.

    teacher: that it is a part of, None for student.model_path. tokens: on which activations are measured, None if none
    are. config: of a run that starts from it.
    """

    id: str
    folder: Path
    student: Student
    teacher: TeacherModel | None
    tokens: Tokens | None
    config: Config
    content: str  # digest of `student_content` when the id was computed

    @property
    def record(self) -> Path:
        """The output of `prune_teacher`."""
        return self.folder / "pruned.json"


@dataclass(frozen=True)
class Run:
    """One trained student, its evaluation and its evaluation tasks.

    teachers, logits, validations: of its teacher, or of each that is mixed, the main one first; empty without one.
    """

    name: str
    id: str
    evaluation_id: str
    folder: Path
    config: Config
    student: str  # digest of `starting_point` when the id was computed
    tokens: Tokens
    teachers: tuple[TeacherModel, ...]
    logits: tuple[Logits, ...]
    validations: tuple[Validation, ...]
    pruned: Pruned | None
    tasks: tuple[EvaluationTask, ...]
    imported: Path | None = None  # the folder of what it learns from, in place of `logits`

    @property
    def teacher(self) -> TeacherModel | None:
        """Its teacher, of several the main one."""
        return self.teachers[0] if self.teachers else None

    @property
    def features(self) -> list[Path]:
        """The held-out scores of its teachers."""
        return [validation.features for validation in self.validations]

    @property
    def metrics_path(self) -> Path:
        """The output of `evaluate`."""
        return self.folder / "evaluation" / self.evaluation_id / "metrics.json"

    @property
    def watched_features(self) -> list[Path]:
        """The teachers' held-out scores, if it learns from them and is compared with them during the training."""
        training = self.config.training
        is_compared = training.eval_steps is not None and training.distillation_type != "output"
        return self.features if is_compared else []

    @property
    def signals(self) -> list[Path]:
        """What it learns from: the manifests of the caches, or the records of its teachers; none without a teacher."""
        if self.imported:
            return [self.imported / "manifest.json"]
        if self.logits:
            return [logits.folder / "manifest.json" for logits in self.logits]
        return [teacher.folder / "fingerprint.json" for teacher in self.teachers]


@dataclass(frozen=True)
class Project:
    """All artifacts of a config, by id; runs may share them."""

    runs: dict[str, Run]
    check_id: str
    report_id: str
    syntheses: dict[str, Responses] = field(default_factory=dict)
    corpora: dict[str, Corpus] = field(default_factory=dict)
    teachers: dict[str, TeacherModel] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)
    logits: dict[str, Logits] = field(default_factory=dict)
    validations: dict[str, Validation] = field(default_factory=dict)
    pruned: dict[str, Pruned] = field(default_factory=dict)
    teacher_tasks: dict[Path, EvaluationTask] = field(default_factory=dict)  # by their path

    @cached_property
    def tasks(self) -> dict[Path, EvaluationTask]:
        """All evaluation tasks by their path, those of teachers first."""
        of_runs = {task.path: task for run in self.runs.values() for task in run.tasks}
        return self.teacher_tasks | of_runs

    @property
    def staged_records(self) -> list[Path]:
        """Inputs of `stage` that other rules make: records of teachers, and of corpora that need a network."""
        teachers = [teacher for teacher in self.teachers.values() if teacher.corpus is None]
        corpora = [
            corpus
            for corpus in self.corpora.values()
            if any(map(is_hub, corpus.dataset.sources))
            or (corpus.synthesis and corpus.synthesis.is_online)
        ]
        records = [record for corpus in corpora for record in corpus.records]
        return [*(teacher.folder / "fingerprint.json" for teacher in teachers), *records]

    def find_features(self, found: Logits | Run) -> list[Path]:
        """Return the teacher's held-out scores, for the fidelity of a cache or the metrics of a run, if there are any.

        A cache that exists is not merged again when other positions are to be evaluated.
        """
        if isinstance(found, Run):
            return found.features
        pair = (found.tokens.id, found.teacher.id)
        scores = [
            v.features for v in self.validations.values() if (v.tokens.id, v.teacher.id) == pair
        ]
        is_merged = (found.folder / "manifest.json").exists()
        return [path for path in scores[:1] if not is_merged or path.exists()]

    def find(self, names: Mapping[str, str]) -> Any:
        """Return the artifact that a job's wildcards name."""
        if "benchmark" in names:
            model = self.runs[names["run"]] if "run" in names else self.teachers[names["teacher"]]
            return self.tasks[task_path(model.folder, names["task"], names["benchmark"])]
        kind = next(kind for kind in _FIELDS if kind in names)
        return getattr(self, _FIELDS[kind])[names[kind]]


# Where a project keeps the artifacts that a wildcard names.
_FIELDS = {
    "tokens": "tokens",
    "run": "runs",
    "validation": "validations",
    "logits": "logits",
    "pruned": "pruned",
    "teacher": "teachers",
    "corpus": "corpora",
    "synthesis": "syntheses",
}
