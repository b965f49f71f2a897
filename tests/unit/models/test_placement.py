"""Where a teacher's layers are put in a group of GPUs: models of 34 to 405 billion parameters, without weights."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

from retort.models.load import refuse_offloaded

GIB = 2**30
# hidden, intermediate, layers, heads, key-value heads, ids
SHAPES = {
    "34b": (8192, 22016, 48, 64, 8, 32_000),
    "70b": (8192, 28672, 80, 64, 8, 128_256),
    "405b": (16384, 53248, 126, 128, 8, 128_256),
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    hidden, intermediate, layers, heads, kv_heads, ids = SHAPES[request.param]
    config = LlamaConfig(
        vocab_size=ids,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("memory", [79.2, 140.0])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_layers_are_spread_evenly_or_the_teacher_is_refused(
    gpus: int, memory: float, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `device_map="auto"`, which `load_teacher` asks for, of GPUs that are pretended."""
    monkeypatch.setattr(torch, "cuda", _pretend(gpus, memory), raising=True)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: None)  # accelerate opens every GPU
    devices = _get_device_map(model, "auto", None, None)
    monkeypatch.undo()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    # A GPU holds whole layers, and the first keeps room for the largest piece (accelerate).
    if size > 0.95 * gpus * memory:
        with pytest.raises(ValueError, match=r"does not fit its GPU group .*gpus_per_model"):
            refuse_offloaded(devices, path="teacher")
        return
    refuse_offloaded(devices, path="teacher")
    layers = Counter(place for name, place in devices.items() if ".layers." in name)
    assert sorted(layers) == list(range(gpus))
    assert max(layers.values()) <= 1.2 * sum(layers.values()) / gpus
    assert devices["lm_head"] == devices["model.norm"] == gpus - 1


def _pretend(gpus: int, memory: float) -> Any:
    found = (int(memory * GIB), int(memory * GIB))
    return SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: gpus,
        mem_get_info=lambda _=0: found,
        get_device_properties=lambda _: SimpleNamespace(is_integrated=False),
    )
