"""The student, the text and the teacher's distributions that all ways to train are measured on.

Legend: B batch, T positions of a sequence, P positions of a batch, K most tokens kept at any position, V vocabulary,
D width of the student.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retort.cache.codec import SparseTargets
from retort.training.teacher_rows import TeacherRows

BATCH, LENGTH, HIDDEN, LAYERS, KEPT = 2, 512, 256, 6, 17
COUNT = BATCH * LENGTH


def build_model(vocabulary: int, *, seed: int) -> PreTrainedModel:
    """Return a student."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def make_teacher(vocabulary: int) -> SparseTargets:
    """Return synthetic distributions of `KEPT` tokens a position on average."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.geometric(1 / KEPT, BATCH * LENGTH), 100)
    ids = np.concatenate([rng.choice(vocabulary, n, replace=False) for n in sizes])
    weights = [rng.random(n) ** 4 + 0.01 for n in sizes]
    logprobs = np.concatenate([np.log(0.9 * w / w.sum()) for w in weights]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tails = np.full((len(sizes), 1), np.log(0.1), np.float32)
    return SparseTargets(offsets, ids, logprobs, tails)


class Inputs:
    """A student, a text, and the teacher's distributions in the forms that the ways take."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocabulary = int(model.config.vocab_size)
        generator = torch.Generator().manual_seed(1)
        ids_BT = torch.randint(0, self.vocabulary, (BATCH, LENGTH + 1), generator=generator)
        self.inputs_BT, self.labels_P = ids_BT[:, :-1], ids_BT[:, 1:].reshape(-1)
        targets = make_teacher(self.vocabulary)
        columns = (targets.offsets, targets.ids, targets.logprobs, targets.tail_logprobs[:, 0])
        self.rows = TeacherRows(*map(torch.from_numpy, columns))
        self.ids_PK, self.logprobs_PK = map(torch.from_numpy, targets.to_rows())
        self.ids_PK = self.ids_PK.long()

    def features(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return hidden states [P, D] of the student, or of another model."""
        body = (model or self.model).base_model
        hidden: Tensor = body(self.inputs_BT, use_cache=False).last_hidden_state
        return hidden.reshape(COUNT, -1)

    def logits(self, model: PreTrainedModel | None = None) -> Tensor:
        """Return logits [P, V]."""
        found: Tensor = (model or self.model)(self.inputs_BT, use_cache=False).logits
        return found.reshape(COUNT, -1)

    def live_teacher(self) -> PreTrainedModel:
        """Return a frozen model of the student's size."""
        return build_model(self.vocabulary, seed=2).eval().requires_grad_(False)
