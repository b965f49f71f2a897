"""The sections of the config as frozen records. A test compares their fields with the schema's keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from retort.config.schema import section_schema

HUMANEVAL = (
    "humaneval"  # the only benchmark not run by lm-evaluation-harness: it executes a model's code
)


@dataclass(frozen=True)
class Output:
    """Folders of the results."""

    results_dir: str
    cache_dir: str | None


@dataclass(frozen=True)
class Dataset:
    """The corpus, and how its documents become sequences."""

    name: str
    config_name: str | None
    split: str
    data_files: str | tuple[str, ...] | None
    text_column: str
    prompt_column: str | None
    response_column: str | None
    category_column: str | None
    language_column: str | None
    tokenizer: str | None
    revision: str | None
    append_eos: bool
    streaming: bool
    max_samples: int | None
    max_length: int
    long_documents: str
    shuffle: bool
    streaming_buffer_size: int
    streaming_chunk_size: int
    num_proc: int
    num_shards: int
    sharding: str
    seed: int
    validation_fraction: float
    validation_split: str | None


@dataclass(frozen=True)
class Generation:
    """How workers compute the teacher's logits."""

    num_workers: int | None
    batch_size: int
    packing: bool
    gpus_per_model: int
    gpus: str | tuple[str, ...] | None
    force_regenerate: bool | int | float | str
    cpu_threads: int


@dataclass(frozen=True)
class Teacher:
    """The model to learn from."""

    model_path: str | None
    revision: str | None
    dtype: str
    attn_implementation: str | None
    trust_remote_code: bool
    device: str
    generation: Generation


@dataclass(frozen=True)
class Cache:
    """What is stored of the teacher's distribution at each position; `top_k` is a number or "full"."""

    method: str
    top_k: int | str
    min_probability: float | None
    head_probability: float | None
    temperatures: tuple[float, ...]


@dataclass(frozen=True)
class Merge:
    """How parts are merged into one cache."""

    mode: str


@dataclass(frozen=True)
class Student:
    """The model to train: a transformers config, or a model with weights."""

    config: str | None
    model_path: str | None


@dataclass(frozen=True)
class Training:
    """How a student is trained; `alpha` is never None in a config that load_runs returned."""

    distillation_type: str
    alpha: float | None
    temperature: float
    divergence: str
    use_cached_logits: bool
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    max_steps: int | None
    num_epochs: float
    batch_size: int
    gradient_accumulation_steps: int
    seed: int
    loss_chunk_size: int | None
    dataloader_num_workers: int
    use_gradient_checkpointing: bool
    use_mixed_precision: bool
    mixed_precision_dtype: str
    logging_steps: int
    save_steps: int
    save_total_limit: int
    resume_from_checkpoint: str | None
    gpus: int
    nodes: int
    strategy: str
    device: str
    cpu_threads: int


@dataclass(frozen=True)
class Evaluation:
    """How students are measured on the held-out documents."""

    batch_size: int
    max_positions: int
    fidelity_positions: int
    num_samples: int
    sample_prompts: tuple[str, ...]
    sample_max_new_tokens: int
    sample_temperature: float
    sample_seed: int
    benchmarks: tuple[str, ...]
    benchmark_tasks_dir: str | None
    benchmark_teacher: bool
    benchmark_limit: int | None
    benchmark_seed: int
    humaneval_file: str | None
    humaneval_completions: int
    humaneval_pass_at: tuple[int, ...]
    humaneval_temperature: float
    humaneval_max_new_tokens: int
    allow_code_execution: bool
    code_timeout_s: float

    def without_benchmarks(self) -> "Evaluation":
        """Return only the settings of evaluation on held-out text; all others at their default."""
        return _keep(self, lambda key: key not in _BENCHMARK_KEYS)

    def of_teacher(self) -> "Evaluation":
        """Return only the settings of a teacher's held-out positions and samples; all others at their default."""
        return _keep(self, lambda key: key.endswith("_positions") or "sample" in key)

    def of_problems(self) -> "Evaluation":
        """Return only the settings that select benchmarks and their problems; all others at their default."""
        kept = ("benchmarks", "benchmark_tasks_dir", "humaneval_file")
        return _keep(self, kept.__contains__)

    def of_benchmark(self, name: str) -> "Evaluation":
        """Return only the settings of one benchmark; all others, and the list of benchmarks, at their default."""
        keys = ["benchmark_tasks_dir"]
        if name == HUMANEVAL:
            keys = [key for key in _BENCHMARK_KEYS if key.startswith(_OF_HUMANEVAL)]
        return _keep(self, {"batch_size", "benchmark_limit", "benchmark_seed", *keys}.__contains__)


