"""A model's head, from hidden states to logits; uses PyTorch only, so that merging need not load transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
            if out is not None and self.weight.dtype == torch.float32:
                logits_PV = torch.mm(features_PD, self.weight.t(), out=out)
                logits_PV = logits_PV if self.bias is None else logits_PV.add_(self.bias)
            else:
                logits_PV = nn.functional.linear(features_PD, self.weight, self.bias)
        if out is None:
            logits_PV = logits_PV.to(torch.float32, copy=self.weight is None)
        elif logits_PV is not out:
            logits_PV = out.copy_(logits_PV)
        if self.scale != 1.0:
            logits_PV.mul_(self.scale)
        if self.softcap is not None:
            logits_PV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_PV
