"""Checks across keys: contradictions in a config are refused here.

The checks take a complete config as a flat mapping from dotted keys ("cache.top_k") to values, and raise one
`ConfigError`: the value found, what was expected, what to do.
"""

import re
from collections.abc import Mapping
from typing import Any

from retort.config.schema import ConfigError, show
from retort.config.synthesis_checks import SYNTHESIS, check_synthesis_keys

Flat = Mapping[str, Any]

DEFAULT_ALPHA = {"output": 1.0, "logit": 0.0, "hybrid": 0.5}
LOADERS = ("text", "json", "parquet", "csv")
_METHOD_KEYS = {
    "top_k": "cache.top_k",
    "top_p": "cache.min_probability",
    "sampled": "cache.head_probability",
}
_GPU_ID = re.compile(r"\d+|(GPU|MIG)-[A-Za-z0-9/-]+")


def check_config(c: Flat, defaults: Flat) -> None:
    """Raise ConfigError for the first contradiction in a complete config."""
    _check_streaming(c)
    _check_documents(c, defaults)
    _check_validation(c, defaults)
    _check_teacher(c)
    _check_gpus(c)
    _check_method_keys(c, defaults)
    _check_student(c)
    _check_alpha(c)
    _check_training(c, defaults)
    _check_benchmarks(c)
    check_synthesis_keys(c, defaults)


def _check_streaming(c: Flat) -> None:
    if c["dataset.streaming"] and c["dataset.max_samples"] is None:
        raise ConfigError(
            "dataset.streaming is true and dataset.max_samples is null, so the stream and the "
            "teacher's work would never end. Set dataset.max_samples to the number of "
            "documents to use, for instance 100000."
        )
    if c["dataset.streaming"] and c["dataset.sharding"] == "contiguous":
        raise ConfigError(
            "dataset.sharding is contiguous and dataset.streaming is true, but a stream has no "
            "known size to divide. Use dataset.sharding: interleaved, or "
            "dataset.streaming: false."
        )
    _check_files(c)


def _check_files(c: Flat) -> None:
    """Refuse sharding by files for a dataset that is not a list of files."""
    name = c["dataset.name"]
    if c["dataset.sharding"] != "files" or name in (*LOADERS, SYNTHESIS):
        return
    if name == "demo":
        raise ConfigError(
            "dataset.sharding is files, but dataset.name is 'demo', which is not a list of files. Use "
            "dataset.sharding: interleaved."
        )
    if not c["dataset.streaming"]:
        raise ConfigError(
            f"dataset.sharding is files and dataset.name is {show(name)}, a Hub dataset that is downloaded "
            "(dataset.streaming is false) and has no files any more. Set dataset.streaming: true, or use "
            "dataset.sharding: interleaved."
        )


def _check_documents(c: Flat, defaults: Flat) -> None:
    name, files = c["dataset.name"], c["dataset.data_files"]
    if name in LOADERS and files is None:
        raise ConfigError(
            f"dataset.name is {show(name)}, a loader of local files, but dataset.data_files is "
            "null. Set dataset.data_files to a path or glob, for instance data/train.jsonl."
        )
    if name == "demo" and files is not None:
        raise ConfigError(
            f"dataset.data_files is {show(files)}, but dataset.name is 'demo', which reads no "
            "local files. Set dataset.name to the loader of your files: one of "
            f"{', '.join(LOADERS)}."
        )
    prompt, response = c["dataset.prompt_column"], c["dataset.response_column"]
    if (prompt is None) != (response is None):
        given, missing = ("prompt", "response") if response is None else ("response", "prompt")
        raise ConfigError(
            f"dataset.{given}_column is {show(prompt or response)}, but dataset.{missing}_column "
            f"is null; the two go together. Set dataset.{missing}_column too, or use "
            "dataset.text_column alone for plain text."
        )
    if prompt is not None and c["dataset.text_column"] != defaults["dataset.text_column"]:
        raise ConfigError(
            f"dataset.text_column is {show(c['dataset.text_column'])} and dataset.prompt_column is "
            f"{show(prompt)}: a document is either text, or prompt and response. Remove one of the "
            "two."
        )


def _check_validation(c: Flat, defaults: Flat) -> None:
    fraction, split = c["dataset.validation_fraction"], c["dataset.validation_split"]
    if split is None:
        if fraction == 0:
            raise ConfigError(
                "dataset.validation_fraction is 0 and dataset.validation_split is null, so "
                "no documents would be held out to evaluate students on. Set "
                "dataset.validation_fraction above 0, for instance 0.01, or name a "
                "dataset.validation_split."
            )
        return
    if split == c["dataset.split"]:
        raise ConfigError(
            f"dataset.validation_split is {show(split)}, the same as dataset.split: students would "
            "be evaluated on their training data. Name another split, or set "
            "dataset.validation_split: null to hold out dataset.validation_fraction of the "
            "documents."
        )
    if fraction not in (0, defaults["dataset.validation_fraction"]):
        raise ConfigError(
            f"dataset.validation_fraction is {show(fraction)} and dataset.validation_split is "
            f"{show(split)}, but only one of them can set what is held out. Remove "
            "dataset.validation_fraction to use the split, or dataset.validation_split to use the "
            "fraction."
        )


