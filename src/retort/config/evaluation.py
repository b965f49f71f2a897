"""The section `evaluation`: how students and teachers are measured on held-out documents, and on benchmarks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

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


class Evaluation(Section):
    """How students are evaluated on the held-out documents."""

    batch_size: Count = setting(
        8, "Sequences in one forward pass of the evaluation.", changes_id=False
    )
    max_positions: Count = setting(
        65536, "Maximum number of held-out positions to evaluate, for student and teacher alike."
    )
    fidelity_positions: Count = setting(
        4096, "Training positions that the teacher scores again to measure the cache's error."
    )
    num_samples: Annotated[int, Field(ge=0, le=100)] = setting(
        4,
        "Held-out texts whose beginnings the teacher and the students continue in the report; 0 shows none.",
    )
    sample_prompts: Unique[Text] = setting(
        (),
        "Your own prompts to continue as well - questions if the corpus has prompts and responses, else beginnings of "
        "texts.",
    )
    sample_max_new_tokens: Count = setting(64, "Maximum number of tokens of a continuation.")
    sample_temperature: Positive = setting(
        1.0, "Temperature of the sampled continuation (top_p 0.95); the other one is greedy."
    )
    sample_seed: NonNegative = setting(0, "Seed of the sampled continuation.")
    benchmarks: Unique[Annotated[str, Field(pattern=r"^[^\s/{}*?.\[\]][^\s/{}*?\[\]]*$")]] = (
        setting(
            (),
            "Benchmarks of every student - tasks and groups of lm-evaluation-harness by name, tasks of "
            "benchmark_tasks_dir, or humaneval.",
        )
    )
    benchmark_tasks_dir: Text | None = setting(
        None,
        "Folder with your own task files (YAML of lm-evaluation-harness), which need no network if their data is "
        "local.",
        is_path=True,
    )
    benchmark_teacher: bool = setting(
        False, "Run the benchmarks on the teachers too.", changes_id=False
    )
    benchmark_limit: Count | None = setting(
        None,
        "Maximum number of examples of each benchmark, for a trial; null means all, which published numbers are for.",
    )
    benchmark_seed: NonNegative = setting(
        0,
        "Seed of random choices in benchmarks - few-shot examples, completions at a temperature above 0.",
    )
    humaneval_file: Text | None = setting(
        None,
        "The problems of HumanEval, as OpenAI publishes them (HumanEval.jsonl.gz).",
        is_path=True,
    )
    humaneval_completions: Count = setting(1, "Completions per problem of HumanEval.")
    humaneval_pass_at: NonEmptyUnique[Count] = setting(
        (1,),
        "The k's of HumanEval's pass@k - the probability that one of k completions is correct.",
    )
    humaneval_temperature: Annotated[float, Field(ge=0)] = setting(
        0.0, "Temperature of HumanEval's completions (top_p 0.95); 0 is greedy."
    )
    humaneval_max_new_tokens: Count = setting(
        512, "Maximum number of tokens of a completion of HumanEval."
    )
    allow_code_execution: bool = setting(
        False,
        "Let benchmarks run the code that a model writes, on this machine, in bubblewrap - without network or home "
        "folder, and with one empty folder to write to.",
        changes_id=False,
    )
    code_timeout_s: Positive = setting(
        10.0, "Time limit in seconds of a program that a model wrote."
    )

    def without_benchmarks(self) -> "Evaluation":
        """Return only the settings of evaluation on held-out text; all others at their default."""
        return self._keep(lambda key: key not in _BENCHMARK_KEYS)

    def of_teacher(self) -> "Evaluation":
        """Return only the settings of a teacher's held-out positions and samples; all others at their default."""
        return self._keep(lambda key: key.endswith("_positions") or "sample" in key)

    def of_problems(self) -> "Evaluation":
        """Return only the settings that select benchmarks and their problems; all others at their default."""
        return self._keep(("benchmarks", "benchmark_tasks_dir", "humaneval_file").__contains__)

    def of_benchmark(self, name: str) -> "Evaluation":
        """Return only the settings of one benchmark; all others, and the list of benchmarks, at their default."""
        keys = ["benchmark_tasks_dir"]
        if name == HUMANEVAL:
            keys = [key for key in _BENCHMARK_KEYS if key.startswith(_OF_HUMANEVAL)]
        return self._keep({"batch_size", "benchmark_limit", "benchmark_seed", *keys}.__contains__)

    def _keep(self, is_kept: Callable[[str], bool]) -> "Evaluation":
        return Evaluation(**{key: value for key, value in vars(self).items() if is_kept(key)})


_OF_HUMANEVAL = ("humaneval_", "allow_code_execution", "code_timeout_s")
_BENCHMARK_KEYS = tuple(
    key for key in Evaluation.model_fields if key.startswith(("benchmark", *_OF_HUMANEVAL))
)


def check_benchmark_teacher(c: "Config") -> Found:
    if c.evaluation.benchmark_teacher and c.teacher.model_path is None:
        yield (
            "evaluation.benchmark_teacher",
            "evaluation.benchmark_teacher is true, but teacher.model_path is null: there is no teacher to run them on. "
            "Set teacher.model_path, or evaluation.benchmark_teacher: false.",
        )


def check_humaneval(c: "Config") -> Found:
    names = list(c.evaluation.benchmarks)
    if HUMANEVAL not in names:
        return
    if not c.evaluation.allow_code_execution:
        yield (
            "evaluation.benchmarks",
            f"evaluation.benchmarks is {names}, and humaneval runs the code that a student writes, but "
            "evaluation.allow_code_execution is false. Set evaluation.allow_code_execution: true to allow it, inside "
            "bubblewrap (docs/guide.md), or remove humaneval.",
        )
    if c.evaluation.humaneval_file is None:
        yield (
            "evaluation.benchmarks",
            f"evaluation.benchmarks is {names}, but evaluation.humaneval_file is null: it should be the path of its "
            "problems. Download data/HumanEval.jsonl.gz from https://github.com/openai/human-eval and set its path.",
        )


def check_completions(c: "Config") -> Found:
    if HUMANEVAL not in c.evaluation.benchmarks:
        return
    completions, ks = c.evaluation.humaneval_completions, list(c.evaluation.humaneval_pass_at)
    if max(ks) > completions:
        yield (
            "evaluation.humaneval_pass_at",
            f"evaluation.humaneval_pass_at is {ks}, but evaluation.humaneval_completions is {completions}: pass@k "
            f"needs at least k completions. Set evaluation.humaneval_completions to {max(ks)} or more (twice as many "
            "estimate it better), or use a smaller k.",
        )
    if completions > 1 and c.evaluation.humaneval_temperature == 0:
        yield (
            "evaluation.humaneval_temperature",
            f"evaluation.humaneval_completions is {completions}, but evaluation.humaneval_temperature is 0, which "
            "writes the same completion every time. Set evaluation.humaneval_temperature, for instance 0.2 for pass@1 "
            "and 0.8 for pass@100, or evaluation.humaneval_completions: 1.",
        )


CHECKS = (check_benchmark_teacher, check_humaneval, check_completions)
