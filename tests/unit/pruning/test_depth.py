"""Fewer layers of a model compute what the model does without the others, whatever its architecture."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retort.config.sections import Student
from retort.pruning.cut import keep_layers, require_prunable
from retort.pruning.layers import find_layers
from retort.pruning.shapes import choose_layers, plan_pruning
from support.kinds import SIZES, VOCABULARY, make_model
from support.sections import section

SIX = SIZES | {"num_hidden_layers": 6}
SLIDING = ["sliding_attention", "full_attention"] * 3
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 6, "n_head": 4}
NEOX = {k: v for k, v in SIX.items() if k != "num_key_value_heads"}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIX,
    "qwen2": SIX | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": SIX | {"head_dim": 8},
    "mistral": SIX | {"sliding_window": 4},
    "gemma": SIX | {"head_dim": 8},
    "gemma2": SIX | {"head_dim": 8, "sliding_window": 4, "layer_types": SLIDING},
    "gemma3_text": SIX | {"head_dim": 8, "sliding_window": 4, "layer_types": SLIDING},
    "smollm3": SIX | {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
    "olmo2": SIX,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "opt": {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "ffn_dim": 64},
}


class _Skipped(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def prune(whole: PreTrainedModel, **part: Any) -> PreTrainedModel:
    student = Student(from_teacher=section("student.from_teacher", **part))
    plan = plan_pruning(student, whole.config, name="the model")
    require_prunable(whole.config, plan, name="the model")
    return keep_layers(whole, plan, name="the model")


@pytest.mark.parametrize(
    ("num_layers", "num_kept", "kept"),
    [
        (6, 6, (0, 1, 2, 3, 4, 5)),
        (6, 3, (0, 3, 5)),
        (6, 2, (0, 5)),
        (6, 1, (0,)),
        (32, 5, (0, 8, 16, 23, 31)),
        (4, 3, (0, 2, 3)),
    ],
)
def test_layers_are_spread_evenly_from_the_first_to_the_last(
    num_layers: int, num_kept: int, kept: tuple[int, ...]
) -> None:
    assert choose_layers(num_layers, num_kept) == kept


@pytest.mark.parametrize("num_layers", [*range(1, 40), 80])
def test_no_layer_is_chosen_twice(num_layers: int) -> None:
    for num_kept in range(1, num_layers + 1):
        assert len(set(choose_layers(num_layers, num_kept))) == num_kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_computes_what_its_layers_compute_alone(kind: str) -> None:
    whole = make_model(kind, **KINDS[kind]).eval()
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    small = prune(whole, layer_indices=(0, 3, 4))
    _, layers = find_layers(whole)
    for index in (1, 2, 5):
        layers[index] = _Skipped()
    with torch.inference_mode():
        expected = whole(ids, use_cache=False).logits
        assert torch.equal(small(ids, use_cache=False).logits, expected)
        # Each layer has its own place in the cache.
        found = small(ids).past_key_values
        assert len(find_layers(small)[1]) == 3 and found.get_seq_length(2) == 12
        greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        written = small.generate(ids, use_cache=True, **greedy)
        assert torch.equal(written, small.generate(ids, use_cache=False, **greedy))


def test_all_layers_are_the_whole_model() -> None:
    whole = make_model("llama", **SIX)
    small = prune(whole, layers=6)
    for name, weight in whole.state_dict().items():
        assert torch.equal(small.state_dict()[name], weight)


def test_embeddings_that_are_tied_stay_tied() -> None:
    small = prune(make_model("llama", **SIX, tie_word_embeddings=True), layers=2)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_data_type(dtype: torch.dtype) -> None:
    small = prune(make_model("llama", dtype=dtype, **SIX), layers=2)
    assert {weight.dtype for weight in small.parameters()} == {dtype}


def test_layers_that_are_made_by_their_number_are_refused() -> None:
    """Kept where they are, experts and dense layers would change places."""
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    whole = make_model("qwen3_moe", **SIX, **experts, head_dim=8, mlp_only_layers=[1, 3])
    with pytest.raises(ValueError, match=r"cannot keep its layers 0, 2, 3: .*layer 2 would"):
        prune(whole, layer_indices=(0, 2, 3))
    assert len(find_layers(prune(whole, layer_indices=(0, 1, 2, 3)))[1]) == 4


def test_layers_that_are_scaled_by_their_number_are_refused() -> None:
    whole = make_model("gpt2", **GPT2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"attn\.scaling of layer 3 would be 0\.17\d*, not 0\.08"):
        prune(whole, layers=3)
    prune(whole, layer_indices=(0, 1, 2))


def test_a_model_that_does_more_than_its_layers_is_refused() -> None:
    whole = make_model("llama", **SIX)
    _, layers = find_layers(whole)
    layers[3].register_forward_hook(lambda _module, _given, hidden: 2 * hidden)
    with pytest.raises(ValueError, match="does not compute what is left of it"):
        prune(whole, layers=3)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    whole = make_model("llama", **SIX)
    whole.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="has 0 lists of 5 layers"):
        find_layers(whole)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"layers": 7}, r"layers is 7, but the model has 6 layers\. Set 6 or fewer"),
        ({"layer_indices": (0, 6, 9)}, r"layer_indices has 6, 9, but .* are 0 to 5"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(part: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prune(make_model("llama", **SIX), **part)
