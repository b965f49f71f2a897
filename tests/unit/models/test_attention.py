"""Attention to packed sequences one by one: what transformers' sdpa computes, from less work."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retort.models.attention import join_attention, split_attention
from retort.models.packing import number_positions
from support.kinds import SIZES, VOCABULARY, make_model

IDS_BT = torch.arange(80).view(2, 40) % VOCABULARY
POSITIONS_BT = torch.stack([number_positions([13, 20, 7]), number_positions([1, 39])])


def learn(model: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and the gradients of their sum of squares."""
    model.zero_grad()
    logits = model(input_ids=IDS_BT, use_cache=False, **inputs).logits
    real = inputs.get("attention_mask", torch.ones_like(IDS_BT)).bool()
    logits[real].square().mean().backward()
    return logits.detach()[real], [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "kind, keys", [("llama", {}), ("mistral", {"sliding_window": 8})], ids=["whole", "sliding"]
)
def test_packed_sequences_one_by_one_give_the_logits_and_gradients_of_a_block_mask(
    kind: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, initializer_range=0.3, **SIZES, **keys)
    expected, gradients = learn(model, position_ids=POSITIONS_BT)
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(query.shape[2])
        return attend(query, *args, **options)

    split_attention(model)
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", note)
        found, found_gradients = learn(model, position_ids=POSITIONS_BT)
    # In each of two layers; a single query with two groups of heads is read as two.
    assert sizes == [13, 20, 7, 2, 39] * 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_gradients, gradients, rtol=1e-5, atol=1e-5)
    join_attention(model)
    assert torch.equal(learn(model, position_ids=POSITIONS_BT)[0], expected)


@pytest.mark.parametrize("padding", [0, 11])
def test_rows_of_one_sequence_are_attended_to_as_before(padding: int) -> None:
    model = make_model("llama", initializer_range=0.3, **SIZES)
    inputs = {}
    if padding:
        inputs["attention_mask"] = torch.ones_like(IDS_BT)
        inputs["attention_mask"][1, -padding:] = 0
    expected = learn(model, **inputs)
    split_attention(model)
    assert torch.equal(learn(model, **inputs)[0], expected[0])
