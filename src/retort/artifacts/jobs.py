"""From an artifact to the job that makes it: the sections that its script gets, with everything resolved.

Resolved is what only the workflow knows, such as the folder of the demo's teacher or the file of a synthesis.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retort.artifacts.project import (
    Corpus,
    Logits,
    Project,
    Pruned,
    Run,
    TeacherModel,
    Tokens,
    Validation,
)
from retort.artifacts.responses import Responses
from retort.artifacts.tasks import EvaluationTask
from retort.config.handoff import SECTIONS, Job
from retort.config.sections import Config, Evaluation, Generation, Teacher
from retort.io.digests import digest
from retort.io.files import write_atomically

Artifact = (
    Responses | Corpus | TeacherModel | Tokens | Logits | Validation | Pruned | Run | EvaluationTask
)

_MAX_ARGUMENT_BYTES = 60_000  # Linux takes 131,072 in one argument


def write_argument(content: Mapping[str, Any], folder: Path, *, is_dry_run: bool = False) -> str:
    """Return what `--config` gets: the JSON of `content`, or the path of a file in `folder` that has it if it is long.

    The file is named by a digest of its content, and written when it is not there, but not by a dry run.
    """
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    try:
        encoded = text.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:  # a lone surrogate, or a locale with few characters
        text = json.dumps(content, sort_keys=True)
        encoded = text.encode()
    if len(encoded) <= _MAX_ARGUMENT_BYTES:
        return text
    path = folder / f"{digest(text)}.json"
    if not (is_dry_run or path.exists()):
        write_atomically(path, text.encode())
    return str(path)


class Jobs:
    """The `--config` of every job of a project. Ten thousand jobs may ask for the same, so they are kept."""

    def __init__(
        self, project: Project, *, source: str | None, write: Callable[[Mapping[str, Any]], str]
    ) -> None:
        """`source`: name of the config file; `write`: from JSON to an argument (see `write_argument`)."""
        self.project, self.source, self.write = project, source, write
        self._kept: dict[tuple[str, ...], str] = {}

    def format(self, kind: str, names: Mapping[str, str]) -> str:
        """Return the `--config` of the job of a kind (see `handoff.SECTIONS`) that these wildcards name."""
        ids = tuple(names[name] for name in _IDS if name in names)
        if (kind, *ids) not in self._kept:
            job = build_job(kind, self.project.find(names), run=names.get("run"))
            job = job.model_copy(update={"source": self.source})
            self._kept[kind, *ids] = self.write(job.to_json(SECTIONS[kind]))
        return self._kept[kind, *ids]


# The wildcards that name an artifact, not one of its jobs.
_IDS = (
    "synthesis",
    "corpus",
    "teacher",
    "tokens",
    "logits",
    "validation",
    "pruned",
    "run",
    "task",
    "benchmark",
)


def build_job(kind: str, artifact: Artifact, *, run: str | None = None) -> Job:
    """Return the job of a kind that makes an artifact. A Run has jobs of two: "run", and "evaluation" of its student.

    `run`: name of the run, None for what runs share.
    """
    config, expected = _find_sections(kind, artifact)
    known = {name: digest for name, digest in expected.items() if digest}
    return Job(run=run, config=config, expected=known)


def _find_sections(kind: str, artifact: Artifact) -> tuple[Config, dict[str, str | None]]:
    """Return (config, expected digests) of a job; sections that the kind does not have may be anything."""
    match artifact:
        case Responses():
            return _describe_synthesis(artifact), {"prompts": artifact.stamp}
        case Corpus():
            return _fill(dataset=artifact.dataset), {"corpus": artifact.stamp}
        case TeacherModel():
            dataset = {"dataset": artifact.corpus.dataset} if artifact.corpus else {}
            return _fill(teacher=artifact.section, **dataset), {}
        case Tokens():
            return _describe_tokens(artifact)
        case Logits():
            return _resolve(artifact.config, artifact.teacher), {}
        case Validation():
            config = _resolve(artifact.config, artifact.teacher)
            return _with(config, evaluation=config.evaluation.of_teacher()), {}
        case Pruned():
            return _describe_pruned(artifact)
        case EvaluationTask():
            return _with(artifact.config, evaluation=artifact.settings), {}
        case Run():
            config = _resolve(artifact.config, artifact.teacher)
            if kind == "evaluation":
                return _with(config, evaluation=config.evaluation.of_student()), {}
            is_watched = config.training.eval_steps is not None
            config = _with(
                config,
                dataset=artifact.tokens.corpus.dataset,
                evaluation=config.evaluation.of_training() if is_watched else Evaluation(),
            )
            return config, {"student": artifact.student}


def _fill(**sections: Any) -> Config:
    """Return a config at its defaults, except for some sections."""
    return _with(Config(), **sections)


def _with(config: Config, **sections: Any) -> Config:
    return config.model_copy(update=sections)


def _resolve(config: Config, teacher: TeacherModel | None) -> Config:
    """Return the config with the folder or Hub id that the teacher is loaded from."""
    if teacher is None:
        return config
    section = config.teacher.model_copy(update={"model_path": teacher.model_path})
    return _with(config, teacher=section)


def _describe_synthesis(responses: Responses) -> Config:
    config = responses.config
    teacher = {} if responses.is_online else {"teacher": config.teacher}
    return _fill(synthesis=config.synthesis, evaluation=config.evaluation.of_problems(), **teacher)


def _describe_pruned(pruned: Pruned) -> tuple[Config, dict[str, str | None]]:
    """The teacher is reduced to where it is: runs with other settings of it share what is pruned."""
    section = pruned.config.teacher
    kept: dict[str, Any] = {}
    if pruned.teacher:
        kept = {"model_path": pruned.teacher.model_path, "revision": section.revision}
    if pruned.tokens:
        names = ("cpu_threads", "gpus", "gpus_per_model")
        generation = {name: getattr(section.generation, name) for name in names}
        kept |= {"device": section.device, "generation": Generation(**generation)}
    return _fill(student=pruned.student, teacher=Teacher().model_copy(update=kept)), {
        "student": pruned.content
    }


def _describe_tokens(tokens: Tokens) -> tuple[Config, dict[str, str | None]]:
    """The teacher is reduced to where its tokenizer is: runs with other settings of it share the tokens."""
    corpus, teacher = tokens.corpus, Teacher()
    is_read_directly = not (corpus.needs_snapshot or corpus.synthesis)
    if tokens.teacher:
        section = tokens.teacher.section
        teacher = Teacher(
            model_path=tokens.teacher.model_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    expected = {
        "tokenizer": tokens.fingerprint,
        "corpus": corpus.stamp if is_read_directly else None,
    }
    return _fill(dataset=corpus.dataset, teacher=teacher), expected
