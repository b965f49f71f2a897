"""The last step of a model, from hidden states to logits; by PyTorch alone, so that merging loads no transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits: `weight` [V, D], with the models' own extras; weight None: already logits."""

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, features_PD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return float32 logits [P, V], the caller's own to change; in `out` where given, memory that was used before.

        No gradient is kept.
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
