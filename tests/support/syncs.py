"""Counts what a host waits for on CUDA, on any device."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their result's size or value must be known on the host (`torch.cuda.set_sync_debug_mode` reports them too).
_WAITS = (
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
)


def needs_result(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether the host waits on CUDA because it must know an operation's result, or the size of it."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # with a mask
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _WAITS


class CountSyncs(TorchDispatchMode):
    """Counts the operations for whose result the host waits on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if needs_result(name, args, kwargs or {}):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