def _check_teacher(c: Flat) -> None:
    teacher, tokenizer = c["teacher.model_path"], c["dataset.tokenizer"]
    kind = c["training.distillation_type"]
    if teacher is None and kind != "output":
        raise ConfigError(
            f"training.distillation_type is {kind}, which needs a teacher, but "
            "teacher.model_path is null. Set teacher.model_path to a model, or use "
            "training.distillation_type: output."
        )
    if teacher is None and tokenizer is None:
        raise ConfigError(
            "teacher.model_path and dataset.tokenizer are both null, so there is no "
            "tokenizer. Set dataset.tokenizer to a Hub id or a folder with a tokenizer, for "
            "instance gpt2."
        )
    if teacher == "demo" and tokenizer is not None:
        raise ConfigError(
            f"dataset.tokenizer is {show(tokenizer)}, but teacher.model_path is 'demo', which "
            "is trained with its own tokenizer. Set dataset.tokenizer: null, or name "
            "another teacher."
        )


def _check_gpus(c: Flat) -> None:
    gpus, per_model = c["teacher.generation.gpus"], c["teacher.generation.gpus_per_model"]
    if gpus is None:
        return
    key = "teacher.generation.gpus"
    ids = [
        part.strip()
        for group in ([gpus] if isinstance(gpus, str) else gpus)
        for part in group.split(",")
    ]
    if bad := [i for i in ids if not _GPU_ID.fullmatch(i)]:
        raise ConfigError(
            f"{key} is {show(gpus)}, where {show(bad[0])} is not a GPU id. Write ids as nvidia-smi "
            'shows them, separated by commas, such as "0,1,2,3", or groups of them, such as ["0", "1", "2,3"].'
        )
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise ConfigError(
            f"{key} is {show(gpus)}, where GPU {', '.join(twice)} is listed more than once, but a GPU "
            "holds at most one copy of the teacher. List every GPU once."
        )
    if not isinstance(gpus, str) and per_model != 1:
        raise ConfigError(
            f"teacher.generation.gpus_per_model is {per_model}, but {key} is {show(gpus)}, a list "
            "of groups, whose sizes are already given. Remove "
            "teacher.generation.gpus_per_model, or "
            f'write the GPUs as one text to divide: "{",".join(ids)}".'
        )
    if per_model > len(ids):
        raise ConfigError(
            f"teacher.generation.gpus_per_model is {per_model}, but {key} lists {len(ids)}: "
            f"{','.join(ids)}. List at least {per_model} GPUs, or lower "
            "teacher.generation.gpus_per_model."
        )
    if c["teacher.device"] == "cpu":
        raise ConfigError(
            f"teacher.device is cpu, but {key} is {show(gpus)}. Remove {key} to run the teacher on "
            "the CPU, or set teacher.device: auto."
        )


def _check_method_keys(c: Flat, defaults: Flat) -> None:
    method = c["cache.method"]
    for owner, key in _METHOD_KEYS.items():
        if owner != method and c[key] != defaults[key]:
            raise ConfigError(
                f"{key} is {show(c[key])}, but cache.method is {method}, which uses "
                f"{_METHOD_KEYS[method]} instead. Remove {key}, or set cache.method: {owner}."
            )


def _check_student(c: Flat) -> None:
    config, weights = c["student.config"], c["student.model_path"]
    if config is None and weights is None:
        raise ConfigError(
            "student.config and student.model_path are both null, so there is no student. Set "
            "student.config to a transformers config as JSON (config/students/ holds some), or "
            "student.model_path to a model to start from."
        )
    if config is not None and weights is not None:
        raise ConfigError(
            f"student.config is {show(config)} and student.model_path is {show(weights)}, but a "
            "student starts either with random weights or with those of a model. Set one of the two "
            "to null."
        )


def _check_alpha(c: Flat) -> None:
    kind, alpha = c["training.distillation_type"], c["training.alpha"]
    if alpha is None or kind == "hybrid" or alpha == DEFAULT_ALPHA[kind]:
        return
    learns = "the corpus" if kind == "output" else "the teacher"
    raise ConfigError(
        f"training.alpha is {alpha}, but training.distillation_type is {kind}, which learns from "
        f"{learns} only: its alpha is {DEFAULT_ALPHA[kind]}. Set training.alpha: null, or "
        "training.distillation_type: hybrid to learn from both (alpha is the weight of the hard "
        "loss)."
    )


