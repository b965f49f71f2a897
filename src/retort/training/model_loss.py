"""The loss inside the student: its own forward pass returns losses where it is told what to learn.

Inside, and not in the training loop, because what wraps a model to train it on several devices sees nothing but its
forward passes. A loss made outside of them trains with other weights on every device (DDP), or with weights that are
not there (FSDP, which gathers the head's when the head is called), without a word.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from retort.models.load import CausalLM
from retort.training.batches import IGNORE_INDEX
from retort.training.fused_loss import (
    LossSettings,
    TeacherRows,
    compute_fused_loss,
    compute_loss_of_logits,
)
from retort.training.losses import LossTerms


@dataclass(frozen=True)
class Lesson:
    """What a forward pass is to be measured by.

    labels [B, T]: labels[t] is the token of place t where its prediction counts, else IGNORE_INDEX; teacher: the rows
    of those places in the batch's order, None for alpha 1; normalizer: what the sums are divided by. One object and no
    tensors beside the input: FSDP's mixed precision rounds every tensor that it sees on the way in to bfloat16.
    """

    labels: Tensor
    teacher: TeacherRows | None
    normalizer: Tensor | float = 1.0


def attach_loss(split: CausalLM, settings: LossSettings) -> None:
    """Let a student's forward pass return LossTerms where it is given a `lesson`."""
    model = split.model
    tie = None
    if split.is_split:
        tie = _tie_gradients(model)
        scale, softcap = split.head.scale, split.head.softcap
        _attach_to_head(split, replace(settings, scale=scale, softcap=softcap), tie)
    original = model.forward

    def forward(*args: Any, lesson: Lesson | None = None, **inputs: Any) -> Any:
        if lesson is None:
            return original(*args, **inputs)
        if tie is not None and model.get_input_embeddings().weight.requires_grad:
            tie.begin()
        counts_BT = lesson.labels[:, 1:] != IGNORE_INDEX
        labels_P = lesson.labels[:, 1:][counts_BT]
        if split.is_split:
            hidden_BTD = split.features(inputs["input_ids"], inputs["attention_mask"])
            head = model.get_output_embeddings()
            return head(hidden_BTD[:, :-1][counts_BT], lesson=lesson, labels_P=labels_P)
        logits_PV = original(**inputs, use_cache=False).logits[:, :-1][counts_BT]
        return compute_loss_of_logits(
            logits_PV, labels_P, lesson.teacher, settings, normalizer=lesson.normalizer
        )

    model.forward = forward  # type: ignore[method-assign]


class _Tie:
    """Where a tied weight's two gradients meet in one forward and backward pass.

    Left to autograd, the embedding's gradient becomes a second [V, D], though it has no more rows than the batch has
    tokens: at 131,072 ids a step took 0.26 of the memory of transformers' own, and takes 0.20. The head leaves its
    gradient here instead; the embedding, whose turn comes last, adds its rows to it and hands it on.
    """

    def __init__(self) -> None:
        self.slot: list[Tensor] | None = None

    def begin(self) -> None:
        """Begin a pass that the head's loss will end; a compiler is left the ordinary way."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.slot = []

    def take(self) -> list[Tensor] | None:
        """End the pass: return its place, None where there is none."""
        slot, self.slot = self.slot, None
        return slot


class _TiedLookup(torch.autograd.Function):
    """An embedding whose backward pass returns its own gradient and the head's."""

    @staticmethod
    def forward(
        ctx: Any, weight_VD: Tensor, ids_BT: Tensor, padding_id: int | None, slot: list[Tensor]
    ) -> Tensor:
        ctx.ids_BT, ctx.padding_id, ctx.slot = ids_BT, padding_id, slot
        return nn.functional.embedding(ids_BT, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        total_VD = ctx.slot.pop()
        # A row for each id that was read, added up in a fixed order; the padding's is no gradient.
        read_U, inverse_BT = ctx.ids_BT.unique(return_inverse=True)
        padding = -1 if ctx.padding_id is None else ctx.padding_id
        rows_UD = torch.ops.aten.embedding_dense_backward(
            grad_BTD, inverse_BT, len(read_U), padding_idx=-1, scale_grad_by_freq=False
        )
        rows_UD = rows_UD.masked_fill_((read_U == padding)[:, None], 0.0)
        return total_VD.index_add_(0, read_U, rows_UD.to(total_VD.dtype)), None, None, None


def _tie_gradients(model: PreTrainedModel) -> _Tie | None:
    """Let the plain embedding of a tied model take part in a `_Tie`; None for any other."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    if embedding.weight is not model.get_output_embeddings().weight:
        return None
    original, tie = embedding.forward, _Tie()

    def forward(input: Tensor) -> Tensor:
        if tie.slot is None:
            return original(input)
        found: Tensor = _TiedLookup.apply(  # type: ignore[no-untyped-call]
            embedding.weight, input, embedding.padding_idx, tie.slot
        )
        return found

    embedding.forward = forward  # type: ignore[method-assign]
    return tie


def _attach_to_head(split: CausalLM, settings: LossSettings, tie: _Tie | None) -> None:
    """Let the output layer itself compute the fused loss, from the hidden states [P, D] of what counts."""
    head = split.model.get_output_embeddings()
    original = head.forward

    def forward(
        features: Tensor, lesson: Lesson | None = None, labels_P: Tensor | None = None
    ) -> Tensor | LossTerms:
        if lesson is None:
            logits: Tensor = original(features)
            return logits
        assert labels_P is not None
        terms: LossTerms = compute_fused_loss(
            features,
            head.weight,
            labels_P,
            lesson.teacher,
            settings,
            bias_V=getattr(head, "bias", None),
            normalizer=lesson.normalizer,
            weight_slot=tie.take() if tie is not None else None,
        )
        return terms

    head.forward = forward
