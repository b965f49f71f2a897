"""Sizes of a model from its config alone: on PyTorch's meta device, and by tensors without memory; no weights.

Legend: B sequences, T tokens of each, D hidden size, V vocabulary, L layers.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from retort.models.quantized import find_quantization

_TRACED_LENGTH = (
    512  # tokens, at most: what is kept is linear in them, but for attention that keeps its scores
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a causal LM.

    parameters: tied ones once. active: weights of the matrices that one token is multiplied with, without the head;
    of a mixture of experts those of the chosen ones. head: V x D. attention_width: of all heads together.
    """

    config: Any
    parameters: int
    active: int
    head: int
    layers: int
    hidden: int
    intermediate: int
    attention_width: int
    kv_width: int
    vocabulary: int

    def forward_operations(self, context: float) -> float:
        """Return the floating-point operations of a forward pass through the layers, for a token of such sequences.

        2 for each weight of a matrix, and 4 L T H for attention of all pairs of tokens, H the width of all heads
        (Chowdhery et al., PaLM, arXiv 2204.02311, 2022, appendix B; Kaplan et al., arXiv 2001.08361, 2020, table 1).
        """
        return 2 * self.active + 4 * self.layers * self.attention_width * context

    @property
    def head_operations(self) -> float:
        """The same of the head, for a counted position."""
        return 2 * self.head

    def weight_bytes(self, dtype: str) -> float:
        """Return the bytes of all weights in a data type, or as they are quantized."""
        quantization = find_quantization(self.config)
        if not quantization:
            return self.parameters * DTYPE_BYTES[dtype]
        bits = quantization.get("bits") or (4 if quantization.get("load_in_4bit") else 8)
        embeddings = (1 if self.config.get_text_config().tie_word_embeddings else 2) * self.head
        return (self.parameters - embeddings) * bits / 8 + embeddings * DTYPE_BYTES[dtype]

    def saved_bytes(
        self, *, batch: int, length: int, in_half: bool, attention: str | None
    ) -> float:
        """Return the bytes that a forward pass through the layers keeps for its backward pass.

        Counted on the tensors that autograd saves, so for any architecture (for GPT's layers Korthikanti et al., arXiv
        2205.05198, 2022, give 34 bytes a token and channel, and 5 more for each head and pair of tokens that eager
        attention keeps). in_half: under autocast.
        """
        key, kind = str(self.config.to_json_string()), cast(Hashable, type(self.config))
        one, two = (_trace(key, kind, n, length, in_half, attention) for n in (1, 2))
        return one + (batch - 1) * (two - one)


def measure_model(config: PretrainedConfig) -> ModelSize:
    """Return the sizes of the causal LM that a config describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    tables = {id(w) for m in model.modules() if isinstance(m, nn.Embedding) for w in m.parameters()}
    tables |= {id(w) for w in head.parameters()} if head is not None else set()
    active = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and id(weight) not in tables:
            active += weight.numel() * (_share_of_experts(text) if _is_expert(name) else 1.0)
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0) or 0)
    vocabulary = int(head.weight.shape[0]) if head is not None else int(text.vocab_size)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    size = int(getattr(text, "head_dim", None) or (hidden // heads if heads else 0))
    return ModelSize(
        config=config,
        parameters=int(model.num_parameters()),
        active=round(active),
        head=vocabulary * hidden,
        layers=int(getattr(text, "num_hidden_layers", 1)),
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        attention_width=heads * size,
        kv_width=int(getattr(text, "num_key_value_heads", None) or heads) * size,
        vocabulary=vocabulary,
    )


def _is_expert(name: str) -> bool:
    return re.search(r"\bexperts\b", name) is not None and "shared" not in name


def _share_of_experts(config: Any) -> float:
    total = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 0)
    chosen = next((n for name in _CHOSEN if (n := getattr(config, name, None))), 0)
    return min(1.0, chosen / total) if total and chosen else 1.0


@cache
def _trace(
    text: str,
    kind: Any,
    batch: int,
    length: int,
    in_half: bool,
    attention: str | None,
) -> int:
    """Return the bytes of all tensors that autograd saves in a forward pass of the backbone, weights left out."""
    config = kind.from_dict(json.loads(text))
    saved: dict[int, tuple[Any, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with FakeTensorMode(), _without_warnings():
        options = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).train()
        weights = {w.untyped_storage()._cdata for w in model.parameters()}
        ids = torch.zeros(batch, length, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=in_half)
        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        assert kept.requires_grad
    return sum(size for key, (_, size) in saved.items() if key not in weights)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
