"""Attention with a softcap (Gemma 2), which not every implementation of transformers computes, and of packed rows.

Legend: B rows, T positions, H heads, D width of a head.
"""

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

_BY_SEQUENCE = "sdpa_by_sequence"
ON_CPU = ("eager", "sdpa")  # those that are trained on a CPU


def has_softcap(config: PretrainedConfig) -> bool:
    """Return whether a model's attention scores go through a softcap."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def keep_softcap(model: PreTrainedModel) -> None:
    """Let a model whose attention has a softcap (Gemma 2) use eager attention where transformers chose sdpa.

    sdpa leaves the softcap out: some versions of transformers choose it, others refuse it.
    """
    if has_softcap(model.config) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        logger.info(
            f"{type(model).__name__} uses eager attention: its attention has a softcap, which sdpa leaves out. "
            "teacher.attn_implementation flex_attention or flash_attention_2 are faster for a teacher on a GPU."
        )


def set_attention(model: PreTrainedModel, attention: str | None, *, device: str) -> None:
    """Give a model the attention implementation of this name, where the device (cpu or cuda) has it.

    Raises ValueError when transformers refuses it for this model.
    """
    if attention is None or (device == "cpu" and attention not in ON_CPU):
        return
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"training.attn_implementation is {attention!r}, which {type(model).__name__} cannot use: {error}"
        ) from error


def attend_by_sequence(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' sdpa returns, [B, T, H, D], without the work on pairs of different sequences of a row.

    query, key, value [B, H, T, D]. A sequence begins where a position does not see the one before it.
    """
    mask_BTT = None if attention_mask is None else attention_mask[:, 0]
    if mask_BTT is None or not _is_block_mask(mask_BTT):
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return whole
    assert attention_mask is not None
    rows = []
    for b, sees_previous in enumerate(mask_BTT.diagonal(-1, 1, 2).unbind()):
        firsts = [0, *((~sees_previous).nonzero()[:, 0] + 1).tolist(), query.shape[2]]
        found = []
        for first, stop in pairwise(firsts):
            row, own = slice(b, b + 1), slice(first, stop)
            parts = (t[row, :, own] for t in (query, key, value))
            mask = attention_mask[row, :, own, own]
            found.append(sdpa_attention_forward(module, *parts, mask, **options)[0])
        rows.append(torch.cat(found, dim=1))
    return torch.cat(rows), None


def _is_block_mask(mask_BTT: Tensor) -> bool:
    """Say whether every position sees itself, as in packed rows, and not in padded ones."""
    if mask_BTT.dtype != torch.bool or mask_BTT.shape[1] != mask_BTT.shape[2]:
        return False
    return bool(mask_BTT.diagonal(0, 1, 2).all())


def split_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is sdpa attend to packed sequences one by one; others stay as they are.

    For CPUs alone: finding where sequences begin makes the host wait for a GPU.
    """
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(_BY_SEQUENCE, attend_by_sequence)
    AttentionMaskInterface.register(_BY_SEQUENCE, sdpa_mask)
    model.set_attn_implementation(_BY_SEQUENCE)


def join_attention(model: PreTrainedModel) -> None:
    """Undo `split_attention`."""
    if model.config._attn_implementation == _BY_SEQUENCE:
        model.set_attn_implementation("sdpa")
