"""The teacher's distributions as the losses take them: kept tokens of one position after another, and tail masses.

The rows of several teachers are joined: N are the tokens that any of them keeps, and each has its own logprobs, -inf
where it does not keep a token, and its own tail. Where nothing is outside the kept tokens (`Mix.is_whole`), the mixture
of the tempered distributions, sum_m w_m p_m, is one distribution. Elsewhere it is not known, since a tail's mass is not
that of single tokens; but KL(p || q) is linear in p but for a constant: sum_m w_m KL(p_m || q) is KL(mixture || q) plus
what the teachers differ by (their Jensen-Shannon divergence), and has its gradient.

Legend: P positions, C positions of a chunk, V vocabulary, N kept tokens of all positions, M teachers.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from retort.losses.terms import MIN_LOG_MASS


@dataclass(frozen=True)
class Mix:
    """How several teachers are mixed: their shares, which sum to 1, and whether no mass is outside the kept tokens."""

    weights: tuple[float, ...]
    is_whole: bool


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's distributions at P positions.

    offsets int64 [P + 1]: position p has the kept tokens offsets[p] to offsets[p + 1] of ids int64 [N] and logprobs
    float32 [N], at temperature 1; tail_logprobs float32 [P]: log of the mass of all other tokens, at the temperature
    of training (of a batch whose temperature is chosen later, [P, temperatures], see `at`). host_offsets: the offsets
    in host memory, where the others are on a device. mix: of M teachers, whose logprobs are [M, N] and tails [M, P].
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor
    tail_logprobs: Tensor
    host_offsets: Tensor | None = None
    mix: Mix | None = field(default=None, kw_only=True)

    def to(self, device: torch.device, non_blocking: bool = False) -> "TeacherRows":
        """Return a copy on a device; accelerate calls this when it moves a batch."""
        columns = (t.to(device, non_blocking=non_blocking) for t in self._columns())
        moved = TeacherRows(*columns)
        return replace(moved, host_offsets=self._find_host_offsets(), mix=self.mix)

    def pin_memory(self) -> "TeacherRows":
        """Return a copy in pinned memory; the DataLoader calls this, so that `to` can run in the background."""
        return replace(TeacherRows(*(t.pin_memory() for t in self._columns())), mix=self.mix)

    def find_firsts(self, positions: list[int]) -> list[int]:
        """Return where the kept tokens of some positions begin; a GPU is not waited for."""
        found: list[int] = self._find_host_offsets()[torch.tensor(positions)].tolist()
        return found

    def at(self, column: int) -> "TeacherRows":
        """Return the rows at one of the temperatures of their tails."""
        return replace(self, tail_logprobs=self.tail_logprobs[..., column].contiguous())

    def spread(self, values_P: Tensor) -> Tensor:
        """Return each position's value at its kept tokens [N]."""
        return values_P.repeat_interleave(self.offsets.diff(), output_size=len(self.ids))

    def _find_host_offsets(self) -> Tensor:
        return self.offsets if self.host_offsets is None else self.host_offsets

    def _columns(self) -> tuple[Tensor, ...]:
        return self.offsets, self.ids, self.logprobs, self.tail_logprobs


class RowsPiece(NamedTuple):
    """Some rows of a chunk: which they are, their kept tokens, and these tokens' indices in the piece's flat logits."""

    rows: slice
    tokens: slice
    indices: Tensor


