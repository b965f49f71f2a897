"""Packing: several sequences in one row, told apart by position ids that begin again at each of them.

From such position ids transformers derives which tokens attend to each other: as a block mask, or as the bounds that
variable-length attention (flash_attention_2) takes. Where all sequences of a batch are in one row, we give the bounds.
Where state or attention crosses sequences all the same (ALiBi, Mamba, convolutions), a probe finds it.

Legend: B rows, T positions, N tokens of all sequences in a row.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from retort.models.attention import is_by_sequence, narrow_windows
from retort.models.causal_lm import (
    SPLIT_TOLERANCE,
    CausalLM,
    RowBounds,
    UnmaskedError,
    choose_tolerance,
    evaluating,
    read_unmasked,
    relative_error,
)

logger = logging.getLogger(__name__)

# Largest effect of a sequence on the features of the next one, in any dtype: 0 where a mask is between them, since a
# masked key has a weight of exactly 0; 1e-4 in the mildest random hybrid (LFM2). What a model reads alone and in a row
# differs by rounding, in bfloat16 by more than Jamba, LFM2 and Falcon-H1 leak.
_LEAK_TOLERANCE = 1e-6
_NUM_TOKENS, _NUM_ROWS = 16, 4  # of a sequence and of the batch in the probe


def number_positions(lengths: Iterable[int]) -> Tensor:
    """Return the position ids int64 [N] of sequences in one row; padding at its end counts as a sequence too."""
    return torch.cat([torch.arange(length) for length in lengths])


@torch.inference_mode()
def find_packing_fault(split: CausalLM, *, at_once: bool = False) -> str | None:
    """Return why a model cannot read two sequences in one row, as in the same two rows; None if it can.

    at_once: whether it reads several such rows at once, told apart by position ids alone.
    """

    def read(packed_BT: Tensor) -> Tensor:
        positions_BT = number_positions([_NUM_TOKENS] * 2).to(split.device).expand_as(packed_BT)
        pieces = [slice(None)] if at_once else [slice(b, b + 1) for b in range(_NUM_ROWS)]
        return torch.cat([read_unmasked(split, packed_BT[p], positions_BT[p]) for p in pieces])

    return _find_fault(split, read)


@torch.inference_mode()
def find_joining_fault(split: CausalLM) -> str | None:
    """Return why a model cannot read all sequences of a batch end to end in one row; None if it can."""
    if not is_by_sequence(split.model):
        name, used = type(split.model).__name__, split.model.config._attn_implementation
        return f"{name} uses {used} attention, which computes all pairs of a row's tokens"

    def read(packed_BT: Tensor) -> Tensor:
        bounds = RowBounds.of([_NUM_TOKENS] * (2 * _NUM_ROWS)).to(split.device)
        positions_1N = number_positions(bounds.lengths).to(split.device)[None]
        found = read_unmasked(split, packed_BT.reshape(1, -1), positions_1N, bounds)
        return found.view(*packed_BT.shape, -1)

    with narrow_windows(split.model, _NUM_TOKENS // 2):
        return _find_fault(split, read)


def _find_fault(split: CausalLM, read: Callable[[Tensor], Tensor]) -> str | None:
    """Return what is wrong with the features [B, T, D] that are read of rows [B, T] of two sequences each."""
    ids_BT = torch.arange(_NUM_ROWS * _NUM_TOKENS, device=split.device).view(_NUM_ROWS, -1) + 1
    second_BT = ids_BT[:1].flip(1).expand(_NUM_ROWS, -1)  # the same behind every first one
    packed_BT = torch.cat([ids_BT, second_BT], dim=1) % split.vocabulary
    name = type(split.model).__name__
    with evaluating(split.model):
        try:
            found_BTD = read(packed_BT)
        except UnmaskedError as refusal:
            return f"{name} takes no packed sequences ({refusal})"
        alone_BT = packed_BT[0].view(2, _NUM_TOKENS)
        alone_BTD = split.features(alone_BT, torch.ones_like(alone_BT)).float()
    seconds_BTD = found_BTD[:, _NUM_TOKENS:]
    leak = float(relative_error(seconds_BTD[1:], seconds_BTD[:1], scale=found_BTD))
    error = float(relative_error(found_BTD[0], alone_BTD.flatten(0, 1)))
    if leak > _LEAK_TOLERANCE:
        return f"in {name} packed sequences see each other (one changes the next by {leak:.0e} of the largest feature)"
    if not error <= choose_tolerance(split.model, SPLIT_TOLERANCE):
        return f"{name} reads packed sequences otherwise than alone (by {error:.0e} of the largest feature)"
    return None


def can_pack(teacher: CausalLM) -> bool:
    """Say whether the teacher can read several sequences in one row, and log it if it cannot."""
    fault = find_packing_fault(teacher)
    if fault is not None:
        logger.debug(f"{fault}: they are padded instead.")
    return fault is None
