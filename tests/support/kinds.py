"""Small random models of many architectures."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Of a Llama and what is named like it.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
VOCABULARY = 97


def make_model(kind: str, *, dtype: torch.dtype = torch.float32, **keys: Any) -> PreTrainedModel:
    """Return a random model; the same for the same arguments."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **special, **keys)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model
