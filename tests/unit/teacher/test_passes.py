"""How often selection goes over all logits, and how many operations it takes: its time on a GPU depends on both."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retort.cache.methods import build_codec
from retort.teacher import selection
from support.sections import section

ROWS, WIDTH = 64, 8192
# These look at a tensor in another way, and read nothing.
_VIEWS = (
    *("view", "slice", "select", "expand", "unsqueeze", "alias", "detach", "as_strided", "t"),
    *("empty_like", "empty", "new_empty", "_unsafe_view", "transpose", "permute", "lift_fresh"),
)


class _CountPasses(TorchDispatchMode):
    """Counts operations, and bytes that they read and write of tensors as large as all logits."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.large = 0, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            self.operations += 1
            # A gather and a put read and write what is indexed, not the whole.
            is_indexed = name in ("index", "gather", "index_put_", "_index_put_impl_")
            for tensor in () if is_indexed else (*args, found):
                if isinstance(tensor, Tensor) and tensor.numel() >= ROWS * WIDTH // 2:
                    size = tensor.numel() * tensor.element_size()
                    self.large[name] = self.large.get(name, 0) + size
        return found


CACHES: dict[str, tuple[dict[str, Any], int, int]] = {
    # the cache, bytes a logit, operations
    "top_p": ({"method": "top_p", "min_probability": 0.001, "temperatures": [1.0]}, 16, 42),
    "top_p at 2": (
        {"method": "top_p", "min_probability": 0.001, "temperatures": [1.0, 2.0]},
        28,
        48,
    ),
    "sampled": ({"method": "sampled", "head_probability": 0.01, "temperatures": [1.0]}, 20, 87),
    "top_k": ({"method": "top_k", "top_k": 64, "temperatures": [1.0]}, 16, 49),
}


@pytest.mark.parametrize("name", CACHES)
def test_selection_keeps_its_budget_of_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, num_bytes, operations = CACHES[name]
    monkeypatch.setattr(selection, "_CPU_ELEMENTS", 1 << 40)  # all rows at once, as on a GPU
    codec = build_codec(
        section("cache", **keys), vocabulary=WIDTH, token_counts=np.ones(WIDTH, int)
    )
    logits = 3 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    with _CountPasses() as counted:
        selection.select(logits, codec, num_tokens=WIDTH, uniform_P=np.linspace(0, 0.9, ROWS))
    found = {kind: size / (ROWS * WIDTH) for kind, size in counted.large.items()}
    assert sum(found.values()) == num_bytes, found
    assert counted.operations <= operations, counted.operations
