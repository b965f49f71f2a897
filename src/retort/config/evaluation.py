"""The section `evaluation`: how students and teachers are measured on held-out documents, and on benchmarks."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from retort.config.schema import Found
from retort.config.section import (
    Count,
    NonEmptyUnique,
    NonNegative,
    Positive,
    Section,
    Text,
    Unique,
    setting,
)

if TYPE_CHECKING:
    from retort.config.sections import Config


# The only benchmark not run by lm-evaluation-harness: it executes a model's code.
HUMANEVAL = "humaneval"


class SampleSettings(Section):
    """Texts that the teacher and the students continue, side by side in the report."""

    num_samples: Annotated[int, Field(ge=0, le=100)] = 4
    """Held-out texts whose beginnings are continued; 0 shows none."""
    prompts: Unique[Text] = ()
    """Your own prompts to continue as well - questions if the corpus has prompts and responses, else beginnings of
    texts."""
    max_new_tokens: Count = 64
    """Maximum number of tokens of a continuation."""
    temperature: Positive = 1.0
    """Temperature of the sampled continuation (top_p 0.95); the other one is greedy."""
    seed: NonNegative = 0
    """Seed of the sampled continuation."""


class BenchmarkSettings(Section):
    """Benchmarks of every student: tasks of lm-evaluation-harness, and humaneval."""

    tasks: Unique[Annotated[str, Field(pattern=r"^[^\s/{}*?.\[\]][^\s/{}*?\[\]]*$")]] = ()
    """Tasks and groups of lm-evaluation-harness by name, tasks of tasks_dir, or humaneval."""
    tasks_dir: Text | None = setting(None, is_path=True)
    """Folder with your own task files (YAML of lm-evaluation-harness), which need no network if their data is local."""
    teacher: bool = setting(False, changes_id=False)
    """Run the benchmarks on the teachers too."""
    limit: Count | None = None
    """Maximum number of examples of each benchmark, for a trial; null means all, which published numbers are for."""
    seed: NonNegative = 0
    """Seed of random choices in benchmarks - few-shot examples, completions at a temperature above 0."""


class HumanevalSettings(Section):
    """The benchmark humaneval, which runs the code that a model writes."""

    file: Text | None = setting(None, is_path=True)
    """The problems of HumanEval, as OpenAI publishes them (HumanEval.jsonl.gz)."""
    completions: Count = 1
    """Completions per problem."""
    pass_at: NonEmptyUnique[Count] = (1,)
    """The k's of pass@k - the probability that one of k completions is correct."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of the completions (top_p 0.95); 0 is greedy."""
    max_new_tokens: Count = 512
    """Maximum number of tokens of a completion."""
    allow_code_execution: bool = setting(False, changes_id=False)
    """Let benchmarks run the code that a model writes, on this machine, in bubblewrap - without network or home folder,
    and with one empty folder to write to."""
    code_timeout_s: Positive = 10.0
    """Time limit in seconds of a program that a model wrote."""


class Evaluation(Section):
    """How students are evaluated on the held-out documents."""

    batch_size: Count = setting(8, changes_id=False)
    """Sequences in one forward pass of the evaluation."""
    max_positions: Count = 65536
    """Maximum number of held-out positions to evaluate, for student and teacher alike."""
    fidelity_positions: Count = 4096
    """Training positions that the teacher scores again to measure the cache's error."""
    samples: SampleSettings = Field(default_factory=SampleSettings)
    benchmarks: BenchmarkSettings = Field(default_factory=BenchmarkSettings)
    humaneval: HumanevalSettings = Field(default_factory=HumanevalSettings)

    def of_teacher(self) -> "Evaluation":
        """Return only what the teacher's held-out scores and samples depend on; all else at its default."""
        return Evaluation(
            max_positions=self.max_positions,
            fidelity_positions=self.fidelity_positions,
            samples=self.samples,
        )

    def of_student(self) -> "Evaluation":
        """Return only what the evaluation of a student on held-out text depends on; all else at its default."""
        return self.of_teacher().model_copy(update={"batch_size": self.batch_size})

    def of_training(self) -> "Evaluation":
        """Return only what the measurements of a student in training depend on; all else at its default."""
        return Evaluation(max_positions=self.max_positions, batch_size=self.batch_size)

    def of_problems(self) -> "Evaluation":
        """Return only what selects benchmarks and their problems; all else at its default."""
        benchmarks = BenchmarkSettings(
            tasks=self.benchmarks.tasks, tasks_dir=self.benchmarks.tasks_dir
        )
        return Evaluation(
            benchmarks=benchmarks, humaneval=HumanevalSettings(file=self.humaneval.file)
        )

    def of_benchmark(self, name: str) -> "Evaluation":
        """Return only what one benchmark depends on; all else, and the list of benchmarks, at its default."""
        others: dict[str, Any] = {"tasks": (), "teacher": False}
        if name == HUMANEVAL:
            others["tasks_dir"] = None
        return Evaluation(
            batch_size=self.batch_size,
            benchmarks=self.benchmarks.model_copy(update=others),
            humaneval=self.humaneval if name == HUMANEVAL else HumanevalSettings(),
        )


def check_benchmark_teacher(c: "Config") -> Found:
    if c.evaluation.benchmarks.teacher and c.teacher.model_path is None:
        yield (
            "evaluation.benchmarks.teacher is true, but teacher.model_path is null: there is no teacher to run them "
            "on. Set teacher.model_path, or evaluation.benchmarks.teacher: false."
        )


def check_humaneval(c: "Config") -> Found:
    names = list(c.evaluation.benchmarks.tasks)
    if HUMANEVAL not in names:
        return
    if not c.evaluation.humaneval.allow_code_execution:
        yield (
            f"evaluation.benchmarks.tasks is {names}, and humaneval runs the code that a student writes, but "
            "evaluation.humaneval.allow_code_execution is false. Set evaluation.humaneval.allow_code_execution: true "
            "to allow it, inside bubblewrap (docs/guide.md), or remove humaneval."
        )
    if c.evaluation.humaneval.file is None:
        yield (
            f"evaluation.benchmarks.tasks is {names}, but evaluation.humaneval.file is null: it should be the path "
            "of its problems. Download data/HumanEval.jsonl.gz from https://github.com/openai/human-eval and set "
            "its path."
        )


def check_completions(c: "Config") -> Found:
    if HUMANEVAL not in c.evaluation.benchmarks.tasks:
        return
    completions, ks = c.evaluation.humaneval.completions, list(c.evaluation.humaneval.pass_at)
    if max(ks) > completions:
        yield (
            f"evaluation.humaneval.pass_at is {ks}, but evaluation.humaneval.completions is {completions}: pass@k "
            f"needs at least k completions. Set evaluation.humaneval.completions to {max(ks)} or more (twice as many "
            "estimate it better), or use a smaller k."
        )
    if completions > 1 and c.evaluation.humaneval.temperature == 0:
        yield (
            f"evaluation.humaneval.completions is {completions}, but evaluation.humaneval.temperature is 0, which "
            "writes the same completion every time. Set evaluation.humaneval.temperature, for instance 0.2 for pass@1 "
            "and 0.8 for pass@100, or evaluation.humaneval.completions: 1."
        )
