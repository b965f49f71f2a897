"""On a GPU the cache has the same bytes in every run: no sum that reaches it depends on the order of atomics.

The documentation of `torch.use_deterministic_algorithms` lists the operations that are not deterministic on CUDA. They
are searched among those dispatched on a CPU, which are the same except where the code asks for the device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retort.cache.codec import Codec
from retort.cache.entropy_codec import Selection
from retort.cache.top_k_codec import TopKCodec
from retort.models.load import load_teacher
from retort.teacher import selection
from retort.teacher.scoring import Scorer, score_part
from support.scoring import random_table
from support.sections import section
from support.synthetic import CODEC, CODED
from support.tiny import NUM_TOKENS, WIDTH

CHECKED: dict[
    str, Callable[..., bool]
] = {}  # by operator: is it deterministic with these arguments?
_NEVER = (
    *("index_add", "index_copy", "scatter_add", "scatter_reduce", "put", "histc", "kthvalue"),
    *("nanmedian", "nll_loss_forward", "nll_loss2d_forward", "_embedding_bag"),
)
CHECKED |= dict.fromkeys(_NEVER, lambda *_, **__: False)
CHECKED["median"] = lambda _, dim=None, *__, **___: dim is None
CHECKED["bincount"] = lambda _, weights=None, *__, **___: weights is None
CHECKED["cumsum"] = lambda values, *_, dtype=None, **__: (
    not ((dtype or values.dtype).is_floating_point)
)
CHECKED["scatter"] = lambda _, dim, index, src=None, **__: not isinstance(src, Tensor)


def _puts_in_order(
    _: Tensor, indices: Any, values: Tensor, accumulate: bool = False, *__: Any
) -> bool:
    """Say whether no two of several values are put at the same index."""
    given = [i.numpy() for i in indices if i is not None]
    index = np.stack(np.broadcast_arrays(*given), axis=-1).reshape(-1, len(given))
    return not accumulate and (values.numel() == 1 or len(np.unique(index, axis=0)) == len(index))


CHECKED |= dict.fromkeys(("index_put", "_index_put_impl"), _puts_in_order)


class Watch(TorchDispatchMode):
    """Refuses operations whose result on CUDA may differ from run to run, and counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        may = CHECKED.get(name, lambda *_, **__: True)
        inputs = {key: value for key, value in kwargs.items() if key != "out"}
        assert may(*args, **inputs), f"{func} is not deterministic on CUDA"
        self.seen += 1
        return func(*args, **kwargs)


VALUES, PLACES = torch.ones(4), torch.tensor([0, 1, 1, 2])
UNORDERED: dict[str, Callable[[], Any]] = {
    "index_add": lambda: torch.zeros(3).index_add_(0, PLACES, VALUES),
    "scatter_add": lambda: torch.zeros(3).scatter_add_(0, PLACES, VALUES),
    "scatter": lambda: torch.zeros(3).scatter_(0, PLACES, VALUES),
    "scatter_reduce": lambda: torch.zeros(3).scatter_reduce_(0, PLACES, VALUES, "sum"),
    "put": lambda: torch.zeros(3).put_(PLACES, VALUES, accumulate=True),
    "index_put": lambda: torch.zeros(3).index_put_((PLACES,), VALUES, accumulate=True),
    "values at one place": lambda: torch.zeros(3).__setitem__(PLACES, VALUES),
    "cumsum": lambda: VALUES.double().cumsum(0),
    "cumsum of whole numbers as floats": lambda: PLACES.cumsum(0, dtype=torch.float32),
    "cumsum into a place": lambda: torch.cumsum(VALUES, 0, out=torch.empty(4)),
    "bincount": lambda: PLACES.bincount(VALUES),
    "histc": lambda: VALUES.histc(),
    "kthvalue": lambda: VALUES.kthvalue(2),
    "median": lambda: VALUES.median(0),
}


@pytest.mark.parametrize("name", UNORDERED)
def test_what_pytorch_lists_is_found(name: str) -> None:
    with pytest.raises(AssertionError, match="not deterministic on CUDA"), Watch():
        UNORDERED[name]()


CODECS: dict[str, Codec] = {"top_k": CODEC, **CODED}


# A CPU processes a few rows at a time, a GPU all of them.
@pytest.mark.parametrize("elements", [300 * 4, 1 << 40])
@pytest.mark.parametrize("method", CODECS)
def test_selection_adds_in_one_order_on_cuda(
    method: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_CPU_ELEMENTS", elements)
    codec = CODECS[method]
    assert codec.temperatures == (1.0, 2.0)
    logits_PV = torch.randn(20, codec.vocabulary, generator=torch.Generator().manual_seed(0))
    with Watch() as watch:
        uniform_P = np.random.default_rng(0).random(20)
        found = selection.select(logits_PV, codec, num_tokens=290, uniform_P=uniform_P)
        if isinstance(found, Selection):
            assert (found.sampled_ids.size > 0) == (method == "sampled")
    assert watch.seen > 20


def test_the_teachers_pass_adds_in_one_order_on_cuda(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher), section("teacher", device="cpu"))
    codec = TopKCodec((1.0, 2.0), WIDTH, 6)
    with Watch() as watch:
        score_part(Scorer(teacher, 2), random_table([30, 2, 17]), codec, num_tokens=NUM_TOKENS)
    assert watch.seen > 50
