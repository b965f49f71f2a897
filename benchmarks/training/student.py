"""The students, the text and the teacher's distributions that all ways to train are measured on.

Legend: B batch, T positions of a sequence, P positions of a batch, K most tokens kept at any position, V vocabulary,
D width of the student.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retort.cache.codec import SparseTargets
from retort.losses.teacher_rows import TeacherRows

KEPT = 17


@dataclass(frozen=True)
class Shape:
    """Of a student (a Llama with a tied head), and of a batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    batch: int
    length: int

    @property
    def positions(self) -> int:
        """Positions of a batch, P."""
        return self.batch * self.length


# tiny: for tests. large: for a GPU of 40 GB or more.
SHAPES = {
    "tiny": Shape(32, 64, 1, 4, batch=2, length=16),
    "small": Shape(256, 688, 6, 4, batch=2, length=512),
    "large": Shape(4096, 11_008, 2, 32, batch=4, length=2048),
}


def build_model(vocabulary: int, *, seed: int, shape: Shape = SHAPES["small"]) -> PreTrainedModel:
    """Return a student."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def make_teacher(vocabulary: int, positions: int) -> SparseTargets:
    """Return synthetic distributions of `KEPT` tokens a position on average."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.geometric(1 / KEPT, positions), 100)
    ids = np.concatenate([rng.choice(vocabulary, n, replace=False) for n in sizes])
    weights = [rng.random(n) ** 4 + 0.01 for n in sizes]
    logprobs = np.concatenate([np.log(0.9 * w / w.sum()) for w in weights]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tails = np.full((len(sizes), 1), np.log(0.1), np.float32)
    return SparseTargets(offsets, ids, logprobs, tails)


class Inputs:
    """A student, a text, and the teacher's distributions in the forms that the ways take."""

    def __init__(self, model: PreTrainedModel, shape: Shape) -> None:
        self.model, self.shape, device = model, shape, model.device
        self.vocabulary = int(model.config.vocab_size)
        generator = torch.Generator().manual_seed(1)
        size = (shape.batch, shape.length + 1)
        ids_BT = torch.randint(0, self.vocabulary, size, generator=generator).to(device)
        self.inputs_BT, self.labels_P = ids_BT[:, :-1], ids_BT[:, 1:].reshape(-1)
        targets = make_teacher(self.vocabulary, shape.positions)
        columns = (targets.offsets, targets.ids, targets.logprobs, targets.tail_logprobs[:, 0])
        self.rows = TeacherRows(*map(torch.from_numpy, columns)).to(device)
        ids_PK, logprobs_PK = map(torch.from_numpy, targets.to_rows())
        self.ids_PK, self.logprobs_PK = ids_PK.long().to(device), logprobs_PK.to(device)

    def features(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return hidden states [P, D] of the student, or of another model."""
        body = (model or self.model).base_model
        hidden: Tensor = body(self.inputs_BT, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def logits(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return logits [P, V]."""
        found: Tensor = (model or self.model)(self.inputs_BT, use_cache=False).logits
        return found.flatten(0, 1)

    def live_teacher(self) -> PreTrainedModel:
        """Return a frozen model of the student's size."""
        live = build_model(self.vocabulary, seed=2, shape=self.shape).to(self.model.device)
        return live.eval().requires_grad_(False)
