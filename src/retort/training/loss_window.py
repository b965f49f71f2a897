"""Sums of the loss terms between two lines of the log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from retort.cluster.ranks import rank, world_size
from retort.losses.terms import LossTerms, perplexity


class LossWindow:
    """Sums since the last log line, kept on the device: reading them at every step would make the device wait."""

    NAMES = ("total_loss", "hard_loss", "soft_loss", "positions")

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._has_soft = False
        self._taken = 0.0  # positions of earlier windows
        self._since = clock()
        self._step: list[tuple[Tensor, Tensor]] = []  # total and sequences of each forward pass

    def add(
        self, terms: LossTerms, *, positions: int, normalizer: Tensor | int, sequences: Tensor
    ) -> None:
        """Add one forward pass.

        terms: sums over its positions, divided by `normalizer`; positions: their number; sequences [B]: its
        sequences' numbers in the token index.
        """
        zero = torch.zeros_like(terms.total)
        self._has_soft = terms.soft is not None
        losses = torch.stack([terms.total, terms.hard, zero if terms.soft is None else terms.soft])
        self._sums[:3] += losses.detach().double() * normalizer
        self._sums[3] += positions
        self._step.append((terms.total.detach(), sequences))

    def end_step(self) -> list[tuple[float, list[int]]]:
        """Return the total and the sequences of each of the step's forward passes whose total is not finite."""
        step, self._step = self._step, []
        if bool(torch.isfinite(torch.stack([total for total, _ in step])).all()):
            return []
        return [(t.item(), s.tolist()) for t, s in step if not bool(torch.isfinite(t))]

    def gather(self) -> dict[str, float]:
        """Move the sums of all ranks to the first one, and return this rank's. Called by every rank."""
        if world_size() > 1:
            torch.distributed.all_reduce(self._sums)
            if rank() > 0:
                self._sums.zero_()
        return dict(zip(self.NAMES, self._sums.tolist(), strict=True))

    def restore(self, sums: dict[str, float]) -> None:
        """Continue with the sums that a checkpoint holds."""
        if sums and rank() == 0:
            values = [sums[name] for name in self.NAMES]
            self._sums.copy_(torch.tensor(values, dtype=torch.float64))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what is done meanwhile out of the tokens per second."""
        began = self._clock()
        yield
        self._since += self._clock() - began

    @property
    def total_positions(self) -> float:
        """Positions of this attempt and of a restored window, as of the last `gather`."""
        return self._taken + float(self._sums[3])

    def take(self) -> dict[str, float]:
        """Return the means over the window's positions, perplexity and tokens per second; begin a new window."""
        means = self.gather()
        count = max(1.0, means.pop("positions"))
        means = {name: value / count for name, value in means.items()}
        if not self._has_soft:
            del means["soft_loss"]
        now = self._clock()
        rates = {
            "perplexity": perplexity(means["hard_loss"]),
            "tokens_per_second": count / max(1e-9, now - self._since),
        }
        self._taken += float(self._sums[3])
        self._since = now
        self._sums.zero_()
        return means | rates
