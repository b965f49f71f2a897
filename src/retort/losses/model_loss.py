"""The loss inside the student: given targets, its forward pass returns losses instead of logits.

It is not computed in the training loop, because the wrappers for several devices act in forward passes alone. With a
loss outside of them, DDP would train other weights on every device, and FSDP, which gathers the head's weight when the
head is called, would use a weight that is not there; neither would say so.

Legend: B batch, T tokens of a sequence, P counted positions, D hidden size, V vocabulary, U distinct ids.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from retort.losses.fused_loss import compute_fused_loss, compute_loss_of_logits
from retort.losses.held_out import HeldOutSums, HeldOutTargets
from retort.losses.teacher_rows import TeacherRows
from retort.losses.terms import LossSettings, LossTerms
from retort.models.causal_lm import CausalLM, RowBounds, take_rows
from retort.models.heads import Head


@dataclass(frozen=True)
class LossTargets:
    """What the predictions of a forward pass are compared with.

    labels int64 [B, T]: labels[t] is the token at t where its prediction counts, else IGNORE_INDEX; counted int64 [P]:
    indices in [B * T] of the positions before these; teacher: their rows in the batch's order, None without one;
    normalizer: what the sums are divided by; alpha, temperature: of this step, None: those of the settings. One object
    instead of tensors: FSDP's mixed precision rounds every tensor among the inputs to bfloat16.
    """

    labels: Tensor
    counted: Tensor
    teacher: TeacherRows | None
    normalizer: Tensor | float = 1.0
    alpha: float | None = None
    temperature: float | None = None

    def choose(self, settings: LossSettings) -> LossSettings:
        """Return the settings of this pass: with its own alpha and temperature, if it has them."""
        alpha = settings.alpha if self.alpha is None else self.alpha
        temperature = settings.temperature if self.temperature is None else self.temperature
        return replace(settings, alpha=alpha, temperature=temperature)

    def find_labels(self) -> Tensor:
        """Return the tokens int64 [P] that the counted positions predict."""
        return self.labels.flatten().index_select(0, self.counted + 1)


def attach_loss(split: CausalLM, settings: LossSettings, *, is_compiled: bool = False) -> None:
    """Patch a student's `forward`: with the keyword `targets` it returns LossTerms, or HeldOutSums.

    With `bounds`, the row's sequences do not see each other. is_compiled: whether its backbone will be, with the
    embedding.
    """
    model = split.model
    tied = None
    if split.is_split:
        tied = None if is_compiled else _attach_to_embedding(model)
        scale, softcap = split.head.scale, split.head.softcap
        _attach_to_head(split, replace(settings, scale=scale, softcap=softcap), tied)
    original = model.forward

    def forward(
        *args: Any,
        targets: LossTargets | HeldOutTargets | None = None,
        bounds: RowBounds | None = None,
        **inputs: Any,
    ) -> Any:
        bound_inputs = bounds.name_inputs() if bounds else {}
        if targets is None:
            return original(*args, **inputs, **bound_inputs)
        if tied is not None and model.get_input_embeddings().weight.requires_grad:
            tied.begin()
        if split.is_split:
            features_BTD = split.features(
                inputs["input_ids"],
                inputs.get("attention_mask"),
                position_ids_BT=inputs.get("position_ids"),
                bounds=bounds,
            )
            head = model.get_output_embeddings()
            return head(take_rows(features_BTD, targets.counted), targets=targets)
        logits_PV = take_rows(
            original(**inputs, **bound_inputs, use_cache=False).logits, targets.counted
        )
        if isinstance(targets, HeldOutTargets):
            return targets.measure(logits_PV, Head(weight=None))
        return compute_loss_of_logits(
            logits_PV,
            targets.find_labels(),
            targets.teacher,
            targets.choose(settings),
            normalizer=targets.normalizer,
        )

    model.forward = forward


class _TiedWeightGrad:
    """The gradient buffer of a weight that embedding and head share, for one forward and backward pass.

    Left to autograd, the embedding's gradient becomes a second [V, D], though it has no more rows than the batch has
    tokens: at 131,072 ids a step took 0.26 of the memory of transformers' own, and takes 0.20. Instead, the head puts
    its gradient into the buffer; the embedding, whose backward pass is the last, adds its rows and returns the sum.
    """

    def __init__(self) -> None:
        self.buffer: list[Tensor] | None = None

    def begin(self) -> None:
        """Begin a pass that ends with the head's loss; under torch.compile autograd's own way is kept."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.buffer = []

    def take(self) -> list[Tensor] | None:
        """Return the pass's buffer, None where no pass has begun, and forget it."""
        buffer, self.buffer = self.buffer, None
        return buffer


class _TiedEmbedding(torch.autograd.Function):
    """An embedding whose backward pass returns the sum of its own gradient and the head's."""

    @staticmethod
    def forward(
        ctx: Any, weight_VD: Tensor, ids_BT: Tensor, padding_id: int | None, buffer: list[Tensor]
    ) -> Tensor:
        ctx.ids_BT, ctx.padding_id, ctx.buffer = ids_BT, padding_id, buffer
        return nn.functional.embedding(ids_BT, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        total_VD = ctx.buffer.pop()
        # One row for each distinct id, summed in a fixed order; the padding's row gets no gradient.
        ids_U, inverse_BT = ctx.ids_BT.unique(return_inverse=True)
        padding = -1 if ctx.padding_id is None else ctx.padding_id
        rows_UD = torch.ops.aten.embedding_dense_backward(
            grad_BTD, inverse_BT, len(ids_U), padding_idx=-1, scale_grad_by_freq=False
        )
        rows_UD = rows_UD.masked_fill_((ids_U == padding)[:, None], 0.0)
        return total_VD.index_add_(0, ids_U, rows_UD.to(total_VD.dtype)), None, None, None


def _attach_to_embedding(model: PreTrainedModel) -> _TiedWeightGrad | None:
    """Patch the embedding of a model whose weight is tied; return None, and change nothing, for any other model."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    if embedding.weight is not model.get_output_embeddings().weight:
        return None
    original, tied = embedding.forward, _TiedWeightGrad()

    def forward(input: Tensor) -> Tensor:
        if tied.buffer is None:
            return original(input)
        embedded_BTD: Tensor = _TiedEmbedding.apply(  # type: ignore[no-untyped-call]  # of torch
            embedding.weight, input, embedding.padding_idx, tied.buffer
        )
        return embedded_BTD

    embedding.forward = forward  # type: ignore[method-assign]  # a patch by intent
    return tied


def _attach_to_head(split: CausalLM, settings: LossSettings, tied: _TiedWeightGrad | None) -> None:
    """Patch the output layer: with `targets`, it computes the fused loss from features [P, D]."""
    head = split.model.get_output_embeddings()
    original = head.forward

    def forward(
        features: Tensor, targets: LossTargets | HeldOutTargets | None = None
    ) -> Tensor | LossTerms | HeldOutSums:
        if targets is None:
            logits: Tensor = original(features)
            return logits
        if isinstance(targets, HeldOutTargets):
            own = Head(head.weight, getattr(head, "bias", None), settings.scale, settings.softcap)
            return targets.measure(features, own)
        terms: LossTerms = compute_fused_loss(
            features,
            head.weight,
            targets.find_labels(),
            targets.teacher,
            targets.choose(settings),
            bias_V=getattr(head, "bias", None),
            normalizer=targets.normalizer,
            weight_grad_buffer=tied.take() if tied is not None else None,
        )
        return terms

    head.forward = forward
