"""Hidden states and head weight -> losses and gradients, without the logits of all positions at once.

Positions go through the head in chunks. A chunk's logits become both losses and their gradient with respect to the
logits, that becomes the gradients of hidden states and weight, and the logits are dropped: one pass over the vocabulary
serves cross-entropy and distillation, and memory holds C x V numbers instead of P x V several times (the idea of Liger
Kernel's fused linear cross-entropy, Hsu et al., arXiv 2410.10989, 2024, section 3.2, with sparse targets).

Legend: P counted positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retort.losses.chunk_loss import compute_chunk
from retort.losses.teacher_rows import ChunkRows, TeacherRows, split_rows, temper_rows
from retort.losses.terms import LossSettings, LossTerms, combine
from retort.models.heads import multiply


def choose_chunk_size(vocabulary: int, device: str = "cpu") -> int:
    """Return how many positions go through the head at once: 2 million logits' worth on a CPU, 64 at least.

    A GPU reads the whole weight for every chunk, so it gets 134 million (half a GiB of float32); that is an estimate,
    not measured.
    """
    return max(64, (1 << (21 if device == "cpu" else 27)) // vocabulary)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # nothing here that a compiler would fuse better
def compute_fused_loss(
    features_PD: Tensor,
    weight_VD: Tensor,
    labels_P: Tensor,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    bias_V: Tensor | None = None,
    normalizer: Tensor | float = 1.0,
    weight_grad_buffer: list[Tensor] | None = None,
) -> LossTerms:
    """Return the losses, summed over positions and divided by `normalizer`; labels_P: int64 token ids.

    The total's gradients are computed here too, and handed out in the backward pass. Under autocast the head runs in
    autocast's dtype, everything behind the logits in float32. `teacher` may be None for alpha 1 only. With
    `weight_grad_buffer`, an empty list, the backward pass puts the weight's gradient there instead of returning it.
    """
    return LossTerms(
        *_FusedLoss.apply(  # type: ignore[no-untyped-call]  # of torch
            features_PD,
            weight_VD if weight_grad_buffer is None else weight_VD.detach(),
            bias_V,
            _Targets(labels_P, _temper(teacher, settings), normalizer),
            settings,
            weight_grad_buffer,
        )
    )


def compute_loss_of_logits(
    logits_PV: Tensor,
    labels_P: Tensor,
    teacher: TeacherRows | None,
    settings: LossSettings,
    *,
    normalizer: Tensor | float = 1.0,
) -> LossTerms:
    """Return the same from logits [P, V] after the model's own scale and softcap: for heads of an unknown form."""
    tempered = _temper(teacher, settings)
    (rows,) = split_rows(tempered, [0, len(labels_P)], logits_PV.shape[1])
    plain = replace(settings, scale=1.0, softcap=None)
    return LossTerms(
        *_LossOfLogits.apply(  # type: ignore[no-untyped-call]  # of torch
            logits_PV, labels_P, rows, plain, normalizer
        )
    )


def _temper(teacher: TeacherRows | None, settings: LossSettings) -> TeacherRows | None:
    assert teacher is not None or settings.alpha == 1.0, settings.alpha
    if teacher is None:
        return None
    return temper_rows(teacher, settings.temperature)


class _Targets(NamedTuple):
    """What losses are computed against: token ids int64 [P], the teacher's rows, and what their sums are divided by."""

    labels: Tensor
    teacher: TeacherRows | None
    normalizer: Tensor | float


