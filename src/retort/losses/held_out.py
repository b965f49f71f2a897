"""What a student's forward pass measures on held-out text: its loss, and its KL from the teacher's exact distributions.

As the losses, it is computed in the forward pass of the model itself: FSDP gathers weights nowhere else.

Legend: P counted positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from retort.losses.fused_loss import choose_chunk_size
from retort.losses.terms import compute_dense_divergence
from retort.models.heads import Head
from retort.teacher.features import mix_logprobs

_DENSE_COPIES = 4  # of the logits of both models, that their divergence holds at once


class HeldOutSums(NamedTuple):
    """Sums over positions in nats, float64 []: -log q(y), and KL(teacher || student), None without a teacher."""

    loss: Tensor
    kl: Tensor | None


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher at P positions: its features [P, D], and its head; ids from num_tokens on have probability 0."""

    features: Tensor
    head: Head
    num_tokens: int

    def logits(self, rows: slice) -> Tensor:
        """Return the float32 logits of some positions."""
        return self.head.logits(self.features[rows])[:, : self.num_tokens]


@dataclass(frozen=True)
class MixedOutputs:
    """Several teachers at P positions, whose distributions are mixed by weights that sum to 1."""

    members: tuple[TeacherOutputs, ...]
    weights: tuple[float, ...]

    def logits(self, rows: slice) -> Tensor:
        """Return the float32 logprobs of their mixture at some positions."""
        return mix_logprobs([m.logits(rows).log_softmax(-1) for m in self.members], self.weights)


@dataclass(frozen=True)
class HeldOutTargets:
    """What the predictions of a forward pass are compared with, without a gradient.

    counted int64 [P]: indices in [B * T] of the positions; labels int64 [P]: the tokens that they predict.
    """

    counted: Tensor
    labels: Tensor
    teacher: TeacherOutputs | MixedOutputs | None

    def measure(self, features_PD: Tensor, head: Head) -> HeldOutSums:
        """Return the sums from the student's features, in autocast's dtype if it is on, and at temperature 1."""
        device = features_PD.device.type
        weight = head.weight
        if weight is not None and torch.is_autocast_enabled(device):
            head = replace(head, weight=weight.to(torch.get_autocast_dtype(device)))
        width = features_PD.shape[1] if weight is None else len(weight)
        size = choose_chunk_size(width * (_DENSE_COPIES if self.teacher else 1), device)
        with torch.autocast(device, enabled=False):
            found = [
                self._measure_rows(head.logits(features_PD[first : first + size]), first)
                for first in range(0, len(features_PD), size)
            ]
        kls = [kl for _, kl in found if kl is not None]
        zero = torch.zeros((), dtype=torch.float64, device=features_PD.device)
        loss = sum((loss for loss, _ in found), zero)
        return HeldOutSums(loss, sum(kls, zero) if self.teacher else None)

    def _measure_rows(self, logits_PV: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        rows = slice(first, first + len(logits_PV))
        loss = F.cross_entropy(logits_PV, self.labels[rows], reduction="sum").double()
        if self.teacher is None:
            return loss, None
        teacher_PV = self.teacher.logits(rows).to(logits_PV.device)
        return loss, compute_dense_divergence(logits_PV, teacher_PV, temperature=1.0).double()
