"""A model's head, from hidden states to logits; uses PyTorch only, so that merging need not load transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 8192  # that are converted at once on a CPU


def multiply(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return left @ right of two matrices of one dtype, in float32 at least; in `out` if it is given.

    Plain matmul rounds sums of bfloat16 products to bfloat16: logits to 8 bits, 2e-4 to 5e-4 nats of a distribution,
    and half of a teacher's 64 most probable tokens tie with a neighbour.
    """
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    if out is None:
        out = left.new_empty((len(left), right.shape[1]), dtype=torch.float32)
    left = left.float()
    for first in range(0, right.shape[1], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        out[:, columns] = left @ right[:, columns].float()
    return out


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits: softcap(scale * (x weight^T + bias)), weight [V, D], bias [V].

    softcap(z) = softcap tanh(z / softcap), as in Gemma 2. weight None: the features are the logits already.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, features_PD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return float32 logits [P, V] of features [P, D], without a gradient; the caller may change them.

        out: float32 [P, V], where they are stored if given. Any number of leading axes is allowed without it.
        """
        logits_PV: Tensor = features_PD
        if self.weight is not None:
            features_PD = features_PD.to(device=self.weight.device, dtype=self.weight.dtype)
            shape = (*features_PD.shape[:-1], len(self.weight))
            logits_PV = multiply(features_PD.flatten(0, -2), self.weight.t(), out=out).view(shape)
            if self.bias is not None:
                logits_PV.add_(self.bias)
        elif out is None:
            logits_PV = logits_PV.to(torch.float32, copy=True)
        else:
            logits_PV = out.copy_(logits_PV)
        if self.scale != 1.0:
            logits_PV.mul_(self.scale)
        if self.softcap is not None:
            logits_PV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_PV