class _FusedLoss(torch.autograd.Function):
    """Computes gradients in the forward pass, where a chunk's logits are at hand; the backward pass returns them."""

    @staticmethod
    def forward(
        ctx: Any,
        features_PD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets: _Targets,
        settings: LossSettings,
        weight_grad_buffer: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        device, (labels_P, tempered, normalizer) = features_PD.device.type, targets
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else weight_VD.dtype
        )
        needs = ctx.needs_input_grad
        needs = needs[0], needs[1] or weight_grad_buffer is not None, needs[2]
        # float16 has nothing below 6e-8: divided by a step's positions before GradScaler's factor, a third of the
        # weight's gradient would be zero.
        late = normalizer if dtype == torch.float16 else None
        grads = _Gradients((features_PD, weight_VD, bias_V), needs, dtype=dtype, divisor=late)
        chunk = settings.chunk_size or choose_chunk_size(len(weight_VD), device)
        hard = torch.zeros((), device=features_PD.device)
        divergence = torch.zeros((), device=features_PD.device)
        with torch.autocast(device, enabled=False):
            weight_VD = weight_VD.to(dtype)
            firsts = list(range(0, len(features_PD), chunk))
            # One buffer for all chunks: else the next chunk's logits are allocated while the last one's still exist.
            logits_dtype = torch.promote_types(dtype, torch.float32)
            buffer_CV = weight_VD.new_empty(
                (min(chunk, len(features_PD)), len(weight_VD)), dtype=logits_dtype
            )
            chunks = split_rows(tempered, [*firsts, len(features_PD)], len(weight_VD))
            for first, teacher in zip(firsts, chunks, strict=True):
                rows = slice(first, first + chunk)
                features_CD = features_PD[rows].to(dtype)
                logits_CV = _compute_logits(
                    features_CD, weight_VD, bias_V, settings, out=buffer_CV[: len(features_CD)]
                )
                chunk_hard, chunk_divergence, grad_CV = compute_chunk(
                    logits_CV, labels_P[rows], teacher, settings
                )
                hard += chunk_hard
                divergence += chunk_divergence
                if grads.divisor is None:
                    grad_CV.div_(normalizer)
                grads.add(rows, grad_CV, features_CD, weight_VD)
        ctx.grads, ctx.weight_grad_buffer = grads, weight_grad_buffer
        return _finish(ctx, hard, None if tempered is None else divergence, settings, normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        features_PD, weight_VD, bias_V = grads.release(grad_total)
        if ctx.weight_grad_buffer is not None:
            ctx.weight_grad_buffer.append(weight_VD)
            weight_VD = None
        return (features_PD, weight_VD, bias_V, *[None] * 3)


class _LossOfLogits(torch.autograd.Function):
    """The same for all positions as one chunk, from their logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_PV: Tensor,
        labels_P: Tensor,
        teacher: ChunkRows | None,
        settings: LossSettings,
        normalizer: Tensor | float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = torch.promote_types(logits_PV.dtype, torch.float32)
        with torch.autocast(logits_PV.device.type, enabled=False):
            hard, divergence, ctx.grad = compute_chunk(
                logits_PV.to(dtype, copy=True), labels_P, teacher, settings
            )
            ctx.grad.div_(normalizer)
        ctx.dtype = logits_PV.dtype
        return _finish(ctx, hard, None if teacher is None else divergence, settings, normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        return (grad.mul_(grad_total).to(ctx.dtype), None, None, None, None)


def _finish(
    ctx: Any,
    hard: Tensor,
    divergence: Tensor | None,
    settings: LossSettings,
    normalizer: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return total, hard and soft loss over `normalizer`; only the total has a gradient."""
    divergence = None if divergence is None else divergence / normalizer
    terms = combine(
        hard / normalizer, divergence, alpha=settings.alpha, temperature=settings.temperature
    )
    # Without a teacher total and hard loss are one tensor, which autograd does not accept as two outputs.
    total = terms.total.clone() if terms.soft is None else terms.total
    ctx.mark_non_differentiable(*(t for t in (terms.hard, terms.soft) if t is not None))
    return total, terms.hard, terms.soft


class _Gradients:
    """Gradients of features [P, D], weight [V, D] and bias [V], filled chunk by chunk; None where not needed.

    The features' are in their own dtype, the sums of weight and bias in float32 at least. divisor: what `release`
    divides them by, if they were not before.
    """

    def __init__(
        self,
        inputs: tuple[Tensor | None, ...],
        needs: tuple[bool, ...],
        *,
        dtype: torch.dtype,
        divisor: Tensor | float | None = None,
    ) -> None:
        self.divisor = divisor
        features, weight, bias = (
            t if is_needed else None for t, is_needed in zip(inputs, needs, strict=True)
        )
        sum_dtype = torch.promote_types(dtype, torch.float32)
        self.features = None if features is None else torch.empty_like(features)
        self.weight = None if weight is None else torch.zeros_like(weight, dtype=sum_dtype)
        self.weight_dtype = None if weight is None else weight.dtype
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=sum_dtype)

    def add(self, rows: slice, grad_CV: Tensor, features_CD: Tensor, weight_VD: Tensor) -> None:
        """Add a chunk's part, from the gradient with respect to its logits."""
        if self.bias is not None:
            self.bias += grad_CV.sum(dim=0)
        grad_CV = grad_CV.to(features_CD.dtype)
        if self.features is not None:
            self.features[rows] = grad_CV @ weight_VD
        if self.weight is not None and grad_CV.dtype == self.weight.dtype:
            self.weight.addmm_(grad_CV.t(), features_CD)
        elif self.weight is not None:
            self.weight += multiply(grad_CV.t(), features_CD)

    def release(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients times `factor`, in their parameters' dtypes, and drop the references to them: autograd
        takes a tensor that nothing else refers to without a copy."""
        features, weight, bias = self.features, self.weight, self.bias
        self.features = self.weight = self.bias = None
        if self.divisor is not None:
            factor = factor / self.divisor
        for tensor in (features, weight, bias):
            if tensor is not None:
                tensor.mul_(factor)
        return features, None if weight is None else weight.to(self.weight_dtype), bias


def _compute_logits(
    features_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    settings: LossSettings,
    *,
    out: Tensor,
) -> Tensor:
    """Return a chunk's logits [C, V], in `out` (float32 at least), after the model's own scale and softcap."""
    logits_CV = multiply(features_CD, weight_VD.t(), out=out)
    if bias_V is not None:
        logits_CV += bias_V
    if settings.scale != 1.0:
        logits_CV *= settings.scale
    if settings.softcap is not None:
        logits_CV.div_(settings.softcap).tanh_().mul_(settings.softcap)
    return logits_CV
