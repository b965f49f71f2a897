"""Sizes from a config alone are those of the real model."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retort.estimate.gpus import find_gpu
from retort.estimate.memory import Load, estimate_teacher_memory, find_smallest_group
from retort.estimate.sizes import measure_model
from support.sections import section

DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {**DECODER, "intermediate_size": 80},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3": {**DECODER, "head_dim": 16, "intermediate_size": 64},
}  # fmt: skip


def make_config(kind: str, **keys: Any) -> Any:
    return AutoConfig.for_model(kind, vocab_size=300, **keys)


@pytest.mark.parametrize("kind", SMALL)
def test_kept_bytes_are_those_that_autograd_keeps(kind: str) -> None:
    config = make_config(kind, **SMALL[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(3, 24, dtype=torch.long), use_cache=False)
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)
    size = measure_model(config)
    found = size.saved_bytes(batch=3, length=24, in_half=False, attention=None)
    assert found == pytest.approx(real, rel=0.05)
    assert size.parameters == model.num_parameters()
    half = size.saved_bytes(batch=3, length=24, in_half=True, attention=None)
    assert 0.4 * found < half < found


def test_of_a_mixture_of_experts_a_token_passes_the_chosen_ones() -> None:
    keys = DECODER | {"intermediate_size": 64}
    size = measure_model(make_config("mixtral", **keys, num_local_experts=8, num_experts_per_tok=2))
    attention, router, expert = 4 * 32 * 32, 8 * 32, 3 * 32 * 64
    assert size.active == 2 * (attention + router + 2 * expert)


def test_large_teachers_need_the_gpus_that_they_need() -> None:
    llama = {"vocab_size": 128_256, "num_key_value_heads": 8}
    shapes = {
        "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
        "70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    }  # fmt: skip
    config = section_config()
    groups = {}
    for name, shape in shapes.items():
        size = measure_model(AutoConfig.for_model("llama", **llama, **shape))
        memory = estimate_teacher_memory(
            size, config, Load(1, 2048, 2048), dtype="bfloat16", device="cuda"
        )
        groups[name] = find_smallest_group(memory, size, find_gpu("h100-80").usable)
        # 2 operations a weight, and attention's share, which grows with the text
        assert size.forward_operations(0) == 2 * size.active
        assert 1.01 < size.forward_operations(2048) / (2 * size.active) < 1.2
    assert groups == {"8B": 1, "70B": 3}
    assert (
        measure_model(AutoConfig.for_model("llama", **llama, **shapes["8B"])).parameters
        == 8_030_261_248
    )


def section_config() -> Any:
    from retort.config.sections import Config

    return Config().model_copy(update={"teacher": section("teacher")})


def test_an_unknown_gpu_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"'h1000' is not known. Known are a10-24, .*h100-80"):
        find_gpu("h1000")
