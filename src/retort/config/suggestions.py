"""Messages for unknown keys and for values in place of sections, with the key that was probably meant."""

import difflib
from collections.abc import Mapping
from typing import Any

from retort.config.schema import KEY_PREFIXES, KeyPath, dotted, show
from retort.config.sections import Config, leaves, section_at
from retort.config.values import parse_text

# Names from other tools and older versions, in any section, and the keys that replace them.
MOVED = {
    "bf16": ("training.mixed_precision_dtype",),
    "benchmark": ("evaluation.benchmarks.tasks",),
    "custom_shard": ("dataset.sharding",),
    "dataset_config": ("dataset.config_name",),
    "dataset_config_name": ("dataset.config_name",),
    "dataset_name": ("dataset.name",),
    "device": ("teacher.device", "training.device"),
    "devices": ("teacher.generation.gpus",),
    "epochs": ("training.num_epochs",),
    "fp16": ("training.mixed_precision_dtype",),
    "gpu_ids": ("teacher.generation.gpus",),
    "gpu_list": ("teacher.generation.gpus",),
    "gradient_checkpointing": ("training.use_gradient_checkpointing",),
    "loss_type": ("training.distillation_type",),
    "lr": ("training.learning_rate",),
    "max_seq_length": ("dataset.max_length",),
    "num_train_epochs": ("training.num_epochs",),
    "output_dir": ("output.results_dir",),
    "student_config": ("student.config",),
    "student_model": ("student.model_path",),
    "teacher_model": ("teacher.model_path",),
    "teacher_model_path": ("teacher.model_path",),
    "total_workers": ("teacher.generation.num_workers",),
    "train_data": ("dataset.data_files",),
    "train_file": ("dataset.data_files",),
    "evaluation.allow_code_execution": ("evaluation.humaneval.allow_code_execution",),
    "evaluation.benchmark_limit": ("evaluation.benchmarks.limit",),
    "evaluation.benchmark_seed": ("evaluation.benchmarks.seed",),
    "evaluation.benchmark_tasks_dir": ("evaluation.benchmarks.tasks_dir",),
    "evaluation.benchmark_teacher": ("evaluation.benchmarks.teacher",),
    "evaluation.code_timeout_s": ("evaluation.humaneval.code_timeout_s",),
    "evaluation.humaneval_completions": ("evaluation.humaneval.completions",),
    "evaluation.humaneval_file": ("evaluation.humaneval.file",),
    "evaluation.humaneval_max_new_tokens": ("evaluation.humaneval.max_new_tokens",),
    "evaluation.humaneval_pass_at": ("evaluation.humaneval.pass_at",),
    "evaluation.humaneval_temperature": ("evaluation.humaneval.temperature",),
    "evaluation.num_samples": ("evaluation.samples.num_samples",),
    "evaluation.sample_max_new_tokens": ("evaluation.samples.max_new_tokens",),
    "evaluation.sample_prompts": ("evaluation.samples.prompts",),
    "evaluation.sample_seed": ("evaluation.samples.seed",),
    "evaluation.sample_temperature": ("evaluation.samples.temperature",),
    "distillation.type": ("training.distillation_type",),
    "teacher_logits.model": ("teacher.model_path",),
    "teacher_logits.output_dir": ("output.cache_dir",),
    "training.num_workers": ("training.dataloader_num_workers",),
}
# The key that was probably meant when a section is given one value.
_SHORTHAND = {
    "dataset": "dataset.name",
    "evaluation.benchmarks": "evaluation.benchmarks.tasks",
    "evaluation.humaneval": "evaluation.humaneval.file",
    "evaluation.samples": "evaluation.samples.num_samples",
    "student": "student.config",
    "teacher": "teacher.model_path",
}


def not_a_section(path: KeyPath, value: Any) -> str:
    """Return the message for a value that is given instead of a section."""
    prefix, inner = _split_run(path)
    meant = _SHORTHAND.get(".".join(inner))
    section = section_at(inner)
    hint = f"It has the keys {', '.join(section.model_fields)}." if section else ""
    if meant:
        hint = f"Did you mean {prefix}{meant}: {value}?"
    if path == ("runs",):
        hint = "Write one entry per student, such as runs: {soft: {training: {alpha: 0.2}}}."
    return (
        f"{dotted(path)} is {show(value)}, but a section of 'key: value' lines is expected. {hint}"
    )


def unknown_key(path: KeyPath, value: Any) -> str:
    """Return the message for an unknown key or section."""
    value = parse_text(value) if isinstance(value, str) else value
    prefix, inner = _split_run(path)
    sections = [name for name in Config.model_fields if not prefix or name != "output"]
    close = difflib.get_close_matches(inner[0], sections, n=1, cutoff=0.75)
    is_section = value is None or isinstance(value, Mapping)
    if inner[-1] == "api_key" or (isinstance(value, str) and value.startswith(KEY_PREFIXES)):
        hint = (
            "API keys do not belong in a config, which is recorded and shared. Set an environment variable: export "
            "OPENAI_API_KEY=..., or the one that synthesis.api_key_variable names."
        )
    elif inner[-1] == "worker_id":
        hint = (
            "Workers are numbered automatically; set their number with "
            "teacher.generation.num_workers, or leave that out too for one per GPU group."
        )
    elif len(inner) == 1 and close and (is_section or not _new_places(inner)):
        hint = f"Did you mean {prefix}{close[0]}?"
    elif len(inner) == 1 and isinstance(value, Mapping):
        found = {str(key): _places((*inner, str(key)), prefix, sections) for key in value}
        moves = [f"{key} -> {places}" for key, places in found.items() if places]
        hint = f"Its keys have moved: {'; '.join(moves)}." if moves else ""
    else:
        places = _places(inner, prefix, sections)
        is_plain = isinstance(value, str | int | float) and " or " not in places
        hint = f"Write it as {places}{f': {show(value)}' if is_plain else ''}." if places else ""
    return f"Unknown config key {dotted(path)}. {hint or 'config/README.md lists all keys.'}"


def _places(inner: KeyPath, prefix: str, sections: list[str]) -> str:
    """Return the keys to write instead of an unknown one: "a.b or c.d", with `prefix` if the run can have them."""
    places = _new_places(inner)
    return " or ".join((prefix if p.split(".")[0] in sections else "") + p for p in places)


def _new_places(inner: KeyPath) -> list[str]:
    """Return the keys that an unknown one probably means, as dotted paths: the best match only."""
    name = inner[-1]
    if moved := MOVED.get(".".join(inner)) or MOVED.get(name):
        return list(moved)
    keys = [path for path, _ in leaves()]
    same = [path for path in keys if path[-1] == name]
    if near := [path for path in same if path[0] == inner[0]]:
        same = near
    if not same:
        siblings = {path[-1]: path for path in keys if path[:-1] == inner[:-1]}
        everywhere = {path[-1]: path for path in reversed(keys)}
        close = difflib.get_close_matches(name, siblings, n=1) or difflib.get_close_matches(
            name, everywhere, n=1, cutoff=0.75
        )
        same = [siblings.get(c) or everywhere[c] for c in close]
    return [".".join(path) for path in same]


def _split_run(path: KeyPath) -> tuple[str, KeyPath]:
    """Return ("runs.<name>.", rest of the path) for a key in a run, ("", path) for another."""
    if path[:1] == ("runs",) and len(path) > 2:
        return f"runs.{path[1]}.", path[2:]
    return "", path
