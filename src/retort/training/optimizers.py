"""Optimizer and learning rate schedule of a training, as transformers' Trainer takes them; and Muon, which it has not.

Weight decay is Trainer's: of all parameters but biases and those of norms.
"""

import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, TrainingArguments

from retort.config.optimizer import MUON, WSD, choose_decay_steps, find_too_many_steps
from retort.config.sections import Training


def optimizer_arguments(training: Training) -> dict[str, Any]:
    """Return the TrainingArguments of optimizer and schedule; `set_steps` adds what depends on the number of steps."""
    keys = ["learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps"]
    keys += ["adam_beta1", "adam_beta2", "adam_epsilon"]
    # Trainer knows no Muon: DistillationTrainer makes it, of AdamW's settings.
    optim = "adamw_torch_fused" if training.optim == MUON else training.optim
    return {key: getattr(training, key) for key in keys} | {
        "optim": optim,
        "lr_scheduler_kwargs": training.lr_scheduler_kwargs.given or None,
    }


def set_steps(arguments: TrainingArguments, training: Training, *, max_steps: int) -> None:
    """Set the number of steps, and in which of them warmup_stable_decay lets the rate fall.

    Raises ValueError when its warm-up and decay take more than all steps.
    """
    for message in find_too_many_steps(training, max_steps=max_steps):
        raise ValueError(message)
    arguments.max_steps = max_steps
    if training.lr_scheduler_type == WSD:
        given = training.lr_scheduler_kwargs.given
        steps = choose_decay_steps(
            training.lr_scheduler_kwargs.num_decay_steps, max_steps=max_steps
        )
        arguments.lr_scheduler_kwargs = given | {"num_decay_steps": steps}


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for others, whose groups and state are saved and restored as one optimizer's.

    Each works on its groups and its part of the state in place. With LoRA, or where weights are frozen, one may have no
    parameters, and is left out.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights."""
        assert closure is None
        for part in self.parts:
            part.step()


def build_muon(
    model: PreTrainedModel, arguments: TrainingArguments, *, decayed: Collection[str]
) -> MuonWithAdamW:
    """Return Muon for the matrices of a model's layers, and AdamW for its other parameters that are trained.

    `decayed`: names of those with weight decay. Muon's steps are scaled to the size of AdamW's, so that both have one
    learning rate (Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982, 2025, section 2.2).
    """
    outside = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    outside += [m for m in (model.get_output_embeddings(),) if m is not None]
    at_ends = {id(weight) for module in outside for weight in module.parameters()}
    groups: dict[bool, list[dict[str, Any]]] = {}
    for is_hidden, decays in itertools.product((True, False), repeat=2):
        weights = [
            weight
            for name, weight in model.named_parameters()
            if weight.requires_grad
            and is_hidden == (weight.ndim == 2 and id(weight) not in at_ends)
            and decays == (name in decayed)
        ]
        if weights:
            decay = arguments.weight_decay if decays else 0.0
            groups.setdefault(is_hidden, []).append({"params": weights, "weight_decay": decay})
    rate = float(arguments.learning_rate)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    parts: list[Any] = []
    if True in groups:
        parts.append(Muon(groups[True], lr=rate, adjust_lr_fn="match_rms_adamw"))
    if False in groups:
        eps = arguments.adam_epsilon
        parts.append(AdamW(groups[False], lr=rate, betas=betas, eps=eps, fused=True))
    return MuonWithAdamW(*parts)
