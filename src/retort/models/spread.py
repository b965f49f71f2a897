"""A model that is spread over several GPUs: tensors go from one to another without holding up the work queued there.

PyTorch copies between GPUs in the current stream of the source, after all that is queued on the destination. Every
layer is given tensors that lie on the first GPU (position embeddings), so with copies in the default streams, as
accelerate's hooks make them, the first GPU would begin the next batch only when the last one has ended this one.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

_LEFT = ("past_key_values",)  # changed in place, each layer's tensors on its own GPU


def copy_beside_work(model: PreTrainedModel) -> None:
    """Let a model that accelerate has spread over GPUs copy in streams of their own; changes nothing on one GPU."""
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    if len(set(places.values())) < 2:
        return
    for name, place in places.items():
        if name:
            _copy_inputs(model.get_submodule(name), torch.device("cuda", torch.device(place).index))


def _copy_inputs(module: nn.Module, device: torch.device) -> None:
    """Copy a module's inputs to its GPU before accelerate's hook, which then finds them there."""

    def copy(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        left = {k: kwargs.pop(k) for k in _LEFT if k in kwargs}
        moved_args, moved_kwargs = tree_map(lambda x: _copy(x, device), (args, kwargs))
        return moved_args, moved_kwargs | left

    module.register_forward_pre_hook(copy, with_kwargs=True)


@cache
def _stream(source: torch.device, device: torch.device) -> Any:
    """Return the stream on `source` for copies to `device`: one for each, since each waits for its destination."""
    return torch.cuda.Stream(source)  # type: ignore[no-untyped-call]


def _copy(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or value.device == device or value.device.type != "cuda":
        return value
    stream = _stream(value.device, device)
    stream.wait_stream(torch.cuda.current_stream(value.device))
    with torch.cuda.stream(stream):
        copied = value.to(device, non_blocking=True)
    value.record_stream(stream)  # its memory is not reused before it is copied
    return copied
