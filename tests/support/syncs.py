"""Counts what a host waits for on CUDA, on any device."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2")


class CountSyncs(TorchDispatchMode):
    """Counts the operations for whose result the host waits on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_masked = name == "index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        is_of_unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in _SYNCS or is_masked or is_of_unknown_size:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