def _check_training(c: Flat, defaults: Flat) -> None:
    _check_several_gpus(c)
    temperature, stored = c["training.temperature"], list(c["cache.temperatures"])
    if 1.0 not in stored:
        raise ConfigError(
            f"cache.temperatures is {stored}, but 1.0 must be among them: the kept tokens are stored at 1.0, and the "
            f"cache is measured there. Set cache.temperatures: {sorted([1.0, *stored])}."
        )
    uses_cache = c["training.use_cached_logits"] and c["training.distillation_type"] != "output"
    if c["cache.method"] == "sampled" and stored not in (
        [1.0],
        list(defaults["cache.temperatures"]),
    ):
        raise ConfigError(
            f"cache.temperatures is {stored}, but cache.method is 'sampled', whose samples are for temperature 1 only. "
            "Leave cache.temperatures out, or use cache.method: top_p."
        )
    if uses_cache and c["cache.method"] == "sampled" and temperature != 1.0:
        raise ConfigError(
            f"training.temperature is {temperature} (the default is {defaults['training.temperature']}), but "
            "cache.method is 'sampled': its samples are unbiased at temperature 1 only. Use training.temperature: 1.0, "
            "or cache.method: top_p."
        )
    if uses_cache and c["cache.method"] == "sampled" and c["training.divergence"] != "forward_kl":
        raise ConfigError(
            f"training.divergence is {c['training.divergence']!r}, but cache.method is 'sampled': its samples are "
            "unbiased for forward_kl only, which is linear in the teacher's probabilities. Use training.divergence: "
            "forward_kl, or cache.method: top_p."
        )
    if uses_cache and c["cache.top_k"] != "full" and temperature not in stored:
        raise ConfigError(
            f"training.temperature is {temperature}, but the cache stores the mass outside its "
            f"kept tokens at cache.temperatures {stored} only. Add it, cache.temperatures: "
            f"{sorted([*stored, temperature])} (a new cache is made), or use one of {stored}."
        )


def require_even_share(batch_size: int, accumulation: int, gpus: int) -> None:
    """Raise ConfigError when a step's sequences, batch_size * accumulation, are not a multiple of `gpus`."""
    if (batch_size * accumulation) % gpus:
        raise ConfigError(
            f"training.gpus x training.nodes is {gpus}, but training.batch_size {batch_size} x "
            f"training.gradient_accumulation_steps {accumulation} is {batch_size * accumulation} sequences a step, "
            f"which {gpus} GPUs cannot share evenly. Make it a multiple of {gpus}, or use a number of GPUs that "
            "divides it: each trains the same student."
        )


def _check_several_gpus(c: Flat) -> None:
    size, accumulation = c["training.batch_size"], c["training.gradient_accumulation_steps"]
    require_even_share(size, accumulation, c["training.gpus"] * c["training.nodes"])
    if c["training.strategy"] == "fsdp" and c["training.device"] == "cpu":
        raise ConfigError(
            "training.strategy is 'fsdp' and training.device is 'cpu', but fsdp shards a student over GPUs. Use "
            "training.strategy: ddp, or another device."
        )


def _check_benchmarks(c: Flat) -> None:
    names = list(c["evaluation.benchmarks"])
    if c["evaluation.benchmark_teacher"] and c["teacher.model_path"] is None:
        raise ConfigError(
            "evaluation.benchmark_teacher is true, but teacher.model_path is null: there is no teacher to run them on. "
            "Set teacher.model_path, or evaluation.benchmark_teacher: false."
        )
    if "humaneval" not in names:
        return
    if not c["evaluation.allow_code_execution"]:
        raise ConfigError(
            f"evaluation.benchmarks is {names}, and humaneval runs the code that a student writes, but "
            "evaluation.allow_code_execution is false. Set evaluation.allow_code_execution: true to allow it, inside "
            "bubblewrap (docs/guide.md), or remove humaneval."
        )
    if c["evaluation.humaneval_file"] is None:
        raise ConfigError(
            f"evaluation.benchmarks is {names}, but evaluation.humaneval_file is null: it should be the path of its "
            "problems. Download data/HumanEval.jsonl.gz from https://github.com/openai/human-eval and set its path."
        )
    completions, ks = c["evaluation.humaneval_completions"], list(c["evaluation.humaneval_pass_at"])
    if max(ks) > completions:
        raise ConfigError(
            f"evaluation.humaneval_pass_at is {ks}, but evaluation.humaneval_completions is {completions}: pass@k "
            f"needs at least k completions. Set evaluation.humaneval_completions to {max(ks)} or more (twice as many "
            "estimate it better), or use a smaller k."
        )
    if completions > 1 and c["evaluation.humaneval_temperature"] == 0:
        raise ConfigError(
            f"evaluation.humaneval_completions is {completions}, but evaluation.humaneval_temperature is 0, which "
            "writes the same completion every time. Set evaluation.humaneval_temperature, for instance 0.2 for pass@1 "
            "and 0.8 for pass@100, or evaluation.humaneval_completions: 1."
        )
