"""Packing: models that keep the sequences of a row apart, and models that do not, which the probe finds."""

from typing import Any

import pytest
import torch

from retort.models.attention import split_attention
from retort.models.causal_lm import CausalLM, split_model
from retort.models.packing import find_joining_fault, find_packing_fault
from support.kinds import SIZES, make_model

PACKABLE: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2": SIZES | {"head_dim": 8, "sliding_window": 8},
    "mixtral": SIZES | {"num_local_experts": 4},
}
MAMBA = {"mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# The last three leak less than bfloat16 rounds: 2e-3, 1e-4 and 6e-4 of the largest feature.
LEAKING: dict[str, dict[str, Any]] = {
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "jamba": SIZES
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
    | {"use_mamba_kernels": False},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "falcon_h1": SIZES | MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PACKABLE)
def test_models_that_keep_packed_sequences_apart_pass(kind: str, dtype: torch.dtype) -> None:
    model = split_model(make_model(kind, dtype=dtype, **PACKABLE[kind]))
    assert find_packing_fault(model) is None
    assert find_packing_fault(model, at_once=True) is None
    split_attention(model.model)
    fault = find_joining_fault(model)
    assert fault is None if kind != "gemma2" else "uses eager attention" in str(fault)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEAKING)
def test_models_that_mix_them_are_found_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    model = split_model(make_model(kind, dtype=dtype, **LEAKING[kind]))
    for at_once in (False, True):
        fault = find_packing_fault(model, at_once=at_once)
        assert fault is not None and "see each other" in fault
    split_attention(model.model)
    assert (find_joining_fault(model) is None) == (kind == "opt")  # which leaves its mask alone


@pytest.mark.parametrize(
    "kind, keys, is_right",
    [
        ("mistral", {}, True),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            True,
        ),
        ("llama4_text", {"attention_chunk_size": 64}, False),
    ],
)
def test_windows_longer_than_the_probe_are_met_by_it(
    kind: str, keys: dict[str, Any], is_right: bool
) -> None:
    model = split_model(make_model(kind, **SIZES, sliding_window=64, **keys))
    split_attention(model.model)
    assert (find_joining_fault(model) is None) == is_right
    assert model.model.config.sliding_window == 64


class WithoutPositions(CausalLM):
    """A model that takes no position ids."""

    def features(self, *args: Any, position_ids_BT: Any = None, **options: Any) -> Any:
        """Refuse them as transformers' models do."""
        if position_ids_BT is not None:
            raise TypeError("unexpected keyword argument 'position_ids'")
        return super().features(*args, **options)


class WithoutRestart(CausalLM):
    """A model that counts on where a sequence ends: sequences are apart, but not as they are alone."""

    def features(self, *args: Any, position_ids_BT: Any = None, **options: Any) -> Any:
        """Shift all but the first sequence of a row by a position."""
        if position_ids_BT is not None:
            ends = (position_ids_BT == 0).long().cumsum(-1) - 1
            position_ids_BT = position_ids_BT + ends
        return super().features(*args, position_ids_BT=position_ids_BT, **options)


@pytest.mark.parametrize(
    "kind, found",
    [
        (WithoutPositions, "takes no packed sequences (unexpected"),
        (WithoutRestart, "otherwise than alone"),
    ],
)
def test_models_without_positions_of_their_own_are_found(kind: type[CausalLM], found: str) -> None:
    plain = split_model(make_model("gpt2", **PACKABLE["gpt2"]))
    model = kind(plain.model, plain.head, plain.vocabulary, is_split=True)
    assert found in str(find_packing_fault(model))
