"""The weights of a pruned model, taken from the whole one, and a proof that it computes what is left of that."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from retort.models.attention import keep_softcap
from retort.models.causal_lm import SPLIT_TOLERANCE, choose_tolerance, evaluating, relative_error
from retort.pruning.layers import find_layers, find_unlike, rename


def require_prunable(
    config: PretrainedConfig, pruned: PretrainedConfig, kept: Sequence[int], *, name: str
) -> None:
    """Raise ValueError when a model (`name` in messages) cannot be pruned to a config of the layers `kept`.

    Builds both without weights: seconds for large models, and no memory.
    """
    with torch.device("meta"):
        whole, small = (
            AutoModelForCausalLM.from_config(copy.deepcopy(c)) for c in (config, pruned)
        )
    _require_like(whole, small, kept, name=name)


def _require_like(
    whole: PreTrainedModel, small: PreTrainedModel, kept: Sequence[int], *, name: str
) -> None:
    (prefix, layers), (_, few) = find_layers(whole), find_layers(small)
    if unlike := next(find_unlike(layers, few, kept), None):
        raise ValueError(
            f"{name} ({type(whole).__name__}) cannot keep its layers {', '.join(map(str, kept))}: {unlike}, because "
            "its layers are made by their number. Choose other layers, in student.from_teacher.layer_indices, or start "
            "from student.config or student.model_path."
        )
    weights = whole.state_dict()
    for own, weight in small.state_dict().items():
        source = weights.get(rename(own, prefix, kept))
        if source is None or source.shape != weight.shape:
            raise ValueError(
                f"{name} ({type(whole).__name__}) cannot be pruned: its weight {own} would depend on the number of "
                "layers. Start from student.config or student.model_path instead."
            )


def keep_layers(
    whole: PreTrainedModel, config: PretrainedConfig, kept: Sequence[int], *, name: str
) -> PreTrainedModel:
    """Return a model of `config` with the layers `kept` of the whole one and all else of it, on the CPU, in its dtype.

    It computes what the whole model does when the other layers return what they are given, and is tested on a few
    tokens. Raises ValueError when it does not, as a model whose layers use each other's results.
    """
    small: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    keep_softcap(small)
    _require_like(whole, small, kept, name=name)
    prefix, layers = find_layers(whole)
    weights = whole.state_dict()
    small.load_state_dict(
        {own: weights[rename(own, prefix, kept)] for own in small.state_dict()}, strict=True
    )
    small.generation_config = copy.deepcopy(whole.generation_config)
    removed = [layer for number, layer in enumerate(layers) if number not in kept]
    if not _computes_the_rest(whole, small.eval(), removed):
        raise ValueError(
            f"{name} ({type(whole).__name__}) cannot be pruned: without its other layers it does not compute what "
            "is left of it, because its layers depend on their number or on each other. Start from student.config or "
            "student.model_path instead."
        )
    return small


@torch.inference_mode()
def _computes_the_rest(
    whole: PreTrainedModel, small: PreTrainedModel, removed: Sequence[nn.Module]
) -> bool:
    device = whole.get_input_embeddings().weight.device
    size = int(whole.config.get_text_config().vocab_size)
    ids = torch.arange(1, 9)[None] % size
    with evaluating(whole), skipping(removed):
        expected = whole(input_ids=ids.to(device), use_cache=False).logits.float().cpu()
    found = small(input_ids=ids, use_cache=False).logits.float()
    error = relative_error(found, expected)
    return bool(error <= choose_tolerance(whole, SPLIT_TOLERANCE))


@contextmanager
def skipping(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers return the hidden states that they are given."""

    def skip(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        given: Tensor = args[0] if args else options["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [layer.register_forward_hook(skip, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