class ChunkRows:
    """The teacher's rows of one chunk, beside its logits [C, V].

    rows_N int64: the chunk's row of each kept token; flat_N int64: its index in the flattened logits [C * V];
    logprobs_N and tail_C float32: of the kept tokens and of the tails; of several teachers [M, N] and [M, C].
    """

    def __init__(self, teacher: TeacherRows, vocabulary: int) -> None:
        self.offsets, self.vocabulary = teacher.offsets, vocabulary
        self.host_offsets = teacher._find_host_offsets()
        rows_C = torch.arange(len(teacher.offsets) - 1, device=teacher.ids.device)
        self.rows_N = teacher.spread(rows_C)
        self.flat_N = self.rows_N * vocabulary + teacher.ids
        self.logprobs_N, self.tail_C = teacher.logprobs, teacher.tail_logprobs
        self.mix = teacher.mix

    def split_members(self) -> Iterator[tuple[float, "ChunkRows"]]:
        """Yield each teacher's weight and its own rows, over the kept tokens of all."""
        assert self.mix is not None
        for i, weight in enumerate(self.mix.weights):
            member = copy(self)
            member.logprobs_N, member.tail_C, member.mix = self.logprobs_N[i], self.tail_C[i], None
            yield weight, member

    def cut(self, num_pieces: int) -> list[RowsPiece]:
        """Return pieces of about equal size, fewer where they would be of one row: torch adds a single row up in
        another order, and a student's last bits would change with the number of pieces."""
        num_rows = len(self.offsets) - 1
        num_pieces = max(1, min(num_pieces, num_rows // 2))
        bounds = [num_rows * i // num_pieces for i in range(num_pieces + 1)]
        firsts: list[int] = self.host_offsets[torch.tensor(bounds)].tolist()
        pieces = []
        for rows, tokens in zip(pairwise(bounds), pairwise(firsts), strict=True):
            flat_N = self.flat_N[slice(*tokens)] - rows[0] * self.vocabulary
            pieces.append(RowsPiece(slice(*rows), slice(*tokens), flat_N))
        return pieces

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
    firsts, host_offsets = teacher.find_firsts(bounds), teacher._find_host_offsets()
    for i, (first, stop) in enumerate(pairwise(bounds)):
        tokens = slice(firsts[i], firsts[i + 1])
        rows = TeacherRows(
            teacher.offsets[first : stop + 1] - firsts[i],
            teacher.ids[tokens],
            teacher.logprobs[..., tokens],
            teacher.tail_logprobs[..., first:stop],
            host_offsets[first : stop + 1] - firsts[i],
            mix=teacher.mix,
        )
        yield ChunkRows(rows, vocabulary)


def temper_rows(teacher: TeacherRows, temperature: float) -> TeacherRows:
    """Return the rows with the kept tokens' logprobs at temperature T; the tail's are at T already.

    At T, a kept token's probability is proportional to p^(1/T), and all of them sum to one minus the tail. Of several
    teachers that are whole, the rows of their mixture are returned, as those of one.
    """
    if teacher.mix is not None:
        return _temper_members(teacher, teacher.mix, temperature)
    scaled_N = teacher.logprobs.float() / temperature
    max_P = _reduce(scaled_N, teacher.offsets, "max")
    shifted_N = scaled_N - teacher.spread(max_P)
    sum_P = _reduce(shifted_N.exp(), teacher.offsets, "sum")
    tail_P = teacher.tail_logprobs.float()
    log_scale_P = log1mexp(tail_P.clamp(max=-1e-7)) - sum_P.log()
    logprobs_N = shifted_N + teacher.spread(log_scale_P)
    return replace(teacher, logprobs=logprobs_N, tail_logprobs=tail_P.clamp(min=MIN_LOG_MASS))


def _temper_members(teacher: TeacherRows, mix: Mix, temperature: float) -> TeacherRows:
    columns = zip(teacher.logprobs, teacher.tail_logprobs, strict=True)
    members = [
        temper_rows(replace(teacher, logprobs=kept, tail_logprobs=tail, mix=None), temperature)
        for kept, tail in columns
    ]
    kept_MN, tail_MP = (
        torch.stack([getattr(member, name) for member in members])
        for name in ("logprobs", "tail_logprobs")
    )
    if not mix.is_whole:
        return replace(teacher, logprobs=kept_MN, tail_logprobs=tail_MP)
    shares_M1 = kept_MN.new_tensor(mix.weights).log()[:, None]
    kept_N, tail_P = ((logs + shares_M1).logsumexp(dim=0) for logs in (kept_MN, tail_MP))
    return replace(teacher, logprobs=kept_N, tail_logprobs=tail_P, mix=None)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, elementwise (Maechler, Accurately Computing log(1 - exp(-|a|)), 2012)."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _reduce(values_N: Tensor, offsets: Tensor, how: str) -> Tensor:
    """Return the sum or the max [P] of each position's values; the order of addition is fixed."""
    return torch.segment_reduce(
        values_N, how, offsets=offsets, initial=0.0 if how == "sum" else None
    )
