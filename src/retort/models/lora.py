"""LoRA (Hu et al., arXiv 2106.09685, 2021) by peft: small matrices A and B beside a frozen weight W, which acts as
W + alpha / rank * B A. B is 0 at first, so the student begins as it was.

peft is an extra, and imported by trainings with LoRA alone.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retort.config.lora import Lora
from retort.models.frozen import count_trained

_LINEAR = (nn.Linear, Conv1D)  # of GPT-2
_ADAPTED = (*_LINEAR, nn.Embedding)  # which are refused below


def add_adapters(model: PreTrainedModel, lora: Lora, *, seed: int, name: str) -> Any:
    """Freeze a model's weights, put adapters into it, and return peft's wrapper around it.

    Raises ValueError, with the model's `name`, when a target is no module of it, is its embedding or output layer,
    whose adapters would not be part of the loss, or is of a kind that peft has no adapter for.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    assert lora.rank is not None
    targets = lora.target_modules
    _check_targets(model, targets, name=name)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"training.lora.target_modules is {targets!r}, of which peft makes no adapters in {name}: {error}"
        ) from error


def _check_targets(model: PreTrainedModel, targets: str | tuple[str, ...], *, name: str) -> None:
    if isinstance(targets, str):
        return
    known = [key for key, _ in model.named_modules() if key]
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for target in targets:
        found = [key for key in known if key == target or key.endswith(f".{target}")]
        if not all(isinstance(model.get_submodule(key), _ADAPTED) for key in found or [""]):
            linear = {
                key.rpartition(".")[2]
                for key, module in model.named_modules()
                if isinstance(module, _LINEAR) and id(module) not in ends
            }
            what = f"a {type(model.get_submodule(found[0])).__name__}" if found else "no module"
            raise ValueError(
                f"training.lora.target_modules has {target!r}, which is {what} of {name}, not a linear layer. Use "
                f"all-linear, or names such as {', '.join(sorted(linear)) or known[-1]}."
            )
        if any(id(model.get_submodule(key)) in ends for key in found):
            raise ValueError(
                f"training.lora.target_modules has {target!r}, the embedding or output layer of {name}, which get no "
                "adapters here. Name layers between them, or all-linear."
            )


def count_adapters(config: PretrainedConfig, lora: Lora, *, name: str) -> int:
    """Return the number of the adapters' weights in a model of this config, without loading it.

    Raises ValueError as `add_adapters` does.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return count_trained(add_adapters(model, lora, seed=0, name=name))


def count_merged(model: nn.Module) -> int:
    """Return the number of a model's parameters without adapters, tied ones counted once."""
    return sum(w.numel() for name, w in model.named_parameters() if ".lora_" not in name)
