"""A student before training: from a config, with weights initialized by the seed, or from a checkpoint."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from retort.config.sections import Student
from retort.models.attention import keep_softcap
from retort.models.causal_lm import require_causal
from retort.models.load import load_model_config, load_pretrained, output_width
from retort.models.quantized import find_quantization
from retort.tokens.vocabularies import min_output_width

logger = logging.getLogger(__name__)

_WIDE = 1.05  # layers are rounded up to multiples of 64 to 1,024, seldom by more than a twentieth


def student_config(
    section: Student, *, vocabulary: int, tokenizer: Any, pruned: PretrainedConfig | None = None
) -> PretrainedConfig:
    """Return the student's transformers config, in which `vocabulary` and special ids fill in what is absent.

    `pruned`: the config of a part of another model, which is not pruned yet (`pruning.shapes`). Raises ValueError when
    transformers refuses the config, when it asks for what is not trained, or when it has fewer
    ids than the tokenizer and does not grow. It may have fewer than the teacher: the teacher's ids beyond the
    tokenizer's are padding, of probability zero.
    """
    if pruned is not None:
        config = pruned
    elif section.model_path is not None:
        config = load_model_config(section.model_path, revision=section.revision)
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
    _refuse_untrained(config, section)
    size = output_width(config)
    if size < (needed := min_output_width(tokenizer)):
        if section.grow_embedding:
            config.get_text_config().vocab_size = needed
            return config
        advice = (
            f"Set student.from_teacher.vocab_size: {needed} or more, or leave it out."
            if section.from_teacher.vocab_size is not None
            else "Use a student of the same tokenizer, or set student.grow_embedding: true to add rows to its "
            "embedding."
            if section.config is None
            else f"Set vocab_size: {needed} or more, or leave it out of the JSON to have it filled in."
        )
        raise ValueError(
            f"the student's vocab_size is {size} ({section.start}), smaller than the {needed} "
            f"ids of the tokenizer, all of which it must predict. {advice}"
        )
    return config


def _refuse_untrained(config: PretrainedConfig, section: Student) -> None:
    """Raise ValueError for a student with quantized weights, or with a loss of its own, which Retort leaves out."""
    name, text = name_student(section), config.get_text_config()
    if find_quantization(config):
        advice = (
            "remove the key from the JSON, which was copied from a quantized model"
            if section.config is not None
            else "use the model with unquantized weights"
        )
        raise ValueError(
            f"{name} has a quantization_config, but students are trained in full precision, and the result could not "
            f"be loaded: {advice}."
        )
    weight = getattr(text, "router_aux_loss_coef", getattr(text, "aux_loss_coef", 1.0))
    if getattr(text, "output_router_logits", False) and weight:
        raise ValueError(
            f"{name} has output_router_logits: true, the loss that balances its experts (weight {weight:g}), which is "
            "not part of the distillation loss and would be left out. Set output_router_logits: false in its config to "
            "train without it."
        )


def describe_ids(section: Student, config: PretrainedConfig, *, vocabulary: int) -> str | None:
    """Return a note about a student whose layers grow, or are far wider than any token needs; None otherwise.

    `vocabulary`: the width of the teacher's output layer, or the number of tokens, if that is more.
    """
    width, name = output_width(config), name_student(section)
    if section.model_path is not None:
        own = output_width(load_model_config(section.model_path, revision=section.revision))
        if own < width:
            return f"{name} grows from {own:,} ids to the {width:,} of the tokenizer"
    if width > _WIDE * vocabulary:
        return (
            f"{name} has {width:,} ids, {width - vocabulary:,} more than there are tokens: their rows in its embedding "
            "and output layer are weights without a use"
        )
    return None


def name_student(section: Student) -> str:
    """Return the student's name in messages."""
    return f"the student ({section.start})"


def build_empty(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model without values in its weights, which take no memory until they are written."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    keep_softcap(model)
    return model


def build_student(
    section: Student, *, vocabulary: int, tokenizer: Any, seed: int, is_empty: bool = False
) -> PreTrainedModel:
    """Return the student in float32: from a config with weights initialized by `seed`, or from a checkpoint.

    is_empty: without values in its weights, which then take no memory until they are written.

    Raises ValueError as `student_config` does, and when the model cannot be built or is not causal.
    """
    config = student_config(section, vocabulary=vocabulary, tokenizer=tokenizer)
    torch.manual_seed(seed)
    name = name_student(section)
    try:
        if is_empty:
            return build_empty(config)
        model: PreTrainedModel = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if section.model_path is None
            else load_pretrained(section.model_path, revision=section.revision, dtype=torch.float32)
        )
        keep_softcap(model)
        width = output_width(config)
        if output_width(model.config) < width:
            logger.info(f"{name} grows from {output_width(model.config):,} ids to {width:,}")
            model.resize_token_embeddings(width)
        require_causal(model, name=name)
    except (RuntimeError, KeyError, AttributeError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{name} cannot be built: {type(error).__name__}: {error}. Its sizes do not fit together, or a key is "
            "missing or misspelt: compare it with config/students/."
        ) from error
    return model
