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
from retort.pruning.shapes import Plan, Widths
from retort.pruning.width import Importance, choose_kept, keep_all, require_same_axes, take_part


def require_prunable(config: PretrainedConfig, plan: Plan, *, name: str) -> None:
    """Raise ValueError when a model of a config (`name` in messages) cannot be pruned as planned.

    Builds the models without weights: seconds for large ones, and no memory.
    """
    with torch.device("meta"):
        whole, of_layers, small = (
            AutoModelForCausalLM.from_config(copy.deepcopy(c))
            for c in (config, plan.of_layers, plan.config)
        )
    _require_like(whole, of_layers, plan.layers, name=name)
    if plan.is_narrower:
        require_same_axes(of_layers, small, name=name)


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


def keep_layers(whole: PreTrainedModel, plan: Plan, *, name: str) -> PreTrainedModel:
    """Return a model with the planned layers of the whole one and all else of it, on the CPU, in its dtype.

    It computes what the whole model does when the other layers return what they are given, and is tested on a few
    tokens. Raises ValueError when it does not, as a model whose layers use each other's results.
    """
    kept = plan.layers
    small = _build(plan.of_layers, whole)
    _require_like(whole, small, kept, name=name)
    prefix, layers = find_layers(whole)
    weights = whole.state_dict()
    small.load_state_dict(
        {own: weights[rename(own, prefix, kept)] for own in small.state_dict()}, strict=True
    )
    removed = [layer for number, layer in enumerate(layers) if number not in kept]
    if not _computes_the_rest(whole, small, removed):
        raise ValueError(
            f"{name} ({type(whole).__name__}) cannot be pruned: without its other layers it does not compute what "
            "is left of it, because its layers depend on their number or on each other. Start from student.config or "
            "student.model_path instead."
        )
    return small


def narrow(model: PreTrainedModel, plan: Plan, importance: Importance | None) -> PreTrainedModel:
    """Return a model of the planned sizes with the most important channels, neurons and heads of one with its layers.

    importance: None where nothing is measured, as only ids are cut.
    """
    whole, pruned = Widths.read(model.config), Widths.read(plan.config)
    assert whole is not None and pruned is not None
    if importance is None:
        kept = keep_all(whole, num_layers=len(plan.layers), num_ids=pruned.ids)
    else:
        kept = choose_kept(importance, pruned)
    small = _build(plan.config, model)
    small.load_state_dict(take_part(model, kept), strict=True)
    return small


def _build(config: PretrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    """Return a model of a config, in the dtype and with the generation config of another; its weights are to be set."""
    small: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=like.dtype
    )
    keep_softcap(small)
    small.generation_config = copy.deepcopy(like.generation_config)
    return small.eval()


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
