"""The loss inside the student: its own forward pass returns losses where it is told what to learn.

Inside, and not in the training loop, because what wraps a model to train it on several devices sees nothing but its
forward passes. A loss made outside of them trains with other weights on every device (DDP), or with weights that are
not there (FSDP, which gathers the head's when the head is called), without a word.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from retort.batches import IGNORE_INDEX
from retort.fused_loss import (
    LossSettings,
    TeacherRows,
    compute_fused_loss,
    compute_loss_of_logits,
)
from retort.losses import LossTerms
from retort.models import CausalLM


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
    if split.is_split:
        scale, softcap = split.head.scale, split.head.softcap
        _attach_to_head(split, replace(settings, scale=scale, softcap=softcap))
    model = split.model
    original = model.forward

    def forward(*args: Any, lesson: Lesson | None = None, **inputs: Any) -> Any:
        if lesson is None:
            return original(*args, **inputs)
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


def _attach_to_head(split: CausalLM, settings: LossSettings) -> None:
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
        )
        return terms

    head.forward = forward
