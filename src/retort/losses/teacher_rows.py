"""The teacher's distributions as the losses take them: kept tokens of one position after another, and tail masses.

Legend: P positions, C positions of a chunk, V vocabulary, N kept tokens of all positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from retort.losses.terms import MIN_LOG_MASS


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's distributions at P positions.

    offsets int64 [P + 1]: position p has the kept tokens offsets[p] to offsets[p + 1] of ids int64 [N] and logprobs
    float32 [N], at temperature 1; tail_logprobs float32 [P]: log of the mass of all other tokens, at the temperature
    of training. host_offsets: the offsets in host memory, where the others are on a device.
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    tail_logprobs: Tensor
    host_offsets: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "TeacherRows":
        """Return a copy on a device; accelerate calls this when it moves a batch."""
        columns = (t.to(device, non_blocking=non_blocking) for t in self._columns())
        return replace(TeacherRows(*columns), host_offsets=self._find_host_offsets())

    def pin_memory(self) -> "TeacherRows":
        """Return a copy in pinned memory; the DataLoader calls this, so that `to` can run in the background."""
        return TeacherRows(*(t.pin_memory() for t in self._columns()))

    def find_firsts(self, positions: list[int]) -> list[int]:
        """Return where the kept tokens of some positions begin; a GPU is not waited for."""
        found: list[int] = self._find_host_offsets()[torch.tensor(positions)].tolist()
        return found

    def spread(self, values_P: Tensor) -> Tensor:
        """Return each position's value at its kept tokens [N]."""
        return values_P.repeat_interleave(self.offsets.diff(), output_size=len(self.ids))

    def _find_host_offsets(self) -> Tensor:
        return self.offsets if self.host_offsets is None else self.host_offsets

    def _columns(self) -> tuple[Tensor, ...]:
        return self.offsets, self.ids, self.logprobs, self.tail_logprobs


class ChunkRows:
    """The teacher's rows of one chunk, beside its logits [C, V].

    rows_N int64: the chunk's row of each kept token; flat_N int64: its index in the flattened logits [C * V];
    logprobs_N and tail_C float32: of the kept tokens and of the tails.
    """

    def __init__(self, teacher: TeacherRows, vocabulary: int) -> None:
        self.offsets = teacher.offsets
        rows_C = torch.arange(len(teacher.tail_logprobs), device=teacher.ids.device)
        self.rows_N = teacher.spread(rows_C)
        self.flat_N = self.rows_N * vocabulary + teacher.ids
        self.logprobs_N, self.tail_C = teacher.logprobs, teacher.tail_logprobs

    def sum_rows(self, values_N: Tensor) -> Tensor:
        """Return the sum [C] of each row's values."""
        return _reduce(values_N, self.offsets, "sum")


def split_rows(
    teacher: TeacherRows | None, bounds: list[int], vocabulary: int
) -> Iterator[ChunkRows | None]:
    """Yield each chunk's rows, or None without a teacher; `bounds`: where each chunk begins, and the last one's end."""
    if teacher is None:
        yield from [None] * (len(bounds) - 1)
        return
    firsts = teacher.find_firsts(bounds)
    for i, (first, stop) in enumerate(pairwise(bounds)):
        tokens = slice(firsts[i], firsts[i + 1])
        rows = TeacherRows(
            teacher.offsets[first : stop + 1] - firsts[i],
            teacher.ids[tokens],
            teacher.logprobs[tokens],
            teacher.tail_logprobs[first:stop],
        )
        yield ChunkRows(rows, vocabulary)


def temper_rows(teacher: TeacherRows, temperature: float) -> TeacherRows:
    """Return the rows with the kept tokens' logprobs at temperature T; the tail's are at T already.

    At T, a kept token's probability is proportional to p^(1/T), and all of them sum to one minus the tail.
    """
    scaled_N = teacher.logprobs.float() / temperature
    max_P = _reduce(scaled_N, teacher.offsets, "max")
    shifted_N = scaled_N - teacher.spread(max_P)
    sum_P = _reduce(shifted_N.exp(), teacher.offsets, "sum")
    tail_P = teacher.tail_logprobs.float()
    log_scale_P = log1mexp(tail_P.clamp(max=-1e-7)) - sum_P.log()
    logprobs_N = shifted_N + teacher.spread(log_scale_P)
    return replace(teacher, logprobs=logprobs_N, tail_logprobs=tail_P.clamp(min=MIN_LOG_MASS))


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, elementwise (Maechler, Accurately Computing log(1 - exp(-|a|)), 2012)."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _reduce(values_N: Tensor, offsets: Tensor, how: str) -> Tensor:
    """Return the sum or the max [P] of each position's values; the order of addition is fixed."""
    return torch.segment_reduce(
        values_N, how, offsets=offsets, initial=0.0 if how == "sum" else None
    )
