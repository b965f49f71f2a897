"""Ways to train for one step: each returns a function that computes a loss, whose backward pass is measured with it.

Legend: B batch, T positions of a sequence, P positions of a batch, K most tokens kept at any position, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.common import import_opponent
from benchmarks.training.student import Inputs, Shape
from retort.losses.model_loss import LossTargets, attach_loss
from retort.losses.terms import LossSettings, LossTerms, compute_dense_divergence
from retort.models.attention import split_attention
from retort.models.causal_lm import RowBounds, split_model
from retort.models.packing import number_positions
from retort.training.batches import IGNORE_INDEX, find_counted

VEOMNI = (
    "put chunk_topk_distill.py of github.com/ByteDance-Seed/VeOmni, in veomni/ops/kernels/cross_entropy, "
    "and what it imports on PYTHONPATH"
)
Step = Callable[[], Tensor]


def run_cross_entropy(inputs: Inputs) -> Step:
    """transformers' own loss, which counts one position fewer in each row."""

    def step() -> Tensor:
        inputs_BT = inputs.inputs_BT
        loss: Tensor = inputs.model(inputs_BT, labels=inputs_BT, use_cache=False).loss
        return loss

    return step


def run_fused(
    inputs: Inputs, alpha: float, temperature: float, is_joined: bool, chunk_size: int | None
) -> Step:
    """Retort's fused loss: of padded rows, or of the same sequences end to end in one row."""
    settings = LossSettings(alpha, temperature, chunk_size=chunk_size)
    attach_loss(split_model(inputs.model), settings)
    ids_BT = inputs.inputs_BT
    # The model shifts labels by one: the row is longer by the last position's label, and the first has none.
    padded_BT = F.pad(ids_BT, (0, 1))
    labels_BT = F.pad(inputs.labels_P.view(ids_BT.shape), (1, 0), value=IGNORE_INDEX)
    targets = LossTargets(
        labels_BT,
        find_counted(labels_BT.cpu()).to(labels_BT.device),
        inputs.rows if alpha < 1 else None,
        inputs.shape.positions,
    )

    model_inputs: dict[str, Any] = {"input_ids": padded_BT}
    if is_joined:
        split_attention(inputs.model)
        lengths = [padded_BT.shape[1]] * len(padded_BT)
        positions_1N = number_positions(lengths).to(padded_BT.device)[None]
        bounds = RowBounds.of(lengths).to(padded_BT.device)
        model_inputs = {
            "input_ids": padded_BT.reshape(1, -1),
            "position_ids": positions_1N,
            "bounds": bounds,
        }

    def step() -> Tensor:
        terms: LossTerms = inputs.model(**model_inputs, targets=targets)
        return terms.total

    return step


def run_dense_sparse(inputs: Inputs) -> Step:
    """Sparse targets on all logits, by autograd, without a tail."""

    def step() -> Tensor:
        logits_PV = inputs.logits()
        hard = F.cross_entropy(logits_PV.float(), inputs.labels_P, reduction="sum")
        logq_PK = logits_PV.log_softmax(dim=-1).gather(1, inputs.ids_PK)
        logp_PK = inputs.logprobs_PK
        kl = (logp_PK.exp() * (logp_PK.clamp(min=-100.0) - logq_PK)).sum()
        return (0.5 * hard + 0.5 * kl) / inputs.shape.positions

    return step


def run_online(inputs: Inputs) -> Step:
    """A live teacher of the student's own size, over the whole vocabulary."""
    live = inputs.live_teacher()

    def step() -> Tensor:
        with torch.no_grad():
            teacher_PV = inputs.logits(live)
        return (
            compute_dense_divergence(inputs.logits(), teacher_PV, temperature=1.0)
            / inputs.shape.positions
        )

    return step


def run_liger(inputs: Inputs) -> Step:
    """Liger's chunked loss, beside a live teacher as well."""
    chunked_loss = import_opponent("liger_kernel.chunked_loss", install="pip install liger-kernel")
    live = inputs.live_teacher()
    jsd = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=inputs.model.device.type == "cuda",
    )

    def step() -> Tensor:
        with torch.no_grad():
            theirs = inputs.features(live)
        weights = inputs.model.lm_head.weight, live.lm_head.weight
        found: Tensor = jsd(inputs.features(), weights[0], theirs, weights[1], inputs.labels_P)
        return found

    return step


def run_veomni(inputs: Inputs, chunk_size: int = 1024) -> Step:
    """VeOmni's chunked loss of sparse targets, without a tail; in its own chunks, or in ours."""
    module = import_opponent("chunk_topk_distill", install=VEOMNI)
    logprobs_PK = inputs.logprobs_PK.clamp(min=-100.0)

    def step() -> Tensor:
        logprobs_P, _, divergence_P, _, _ = module.chunk_topk_distill_function(
            inputs.features()[None],
            inputs.model.lm_head.weight,
            inputs.labels_P[None],
            inputs.ids_PK[None],
            logprobs_PK[None],
            chunk_size=chunk_size,
            shift_labels=inputs.labels_P[None],
        )
        loss: Tensor = 0.5 * (divergence_P - logprobs_P).mean()
        return loss

    return step


FUSED = {  # alpha, temperature, whether the sequences lie end to end
    "fused, cross-entropy": (1.0, 1.0, False),
    "fused, T = 1": (0.5, 1.0, False),
    "fused, T = 2": (0.5, 2.0, False),
    "fused, T = 1, end to end": (0.5, 1.0, True),
    "fused, T = 2, end to end": (0.5, 2.0, True),
}
OTHERS: dict[str, Callable[[Inputs], Step]] = {
    "cross-entropy": run_cross_entropy,
    "sparse, dense logits": run_dense_sparse,
    "online": run_online,
    "liger": run_liger,
    "veomni": run_veomni,
    "veomni, chunks of 64": partial(run_veomni, chunk_size=64),
}
WAYS = ("cross-entropy", *FUSED, *list(OTHERS)[1:])


def build_step(model: PreTrainedModel, shape: Shape, way: str, chunk_size: int | None) -> Step:
    """Return the forward pass of one way, up to its loss. Raises UnavailableError when an opponent is not installed."""
    inputs = Inputs(model, shape)
    if way in FUSED:
        return run_fused(inputs, *FUSED[way], chunk_size)
    return OTHERS[way](inputs)
