"""The decoder layers of a model, found in its modules, and whether those of a pruned one are the same.

No table of architectures: a model's layers are the one list of modules that is as long as its config says.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from retort.pruning.shapes import count_layers

_OF_PLACE = {"layer_idx", "layer_index", "layer_number", "layer_id", "training"}


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's decoder layers. Raises ValueError when there is not one such list."""
    num_layers = count_layers(model.config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    outermost = [
        (name, module)
        for name, module in found
        if not any(name.startswith(f"{other}.") for other, _ in found if other != name)
    ]
    if len(outermost) != 1:
        raise ValueError(
            f"a {type(model).__name__} cannot be pruned: it has {len(outermost)} lists of {num_layers} layers, where "
            "one was expected. Start from student.config or student.model_path instead."
        )
    return outermost[0]


def rename(name: str, prefix: str, kept: Sequence[int]) -> str:
    """Return the name that a weight of a pruned model has in the whole one; `prefix`: of the list of layers."""
    if not name.startswith(f"{prefix}."):
        return name
    number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{kept[int(number)]}.{rest}"


def find_unlike(whole: nn.ModuleList, pruned: nn.ModuleList, kept: Sequence[int]) -> Iterator[str]:
    """Yield how layers of a pruned model differ from those that they are to be, but for their sizes.

    Compared are the classes of all modules and their plain attributes, such as a sliding window, the kind of attention
    or whether positions are rotated; not the number of the layer. What depends on that number alone shows here.
    """
    for number, layer in enumerate(pruned):
        modules = dict(whole[kept[number]].named_modules())
        mine = dict(layer.named_modules())
        if unlike := sorted(mine.keys() ^ modules.keys()):
            yield f"layer {kept[number]} would have other modules ({unlike[0]})"
            continue
        for name, module in mine.items():
            theirs = modules[name]
            if type(module) is not type(theirs):
                yield f"layer {kept[number]} would have another {name or 'class'} ({type(module).__name__})"
            one, other = _plain(module), _plain(theirs)
            for key in sorted(one.keys() | other.keys()):
                if one.get(key) != other.get(key):
                    path = f"{name}.{key}".lstrip(".")
                    yield f"{path} of layer {kept[number]} would be {one.get(key)!r}, not {other.get(key)!r}"


def _plain(module: nn.Module) -> dict[str, object]:
    plain = (bool, int, float, str, type(None), torch.dtype)
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, plain) and not key.startswith("_") and key not in _OF_PLACE
    }
