"""A student before training: from a config, with weights initialized by the seed, or from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from retort.config.sections import Student
from retort.models.load import load_model_config, load_pretrained, require_causal
from retort.tokens.vocabularies import min_output_width


def student_config(section: Student, *, vocabulary: int, tokenizer: Any) -> PretrainedConfig:
    """Return the student's transformers config, in which `vocabulary` and special ids fill in what is absent.

    Raises ValueError when transformers refuses the config, or when it has fewer ids than the tokenizer. It may have
    fewer than the teacher: the teacher's ids beyond the tokenizer's are padding, of probability zero.
    """
    if section.model_path is not None:
        config = load_model_config(section.model_path)
    else:
        path = Path(str(section.config))
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        model_type = content.pop("model_type")
        content.setdefault("vocab_size", vocabulary)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            content.setdefault(name, getattr(tokenizer, name))
        try:
            config = AutoConfig.for_model(model_type, **content)
        except Exception as error:
            raise ValueError(
                f"student.config {str(path)!r} is not a valid transformers {model_type!r} config: {error}"
            ) from error
    size = int(config.get_text_config().vocab_size)
    if size < (needed := min_output_width(tokenizer)):
        advice = (
            "Use a student of the same tokenizer."
            if section.model_path is not None
            else f"Set vocab_size: {needed} or more, or leave it out of the JSON to have it filled in."
        )
        raise ValueError(
            f"the student's vocab_size is {size} ({section.config or section.model_path}), smaller than the {needed} "
            f"ids of the tokenizer, all of which it must predict. {advice}"
        )
    return config


def name_student(section: Student) -> str:
    """Return the student's name in messages."""
    return f"the student ({section.config or section.model_path})"


def build_student(
    section: Student, *, vocabulary: int, tokenizer: Any, seed: int
) -> PreTrainedModel:
    """Return the student in float32: from a config with weights initialized by `seed`, or from a checkpoint.

    Raises ValueError as `student_config` does, and when the model cannot be built or is not causal.
    """
    config = student_config(section, vocabulary=vocabulary, tokenizer=tokenizer)
    torch.manual_seed(seed)
    name = name_student(section)
    try:
        model: PreTrainedModel = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if section.model_path is None
            else load_pretrained(section.model_path, dtype=torch.float32)
        )
        require_causal(model, name=name)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{name} cannot be built: {type(error).__name__}: {error}. Its sizes do not fit together, or a key is "
            "missing or misspelt: compare it with config/students/."
        ) from error
    return model
