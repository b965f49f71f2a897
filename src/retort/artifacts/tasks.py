"""The evaluation tasks of a model (`evaluation.benchmarks.tasks`), one id each: adding a task reruns no other."""

from dataclasses import dataclass
from pathlib import Path

from retort.config.load import identity
from retort.config.sections import Config, Evaluation
from retort.io.digests import digest, digest_file, digest_folder
from retort.io.files import suggest_path


@dataclass(frozen=True)
class EvaluationTask:
    """One task of one model, a run's student or a teacher, whose folder is `model_folder`."""

    id: str
    name: str
    settings: Evaluation  # the keys that apply to it
    model_folder: Path
    config: Config

    @property
    def path(self) -> Path:
        """The output of `benchmark`."""
        return task_path(self.model_folder, self.name, self.id)


def task_path(model_folder: Path, name: str, task_id: str) -> Path:
    """Return the output of `benchmark` for a task of the model in a folder."""
    return model_folder / "benchmarks" / name / task_id / "benchmark.json"


def build_tasks(config: Config, model_folder: Path, *, revision: int) -> tuple[EvaluationTask, ...]:
    """Return the tasks of one model. The user's files of problems and tasks count by content.

    Raises ValueError when these do not exist.
    """
    tasks = []
    for name in config.evaluation.benchmarks.tasks:
        settings = config.evaluation.of_benchmark(name)
        keys = identity(settings)
        if settings.humaneval.file is not None:
            keys["humaneval"]["file"] = _digest_problems(Path(settings.humaneval.file))
        if settings.benchmarks.tasks_dir is not None:
            keys["benchmarks"]["tasks_dir"] = _digest_tasks(Path(settings.benchmarks.tasks_dir))
        task_id = digest(["benchmark", revision, name, keys])
        tasks.append(EvaluationTask(task_id, name, settings, model_folder, config))
    return tuple(tasks)


def _digest_problems(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"evaluation.humaneval.file {str(path)!r} does not exist (looked in {Path.cwd()}).{suggest_path(path)} "
            "Give the path of HumanEval.jsonl.gz (https://github.com/openai/human-eval, data/)."
        )
    return digest_file(path)


def _digest_tasks(path: Path) -> str:
    if not path.is_dir():
        raise ValueError(
            f"evaluation.benchmarks.tasks_dir {str(path)!r} is not a folder (looked in {Path.cwd()})."
            f"{suggest_path(path)} Give the folder of your task files (YAML)."
        )
    files = digest_folder(path)
    return digest({name: found for name, found in files.items() if "__pycache__" not in name})
