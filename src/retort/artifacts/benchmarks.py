"""Which benchmarks a config asks for, each named by what it is run by: one more runs alone, and re-runs no other."""

from dataclasses import dataclass
from pathlib import Path

from retort.config.load import identity
from retort.config.sections import Config, Evaluation
from retort.io.digests import digest, digest_file, digest_folder
from retort.io.files import suggest_path


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of one model, a run's student or a teacher, whose folder is `model_folder`."""

    id: str
    name: str
    settings: Evaluation  # what it is run by
    model_folder: Path
    config: Config

    @property
    def path(self) -> Path:
        """The file that `benchmark` writes and `report` reads."""
        return self.model_folder / "benchmarks" / self.name / self.id / "benchmark.json"


def plan_benchmarks(config: Config, model_folder: Path, *, revision: int) -> tuple[Benchmark, ...]:
    """Name the benchmarks of one model. The user's own problems and task files count by content.

    Raises ValueError where these are not there.
    """
    planned = []
    for name in config.evaluation.benchmarks:
        settings = config.evaluation.of_benchmark(name)
        keys = identity(settings)
        if settings.humaneval_file is not None:
            keys["humaneval_file"] = _digest_problems(Path(settings.humaneval_file))
        if settings.benchmark_tasks_dir is not None:
            keys["benchmark_tasks_dir"] = _digest_tasks(Path(settings.benchmark_tasks_dir))
        benchmark_id = digest(["benchmark", revision, name, keys])
        planned.append(Benchmark(benchmark_id, name, settings, model_folder, config))
    return tuple(planned)


def _digest_problems(path: Path) -> str:
    if not path.is_file():
        raise ValueError(
            f"evaluation.humaneval_file {str(path)!r} does not exist (looked in {Path.cwd()}).{suggest_path(path)} "
            "Give the path of HumanEval.jsonl.gz (https://github.com/openai/human-eval, data/), without ~."
        )
    return digest_file(path)


def _digest_tasks(path: Path) -> str:
    if not path.is_dir():
        raise ValueError(
            f"evaluation.benchmark_tasks_dir {str(path)!r} is no folder (looked in {Path.cwd()}).{suggest_path(path)} "
            "Give the folder that your task files (YAML) are in, without ~."
        )
    files = digest_folder(path)
    return digest({name: found for name, found in files.items() if "__pycache__" not in name})
