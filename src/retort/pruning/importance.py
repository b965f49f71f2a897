"""How active each hidden channel, neuron and group of heads of a model is on some text: the least active go first.

The measures are those of Minitron (Muralidharan et al., 2024, arXiv:2407.14679, section 2.2): of a channel what the
norms put out, of a neuron what enters the last matrix of the MLP, of a head the length of its output. Over the
positions of a sequence they are added as squares (L2), and the roots are averaged over the sequences.

Legend: T positions, D hidden channels, N neurons, H heads in G groups, L layers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retort.models.causal_lm import evaluating
from retort.pruning.layers import find_layers
from retort.pruning.shapes import Widths
from retort.pruning.width import NORMS, Importance
from retort.tokens.sequences import SequenceTable

logger = logging.getLogger(__name__)


@torch.inference_mode()
def measure_importance(
    model: PreTrainedModel, kept: Sequence[int], table: SequenceTable
) -> Importance:
    """Return how active the layers `kept` of a model are on the sequences of a table, one after the other.

    A channel counts with all norms of these layers, and the last one.
    """
    widths, (_, layers) = Widths.read(model.config), find_layers(model)
    assert widths is not None
    chosen = [layers[number] for number in kept]
    sums: dict[tuple[str, int], Tensor] = {}

    def add(key: tuple[str, int], squares_TX: Tensor) -> None:
        root_X = squares_TX.float().sum(0).sqrt().double().cpu()
        sums[key] = sums[key] + root_X if key in sums else root_X

    device = model.get_input_embeddings().weight.device
    with evaluating(model), _observing(model, layers, chosen, widths, add):
        for number in range(len(table)):
            ids_T = torch.from_numpy(table[number].ids).long().to(device)
            model.base_model(input_ids=ids_T[None], use_cache=False)
            if (number + 1) % 64 == 0:
                logger.info(f"activations of {number + 1:,} of {len(table):,} sequences")
    means = {key: total_X / len(table) for key, total_X in sums.items()}
    neurons, groups = ([means[kind, j] for j in range(len(kept))] for kind in ("neurons", "groups"))
    return Importance(means["hidden", 0], neurons, groups)


@contextmanager
def _observing(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    chosen: Sequence[nn.Module],
    widths: Widths,
    add: Callable[[tuple[str, int], Tensor], None],
) -> Iterator[None]:
    """Give `add` the squares [T, X] of what is counted of each sequence, by (kind, number of the layer)."""
    handles = []
    for number, layer in enumerate(chosen):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if name == "down_proj":
                handles.append(module.register_forward_pre_hook(_of_neurons(add, number)))
            elif name == "o_proj":
                handles.append(module.register_forward_pre_hook(_of_groups(add, number, widths)))
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [(path, m) for path, m in model.named_modules() if id(m) not in inside]
    for path, module in [*outside, *(pair for layer in chosen for pair in layer.named_modules())]:
        weight = getattr(module, "weight", None)
        is_norm = isinstance(weight, Tensor) and tuple(weight.shape) == (widths.hidden,)
        if is_norm and path.rpartition(".")[2] not in NORMS:
            handles.append(module.register_forward_hook(_of_hidden(add)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_neurons(add: Callable[..., None], layer: int) -> Callable[..., None]:
    def observe(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        add(("neurons", layer), given[0].flatten(0, -2).float().square())

    return observe


def _of_groups(add: Callable[..., None], layer: int, widths: Widths) -> Callable[..., None]:
    def observe(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        squares_TX = given[0].flatten(0, -2).float().square()
        add(("groups", layer), squares_TX.view(len(squares_TX), widths.groups, -1).sum(-1))

    return observe


def _of_hidden(add: Callable[..., None]) -> Callable[..., None]:
    def observe(_: nn.Module, __: Any, output: Tensor) -> None:
        add(("hidden", 0), output.flatten(0, -2).float().square())

    return observe
