"""The losses of Retort's training, for other training code: from hidden states, or from logits.

Legend: B sequences, T tokens of the longest, P counted positions, D hidden size, V the student's vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retort.api.collator import Targets
from retort.config.training import Training
from retort.losses.fused_loss import compute_fused_loss, compute_loss_of_logits
from retort.losses.terms import LossSettings, LossTerms
from retort.models.causal_lm import split_model, take_rows


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def distillation_loss(
    hidden: Tensor,
    head: PreTrainedModel | nn.Module | Tensor,
    targets: Targets,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    position_weights: str | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> LossTerms:
    """Return the losses of a batch from its last hidden states, without the logits of all positions at once.

    hidden [B, T, D]: what the head is applied to (of transformers' models: `base_model(...).last_hidden_state`), or
    [P, D] at the counted positions alone. head: the causal LM itself, which says how its logits are scaled and capped;
    or a layer, or its weight [V, D], of which plain logits are made. alpha is the weight of the hard loss, 1 - alpha
    that of the soft one; temperature, divergence and position_weights: as the keys of `training` with these names.
    num_items_in_batch: what the sums are divided by, where a step has several batches; else the P of this one.

    The terms are scalars in nats a position: `total`, which has the gradient, and `hard` and `soft`.
    Raises ValueError for settings that are out of range or that the cache does not serve, and for hidden states, a head
    or a batch that do not belong together.
    """
    settings = _choose_settings(alpha, temperature, divergence, position_weights)
    found = _find_head(head)
    _require_width(targets, len(found.weight))
    terms: LossTerms = compute_fused_loss(
        _take_counted(hidden, targets, "hidden"),
        found.weight,
        targets.labels,
        targets.choose_rows(settings),
        replace(settings, scale=found.scale, softcap=found.softcap),
        bias_V=found.bias,
        normalizer=_normalizer(targets, num_items_in_batch),
    )
    return terms


def distillation_loss_of_logits(
    logits: Tensor,
    targets: Targets,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    position_weights: str | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> LossTerms:
    """Return the same from logits [B, T, V], or [P, V] at the counted positions alone."""
    settings = _choose_settings(alpha, temperature, divergence, position_weights)
    _require_width(targets, logits.shape[-1])
    return compute_loss_of_logits(
        _take_counted(logits, targets, "logits"),
        targets.labels,
        targets.choose_rows(settings),
        settings,
        normalizer=_normalizer(targets, num_items_in_batch),
    )


def _choose_settings(
    alpha: float, temperature: float, divergence: str, position_weights: str | None
) -> LossSettings:
    """Return the settings. Raises ValueError for values that the config refuses too."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}: give the hard loss a weight from 0 to 1.")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}: give more than 0.")
    kinds = {"divergence": divergence, "position_weights": position_weights}
    for name, kind in kinds.items():
        known = _list_kinds(name)
        if kind not in known:
            raise ValueError(f"{name} is {kind!r}: give one of {', '.join(map(str, known))}.")
    return LossSettings(alpha, temperature, divergence, position_weights=position_weights)


def _list_kinds(name: str) -> list[str | None]:
    """Return the values that a key of `training` takes."""
    found: list[str | None] = []
    for kind in get_args(Training.model_fields[name].annotation):
        found += get_args(kind) or [None if kind is type(None) else kind]
    return found


def _take_counted(values: Tensor, targets: Targets, name: str) -> Tensor:
    """Return the values [P, X] of the counted positions. Raises ValueError for values of another batch."""
    if values.dim() == 2 and len(values) == len(targets):
        return values
    if values.dim() != 3 or tuple(values.shape[:2]) != targets.shape:
        raise ValueError(
            f"{name} is of shape {list(values.shape)}, but the batch has {list(targets.shape)} tokens, of whose "
            f"predictions {len(targets)} count: give {name} of this batch, in one of these two shapes."
        )
    return take_rows(values, targets.counted)


def _require_width(targets: Targets, width: int) -> None:
    """Raise ValueError when the teacher may have probability for ids that the student's output layer has not."""
    if width < targets.vocabulary:
        raise ValueError(
            f"the student's output layer has {width} ids, but the teacher's of {targets.path} {targets.vocabulary}: "
            f"give Collator(cache, vocabulary={width}), if both have one tokenizer, else use a student with the "
            "teacher's."
        )


def _normalizer(targets: Targets, given: Tensor | int | None) -> Tensor | int:
    return max(1, len(targets)) if given is None else given


_scales: WeakKeyDictionary[Any, tuple[float, float | None]] = WeakKeyDictionary()


def _find_head(head: PreTrainedModel | nn.Module | Tensor) -> _Head:
    """Return a head's own weight, and how logits are made with it; of a model, found by a probe, once.

    Raises ValueError for what has no such weight.
    """
    if isinstance(head, Tensor):
        return _Head(head)
    scale: tuple[float, float | None] = (1.0, None)
    get_layer = getattr(head, "get_output_embeddings", None)
    layer = get_layer() if callable(get_layer) else head
    if layer is not head:
        if head not in _scales:
            with torch.no_grad():
                split = split_model(head)
            if not split.is_split:
                raise ValueError(
                    f"{type(head).__name__} has a head of an unknown form: use "
                    "retort.distillation_loss_of_logits(model(...).logits, targets)."
                )
            _scales[head] = split.head.scale, split.head.softcap
        scale = _scales[head]
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"head is a {type(head).__name__}, which has no weight of two dimensions: give the causal LM, its output "
            "layer, or the layer's weight."
        )
    return _Head(weight, getattr(layer, "bias", None), *scale)
