"""final/: the weights in the data type asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retort.io.files import read_json, write_json
from support.bench import Bench

TIED = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_those_of_float32_rounded_once(
    bench: Bench, tmp_path: Path, dtype: str
) -> None:
    student = tmp_path / "tied.json"
    write_json(student, TIED)
    for name in ("float32", dtype):
        bench.train(tmp_path / name, bench.cache, student=student, save_dtype=name)
    full, half = (load_file(tmp_path / n / "final/model.safetensors") for n in ("float32", dtype))
    assert full.keys() == half.keys() and not any("lm_head" in name for name in full), "tied"
    assert {weight.dtype for weight in half.values()} == {getattr(torch, dtype)}
    for name, weight in full.items():
        assert torch.equal(weight.to(getattr(torch, dtype)), half[name])
    assert read_json(tmp_path / dtype / "final/config.json")["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype / "final")
    assert model.dtype == getattr(torch, dtype) and model.config.use_cache
    assert not [*(tmp_path / dtype).glob(".final*")]
    assert sorted(p.name for p in (tmp_path / dtype / "final").iterdir()) == sorted(
        p.name for p in (tmp_path / "float32" / "final").iterdir()
    )


def test_a_weight_beyond_float16_is_refused_and_the_checkpoint_kept(
    bench: Bench, tmp_path: Path
) -> None:
    bench.train(tmp_path / "first", bench.cache)
    start = tmp_path / "first" / "final"
    weights = load_file(start / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 0] = 1e5  # float16 ends at 65,504
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    keys: dict[str, Any] = {"student": start, "learning_rate": 1e-9}
    with pytest.raises(ValueError, match=r"save_dtype is 'float16'.*65504\. Use .*bfloat16"):
        bench.train(tmp_path / "second", bench.cache, save_dtype="float16", **keys)
    assert not (tmp_path / "second" / "final").exists()
    assert [*(tmp_path / "second").glob("checkpoint-*/complete.json")]
    bench.train(tmp_path / "third", bench.cache, save_dtype="bfloat16", **keys)
