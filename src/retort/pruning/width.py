"""Fewer hidden channels, neurons, heads and ids: which weights have which axes, and the part of each that is kept.

For decoders whose layers have the seven matrices of Llama's, by the names that transformers gives them, and norms
besides (Llama, Qwen 2 and 3, Mistral, Gemma, SmolLM, ...); others are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retort.pruning.layers import find_layers
from retort.pruning.shapes import Widths

_QUERIES, _KEYS, _HIDDEN, _NEURONS, _IDS = "queries", "keys", "hidden", "neurons", "ids"
# The axes of the weights of a layer, rows first; a bias has the first.
_AXES = {
    "q_proj": (_QUERIES, _HIDDEN),
    "k_proj": (_KEYS, _HIDDEN),
    "v_proj": (_KEYS, _HIDDEN),
    "o_proj": (_HIDDEN, _QUERIES),
    "gate_proj": (_NEURONS, _HIDDEN),
    "up_proj": (_NEURONS, _HIDDEN),
    "down_proj": (_HIDDEN, _NEURONS),
}
NORMS = {"q_norm": _QUERIES, "k_norm": _KEYS}  # of a head, or of all heads together


@dataclass(frozen=True)
class Importance:
    """How active a model is (`importance`): its hidden channels float64 [D], and of each kept layer its neurons [N] and
    groups of heads [G]."""

    hidden: Tensor
    neurons: Sequence[Tensor]
    groups: Sequence[Tensor]


@dataclass(frozen=True)
class Kept:
    """What is kept, as ascending indices int64: hidden channels [D'], and of each kept layer neurons and groups.

    ids: the number of ids, the first.
    """

    hidden: Tensor
    neurons: Sequence[Tensor]
    groups: Sequence[Tensor]
    ids: int


def choose_kept(importance: Importance, pruned: Widths) -> Kept:
    """Return the most important channels, neurons and groups, as many as the pruned model has; of equals the first."""
    return Kept(
        hidden=_choose(importance.hidden, pruned.hidden),
        neurons=[_choose(scores, pruned.neurons) for scores in importance.neurons],
        groups=[_choose(scores, pruned.groups) for scores in importance.groups],
        ids=pruned.ids,
    )


def _choose(scores_X: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` greatest scores, in ascending order."""
    order = scores_X.argsort(descending=True, stable=True)
    return order[:count].sort().values


def keep_all(widths: Widths, *, num_layers: int, num_ids: int) -> Kept:
    """Return all channels, neurons and groups, and the first `num_ids` ids."""
    sizes = (widths.hidden, widths.neurons, widths.groups)
    hidden, neurons, groups = (torch.arange(size) for size in sizes)
    return Kept(hidden, [neurons] * num_layers, [groups] * num_layers, num_ids)


def require_same_axes(whole: PreTrainedModel, small: PreTrainedModel, *, name: str) -> None:
    """Raise ValueError unless every weight of a model, `name` in messages, can be pruned to that of a smaller one.

    Both have the same layers; their weights may be on the device meta.
    """
    _, layers = find_layers(whole)
    held = {path.rpartition(".")[2] for path, _ in layers[0].named_modules()}
    faults = [f"no {matrix}" for matrix in _AXES if matrix not in held]
    mine, theirs = _find_axes(whole), _find_axes(small)
    faults += [f"a weight {own}" for own, axes in mine.items() if axes is None]
    faults += [
        f"a weight {own} that keeps its size" for own in mine if mine[own] != theirs.get(own)
    ]
    if faults:
        raise ValueError(
            f"{name} ({type(whole).__name__}) has {faults[0]}, so only its layers can be pruned: hidden_size, "
            "intermediate_size, num_attention_heads and vocab_size of student.from_teacher are for decoders like Llama "
            "(Qwen, Mistral, Gemma, SmolLM). Leave these keys out."
        )


def take_part(model: PreTrainedModel, kept: Kept) -> dict[str, Tensor]:
    """Return the kept part of each weight of a model, by the same names.

    The layers of `model` are all kept: layer j with the neurons kept.neurons[j].
    """
    (prefix, _), widths, axes = find_layers(model), Widths.read(model.config), _find_axes(model)
    assert widths is not None
    part = {}
    for name, weight in model.state_dict().items():
        for dim, axis in enumerate(axes[name] or ()):
            weight = weight.index_select(dim, _index(axis, name, prefix, kept, widths))
        part[name] = weight.contiguous()
    return part


def _find_axes(model: PreTrainedModel) -> dict[str, tuple[str, ...] | None]:
    """Return the axes of each weight of a model: () of one that has none that is pruned, None where it is not known."""
    (prefix, _), widths = find_layers(model), Widths.read(model.config)
    assert widths is not None
    sizes = {
        _QUERIES: widths.heads * widths.head_size,
        _KEYS: widths.groups * widths.head_size,
        _HIDDEN: widths.hidden,
        _NEURONS: widths.neurons,
        _IDS: widths.ids,
    }
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found: dict[str, tuple[str, ...] | None] = {}
    for name, weight in model.state_dict().items():
        path, shape = name.rpartition(".")[0], tuple(weight.shape)
        matrix = path.rpartition(".")[2]
        expected: tuple[str, ...] = (_HIDDEN,)
        if any(model.get_submodule(path) is end for end in ends):
            expected = (_IDS, _HIDDEN)
        elif name.startswith(f"{prefix}.") and matrix in _AXES:
            expected = _AXES[matrix]
        elif matrix in NORMS:
            expected = () if shape == (widths.head_size,) else (NORMS[matrix],)
        expected = expected[: len(shape)]
        fits = not expected or tuple(sizes[axis] for axis in expected) == shape
        found[name] = expected if fits else None
    return found


def _index(axis: str, name: str, prefix: str, kept: Kept, widths: Widths) -> Tensor:
    """Return the indices that are kept of an axis of a weight."""
    if axis == _HIDDEN:
        return kept.hidden
    if axis == _IDS:
        return torch.arange(kept.ids)
    layer = int(name.removeprefix(f"{prefix}.").partition(".")[0])
    if axis == _NEURONS:
        return kept.neurons[layer]
    size = widths.head_size * (widths.group_size if axis == _QUERIES else 1)
    return (kept.groups[layer][:, None] * size + torch.arange(size)).flatten()
