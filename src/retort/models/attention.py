"""Attention with a softcap (Gemma 2), which not every implementation of transformers computes, and by sequence.

Legend: B rows, T positions, H heads, D width of a head.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
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
_WINDOWS = ("sliding_window", "attention_chunk_size")  # in transformers' configs and modules


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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return causal attention [B, T, H, D] within each sequence of a row, from query, key, value [B, H, T, D].

    sequence_lengths: of the row (B = 1); None where each row is one sequence. With an attention_mask, as for padding
    on the left, it is transformers' sdpa.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return _attend(module, query, key, value, attention_mask, **options)
    if sequence_lengths is not None and _has_varlen(query, options):
        return _attend_varlen(query, key, value, **options), None
    window = options.get("sliding_window")
    lengths = sequence_lengths or (query.shape[2],)
    if len(set(lengths)) == 1:  # a batch: joined pieces would be a copy of every layer's output
        q, k, v = (
            torch.unflatten(t, 2, (len(lengths), -1)).transpose(1, 2).flatten(0, 1)
            for t in (query, key, value)
        )
        found_BTHD, _ = _attend(module, q, k, v, _make_mask(q, window), **options)
        return found_BTHD.reshape(len(query), -1, *found_BTHD.shape[2:]), None
    pieces = zip(*(torch.split(t, list(lengths), dim=2) for t in (query, key, value)), strict=True)
    found = [
        _attend(module, *piece, _make_mask(piece[0], window), **options)[0] for piece in pieces
    ]
    return torch.cat(found, dim=1), None


def _attend(*args: Any, **options: Any) -> tuple[Tensor, None]:
    found: tuple[Tensor, None] = sdpa_attention_forward(*args, **options)
    return found


def _make_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return which keys [1, 1, T, T] each position sees: itself and the `window` - 1 before it; None means all."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    sees_TT = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return sees_TT.tril_().triu_(1 - window)[None, None]


def _has_varlen(query: Tensor, options: dict[str, Any]) -> bool:
    """Return whether PyTorch's variable-length attention serves: FlashAttention, in half precision, no dropout."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    serves = query.is_cuda and is_half and query.shape[-1] <= 256 and not options.get("dropout")
    return serves and _computes_varlen(query.device)


@cache
def _computes_varlen(device: torch.device) -> bool:
    """Return whether the kernel runs on this device, and gives what sdpa does, with a window and shared keys."""
    lengths, window = (9, 14), 5
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 32, generator=generator).to(device, torch.bfloat16)
        for heads in (4, 2, 2)
    )
    starts = torch.tensor([0, 9, 23], dtype=torch.int32, device=device)
    try:
        found = _attend_varlen(
            query, key, value, cu_seq_lens_q=starts, max_length_q=14, sliding_window=window
        )
    except (RuntimeError, NotImplementedError) as error:
        logger.info(f"sequences are attended to one by one: {error}")
        return False
    pieces = zip(*(torch.split(t, list(lengths), dim=2) for t in (query, key, value)), strict=True)
    expected = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=_make_mask(q, window), enable_gqa=True
        )
        for q, k, v in pieces
    ]
    return torch.allclose(
        found.float(), torch.cat(expected, dim=2).transpose(1, 2).float(), atol=2e-2
    )


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """Return what `attend_by_sequence` does, by one kernel; the bounds as flash attention takes them."""
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    query_THD, key_THD, value_THD = (t[0].transpose(0, 1) for t in (query, key, value))
    found_THD = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found_THD, Tensor)
    return found_THD[None]


def _mask_padding(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
    """Return sdpa's mask where padding is marked, else None: `attend_by_sequence` is told of sequences and windows."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **options)


def split_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is sdpa attend to the sequences of a row one by one; others stay as they are."""
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(_BY_SEQUENCE, attend_by_sequence)
    AttentionMaskInterface.register(_BY_SEQUENCE, _mask_padding)
    model.set_attn_implementation(_BY_SEQUENCE)


def join_attention(model: PreTrainedModel) -> None:
    """Undo `split_attention`."""
    if model.config._attn_implementation == _BY_SEQUENCE:
        model.set_attn_implementation("sdpa")


def is_by_sequence(model: PreTrainedModel) -> bool:
    """Return whether attention takes the bounds of sequences; any other computes all pairs of a row's tokens."""
    name = str(model.config._attn_implementation)
    return name == _BY_SEQUENCE or "flash" in name or name == "flex_attention"


@contextmanager
def narrow_windows(model: PreTrainedModel, size: int) -> Iterator[None]:
    """Let windows and chunks of attention have at most `size` tokens, so that a short probe meets them."""
    holders = [model.config.get_text_config(), *model.modules()]
    found = [(h, n, getattr(h, n, None)) for h in holders for n in _WINDOWS]
    found = [(h, n, value) for h, n, value in found if type(value) is int and value > size]
    for holder, name, _ in found:
        setattr(holder, name, size)
    try:
        yield
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)
