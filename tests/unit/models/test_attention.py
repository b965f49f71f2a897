"""Attention to packed sequences one by one: what transformers' sdpa computes, from less work."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from retort.models.attention import join_attention, split_attention
from retort.models.packing import number_positions

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
IDS_BT = torch.arange(80).view(2, 40) % 97
POSITIONS_BT = torch.stack([number_positions([13, 20, 7]), number_positions([1, 39])])


def make_model(kind: str, **keys: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=97, initializer_range=0.3, **SIZES, **keys)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


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
    model = make_model(kind, **keys)
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
    model = make_model("llama")
    inputs = {}
    if padding:
        inputs["attention_mask"] = torch.ones_like(IDS_BT)
        inputs["attention_mask"][1, -padding:] = 0
    expected = learn(model, **inputs)
    split_attention(model)
    assert torch.equal(learn(model, **inputs)[0], expected[0])