_OF_HUMANEVAL = ("humaneval_", "allow_code_execution", "code_timeout_s")
_BENCHMARK_KEYS = tuple(
    key for key in Evaluation.__dataclass_fields__ if key.startswith(("benchmark", *_OF_HUMANEVAL))
)


def _keep(evaluation: Evaluation, is_kept: Callable[[str], bool]) -> Evaluation:
    keys = section_schema("evaluation")["properties"].items()
    others = {key: freeze(schema["default"]) for key, schema in keys if not is_kept(key)}
    return replace(evaluation, **others)


@dataclass(frozen=True)
class Synthesis:
    """A corpus of responses that a provider or a local model writes."""

    provider: str | None
    model: str | None
    revision: str | None
    base_url: str | None
    api_key_variable: str | None
    prompts: str | tuple[str, ...] | None
    prompts_split: str
    prompt_column: str
    templates: str | None
    num_examples: int | None
    system_prompt: str | None
    temperature: float | None
    top_p: float | None
    max_tokens: int
    seed: int
    engine: str
    batch_size: int
    min_characters: int
    max_characters: int | None
    keep_truncated: bool
    keep_refusals: bool
    keep_duplicates: bool
    near_duplicates: float | None
    response_language: str | None
    check_language: bool
    check_code: bool
    decontaminate: bool
    decontamination_words: int
    concurrency: int
    requests_per_minute: int | None
    tokens_per_minute: int | None
    timeout_s: float
    max_attempts: int
    price_per_million_input: float
    price_per_million_output: float
    max_cost: float | None
    max_total_tokens: int | None
    output: str | None


@dataclass(frozen=True)
class Tracking:
    """Trackers that show metrics during training."""

    use_wandb: bool
    wandb_project: str | None
    wandb_run_name: str | None
    use_tensorboard: bool


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    output: Output
    dataset: Dataset
    teacher: Teacher
    cache: Cache
    merge: Merge
    student: Student
    training: Training
    evaluation: Evaluation
    synthesis: Synthesis
    tracking: Tracking


SECTIONS: dict[str, type[Any]] = {
    "output": Output,
    "dataset": Dataset,
    "teacher": Teacher,
    "teacher.generation": Generation,
    "cache": Cache,
    "merge": Merge,
    "student": Student,
    "training": Training,
    "evaluation": Evaluation,
    "synthesis": Synthesis,
    "tracking": Tracking,
}


def build_section(section: str, values: Mapping[str, Any]) -> Any:
    """Return a section's record from its complete values, lists as tuples."""
    ready = {key: freeze(value) for key, value in values.items()}
    if section == "teacher":
        ready["generation"] = build_section("teacher.generation", values["generation"])
    return SECTIONS[section](**ready)


def section_name(record: Any) -> str:
    """Return the name of a record's section, such as "training" or "teacher.generation"."""
    return next(name for name, kind in SECTIONS.items() if type(record) is kind)


def freeze(value: Any) -> Any:
    """Return a list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def is_default(value: Any, schema: Mapping[str, Any]) -> bool:
    """Return whether a record's value is its schema's default; 0 is not false."""
    default = freeze(schema["default"])
    return type(value) is type(default) and bool(value == default)
