"""One part of the teacher's work on any device, from random weights, and the digest of its records."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, LlamaConfig

from retort.cache.codec import Codec, SparseTargets
from retort.cache.methods import build_codec
from retort.models.causal_lm import CausalLM, needs_mask, split_model
from retort.models.load import choose_dtype
from retort.models.spread import copy_beside_work
from retort.teacher.batches import Batch, batch_by_length
from retort.teacher.scoring import PartTargets, Scorer, select_batches
from retort.tokens.sequences import SequenceTable
from support.scoring import random_table
from support.sections import section

TOP_K = 8
METHODS: dict[str, dict[str, Any]] = {
    "top_k": {"method": "top_k", "top_k": TOP_K, "temperatures": (1.0, 2.0)},
    "top_p": {"method": "top_p", "min_probability": 0.001, "temperatures": (1.0, 2.0)},
    "sampled": {"method": "sampled", "head_probability": 0.05, "temperatures": (1.0,)},
}


@dataclass(frozen=True)
class Shape:
    """Of a teacher, and of the sequences of its part: of many lengths, so that batches are padded."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    sequences: int
    longest: int
    batch_size: int


SMALL = Shape(512, 32, 2, 4, sequences=24, longest=48, batch_size=4)
LARGE = Shape(32_768, 512, 8, 8, sequences=64, longest=512, batch_size=16)
# Of all that is computed, only logits take much memory: 1 GB for 2,048 rows.
WIDE = Shape(131_072, 64, 2, 4, sequences=24, longest=512, batch_size=16)


class Part:
    """A teacher and a part; weights are made on the CPU, so they are the same for every device."""

    def __init__(self, device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads // 2,
            initializer_range=0.05,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        model.get_output_embeddings().weight.mul_(10)
        self.teacher = split_and_probe(model.to(device=device, dtype=dtype))
        lengths = np.random.default_rng(1).integers(8, shape.longest, shape.sequences).tolist()
        self.table = random_table(lengths, vocabulary=shape.vocabulary)
        self.counts = np.bincount(self.table.ids, minlength=shape.vocabulary)

    @property
    def batches(self) -> list[Batch]:
        """Its batches."""
        return list(batch_by_length(self.table, self.shape.batch_size))

    def codec(self, method: str) -> Codec:
        """Return the codec of a method."""
        keys = {"top_k": TOP_K, "min_probability": None, "head_probability": None}
        cache = section("cache", **(keys | METHODS[method]))
        return build_codec(cache, vocabulary=self.shape.vocabulary, token_counts=self.counts)

    def score(self, method: str, *, beside: SequenceTable | None = None) -> PartTargets:
        """Score the part, between the batches of another one if it is given."""
        codec = self.codec(method)
        scored = PartTargets(self.table, codec, codec.order_tokens(self.counts), None)
        scorer, size = Scorer(self.teacher, self.shape.batch_size), self.shape.vocabulary
        found = select_batches(scorer, self._mix(beside), codec, num_tokens=size)
        for batch, selected, is_halved in found:
            if batch.table is self.table:
                scored.add(batch, selected, is_halved=is_halved)
        assert scored.is_complete
        return scored

    def _mix(self, beside: SequenceTable | None) -> Iterator[Batch]:
        others = [] if beside is None else batch_by_length(beside, 3)
        for other, own in zip_longest(others, self.batches):
            yield from (batch for batch in (other, own) if batch is not None)

    def top_k(self) -> SparseTargets:
        """Return what top_k keeps, before it is coded."""
        return SparseTargets.concatenate(self.score("top_k").sequences)

    def digest(self, method: str, *, beside: SequenceTable | None = None) -> str:
        """Return the sha256 of the part's records."""
        scored = self.score(method, beside=beside)
        records, tables = scored.codec.encode(scored.sequences)
        return hashlib.sha256(b"".join(records) + tables).hexdigest()


def split_and_probe(model: Any) -> CausalLM:
    """Split and probe a model as `load_teacher` does."""
    split = split_model(model)
    assert split.is_split
    mask = needs_mask(split)
    return CausalLM(model, split.head, split.vocabulary, is_split=True, needs_mask=mask)


def spread_over(model: Any, gpus: int) -> CausalLM:
    """Spread a Llama over so many GPUs, layer by layer, as `load_teacher` lets accelerate do it."""
    layers = model.config.num_hidden_layers
    places = {f"model.layers.{i}": i * gpus // layers for i in range(layers)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0}
    is_tied = model.config.tie_word_embeddings
    places |= {"model.norm": gpus - 1, "lm_head": 0 if is_tied else gpus - 1}
    spread = dispatch_model(model, places)
    copy_beside_work(spread)
    teacher = split_and_probe(spread)
    assert teacher.num_gpus == gpus
    return teacher


def make_part(device: torch.device, dtype: torch.dtype | None = None) -> Part:
    """Return a part, small on a CPU, in the type that the pipeline would choose."""
    shape = SMALL if device.type == "cpu" else LARGE
    return Part(device, shape, dtype or choose_dtype("auto", device))


def find_digests(device: str) -> dict[str, str]:
    """Return the digest of the part for each method; for another process."""
    part = make_part(torch.device(device))
    return {method: part.digest(method) for method in METHODS}
