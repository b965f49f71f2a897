"""Attention to packed sequences one by one: what transformers' sdpa computes, from less work."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retort.models import attention
from retort.models.attention import join_attention, split_attention
from retort.models.causal_lm import RowBounds
from retort.models.packing import number_positions
from support.kinds import SIZES, VOCABULARY, make_model

LENGTHS = (13, 20, 7, 1, 39)
IDS_1N = torch.arange(80)[None] % VOCABULARY
POSITIONS_1N = number_positions(LENGTHS)[None]


def learn(model: PreTrainedModel, ids_BT: Tensor, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and the gradients of their sum of squares."""
    model.zero_grad()
    logits = model(input_ids=ids_BT, use_cache=False, **inputs).logits
    real = inputs.get("attention_mask", torch.ones_like(ids_BT)).bool()
    logits[real].square().mean().backward()
    return logits.detach()[real], [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "kind, keys", [("llama", {}), ("mistral", {"sliding_window": 8})], ids=["whole", "sliding"]
)
def test_packed_sequences_one_by_one_give_the_logits_and_gradients_of_a_block_mask(
    kind: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, initializer_range=0.3, **SIZES, **keys)
    expected, gradients = learn(model, IDS_1N, position_ids=POSITIONS_1N)
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(query.shape[2])
        return attend(query, *args, **options)

    split_attention(model)
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", note)
        inputs = {"position_ids": POSITIONS_1N, **RowBounds.of(LENGTHS).name_inputs()}
        found, found_gradients = learn(model, IDS_1N, **inputs)
    assert sizes == [*LENGTHS] * 2, "in each of two layers"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-5, atol=1e-5)
    join_attention(model)
    assert torch.equal(learn(model, IDS_1N, position_ids=POSITIONS_1N)[0], expected)


@pytest.mark.parametrize("window", [None, 8])
def test_equal_sequences_are_attended_to_at_once_with_the_same_bits(window: int | None) -> None:
    keys: dict[str, Any] = {} if window is None else {"sliding_window": window}
    model = make_model("llama" if window is None else "mistral", **SIZES, **keys)
    split_attention(model)
    ids_1N, equal = IDS_1N[:, :60], (20, 20, 20)
    inputs = {"position_ids": number_positions(equal)[None], **RowBounds.of(equal).name_inputs()}
    at_once, _ = learn(model, ids_1N, **inputs)
    alone = [
        learn(model, ids_1N[:, first : first + 20], position_ids=number_positions([20])[None])[0]
        for first in range(0, 60, 20)
    ]
    assert torch.equal(at_once, torch.cat(alone))


@pytest.mark.parametrize("padding", [0, 11])
def test_rows_of_one_sequence_are_attended_to_as_before(padding: int) -> None:
    model = make_model("llama", initializer_range=0.3, **SIZES)
    ids_BT = IDS_1N.view(2, 40)
    inputs = {}
    if padding:
        inputs["attention_mask"] = torch.ones_like(ids_BT)
        inputs["attention_mask"][1, :padding] = 0
    expected = learn(model, ids_BT, **inputs)
    split_attention(model)
    assert torch.equal(learn(model, ids_BT, **inputs)[0], expected[0])


def varlen_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    _: Tensor,
    *longest: int,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What the documentation of torch.nn.attention.varlen says that its kernel for GPUs computes, [T, H, D]."""
    before, after = window_size
    assert after == 0 and longest == (max(LENGTHS), max(LENGTHS))
    assert enable_gqa == (len(query[0]) > len(key[0]))
    found = []
    for first, stop in pairwise(starts.tolist()):
        q, k, v = (t[first:stop].transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
        distance_TT = torch.arange(stop - first)[:, None] - torch.arange(stop - first)
        seen_TT = (distance_TT >= 0) & ((distance_TT <= before) | (before == -1))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen_TT, -torch.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("kind, keys", [("llama", {}), ("mistral", {"sliding_window": 8})])
def test_variable_length_attention_is_asked_for_the_same(
    kind: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel is CUDA's; `make test-gpu` compares that."""
    model = make_model(kind, initializer_range=0.3, **SIZES, **keys)
    split_attention(model)
    inputs = {"position_ids": POSITIONS_1N, **RowBounds.of(LENGTHS).name_inputs()}
    expected = learn(model, IDS_1N, **inputs)
    monkeypatch.setattr(attention, "_has_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_definition)
    found = learn(model, IDS_1N, **inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], expected[0])
