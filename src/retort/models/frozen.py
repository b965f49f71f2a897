"""Weights of a student that keep their values during the training."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


def freeze_weights(model: nn.Module, patterns: Sequence[str], *, name: str) -> None:
    """Freeze the parameters in whose names one of the regular expressions is found; tied ones have several names.

    Raises ValueError, with the model's `name`, when one is found in none, or together they are found in all.
    """
    names = [found for found, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not any(re.search(pattern, found) for found in names):
            raise ValueError(
                f"training.freeze has {pattern!r}, which is found in no parameter of {name}. Its parameters are "
                f"{', '.join(names[:4])}, ..., {names[-1]}."
            )
    for found, weight in model.named_parameters(remove_duplicate=False):
        if any(re.search(pattern, found) for pattern in patterns):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"training.freeze has {', '.join(map(repr, patterns))}, which together freeze every parameter of {name}: "
            "nothing would be trained. Leave some out."
        )


def check_freeze(config: PretrainedConfig, patterns: Sequence[str], *, name: str) -> None:
    """Raise ValueError as `freeze_weights` does, for a model of this config, without loading its weights."""
    if patterns:
        with torch.device("meta"):
            freeze_weights(AutoModelForCausalLM.from_config(config), patterns, name=name)


def count_trained(model: nn.Module) -> int:
    """Return the number of a model's parameters that are trained, tied ones counted once."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
