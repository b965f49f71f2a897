"""How much of the exact distributions a cache lost.

Legend: P positions, V vocabulary, K most ids kept at any position.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cache.stored import Logprobs, Stored, iterate_chunks

# Where the kept probabilities sum to 1 or more, the tail's mass is this: what DistillKit's loss clamps it to.
MIN_TAIL = 1e-8
_TINY = 1e-300  # keeps logarithms of underflowed probabilities finite


@dataclasses.dataclass(frozen=True)
class Exact:
    """Sums over the whole vocabulary that all metrics need, each float64 [P]."""

    logprobs: Logprobs  # [P, V]
    log_spread: NDArray[np.float64]  # [V], log of the unigram by which a tail is spread
    negative_entropy: NDArray[np.float64]  # sum of p log p
    spread_term: NDArray[np.float64]  # sum of p log_spread
    sum_of_squares: NDArray[np.float64]  # sum of p squared


def sum_exact(logprobs_PV: Logprobs, unigram_counts_V: NDArray[np.int64]) -> Exact:
    """Read all distributions once. A tail is spread by the unigram counts plus 1, so every id has a share."""
    spread = unigram_counts_V + 1.0
    log_spread = np.log(spread / spread.sum())
    log_spread_V = torch.from_numpy(log_spread)
    columns: list[list[torch.Tensor]] = [[], [], []]
    for chunk in iterate_chunks(logprobs_PV):
        chunk = chunk.double()
        probs = chunk.exp()
        columns[0].append(torch.nan_to_num(probs * chunk).sum(dim=-1))  # 0 log 0 = 0
        columns[1].append(probs @ log_spread_V)
        columns[2].append(probs.square().sum(dim=-1))
    sums = [torch.cat(c).numpy() for c in columns]
    return Exact(logprobs_PV, log_spread, sums[0], sums[1], sums[2])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A Stored beside the exact distributions, on its kept ids S and one tail bucket; all float64."""

    kept: NDArray[np.bool_]  # [P, K]
    exact: NDArray[np.float64]  # [P, K] probabilities
    exact_tail: NDArray[np.float64]  # [P]
    stored: NDArray[np.float64]  # [P, K], divided by what they and the tail sum to
    stored_tail: NDArray[np.float64]  # [P]
    raw: NDArray[np.float64]  # [P, K], as stored

    def sum_kept(self, values_PK: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return each position's sum over its kept ids, [P]."""
        sums_P: NDArray[np.float64] = np.where(self.kept, values_PK, 0).sum(axis=1)
        return sums_P


def compare(exact: Exact, stored: Stored) -> Comparison:
    """Gather what the metrics compare. A tail that is not stored is 1 minus the kept, at least MIN_TAIL."""
    kept = stored.ids >= 0
    rows = np.arange(len(stored.ids))[:, None]
    logprobs_PK = exact.logprobs[rows, np.maximum(stored.ids, 0)].astype(np.float64)
    exact_PK = np.where(kept, np.exp(logprobs_PK), 0)
    raw_PK = np.where(kept, np.exp(stored.logprobs.astype(np.float64)), 0)
    if stored.tail_logprobs is None:
        tail_P = np.maximum(1 - raw_PK.sum(axis=1), MIN_TAIL)
    else:
        tail_P = np.maximum(np.exp(stored.tail_logprobs.astype(np.float64)), MIN_TAIL)
    total_P = raw_PK.sum(axis=1) + tail_P
    exact_tail_P = np.maximum(1 - exact_PK.sum(axis=1), 0)
    return Comparison(
        kept, exact_PK, exact_tail_P, raw_PK / total_P[:, None], tail_P / total_P, raw_PK
    )


def compute_head_kl(compared: Comparison) -> NDArray[np.float64]:
    """KL(exact || stored) over the kept ids and one bucket for the rest, nats [P]: what quantising alone costs."""
    head = compared.sum_kept(compared.exact * log_ratio(compared.exact, compared.stored))
    return head + compared.exact_tail * log_ratio(compared.exact_tail, compared.stored_tail)


def compute_shape_kl(compared: Comparison) -> NDArray[np.float64]:
    """KL(exact || stored) over the kept ids alone, both made to sum to 1, nats [P].

    What is lost of the head however a reader treats the rest: fair to formats that store no tail.
    """
    exact = compared.exact / compared.exact.sum(axis=1, keepdims=True)
    stored = compared.raw / compared.raw.sum(axis=1, keepdims=True)
    return compared.sum_kept(exact * log_ratio(exact, stored))


def compute_full_kl(exact: Exact, stored: Stored, compared: Comparison) -> NDArray[np.float64]:
    """KL(exact || stored) over the whole vocabulary, nats [P], the tail spread in proportion to the unigram counts."""
    log_spread_PK = exact.log_spread[np.maximum(stored.ids, 0)]
    spread_left = np.log1p(-compared.sum_kept(np.exp(log_spread_PK)))
    log_stored_PK = np.log(np.maximum(compared.stored, _TINY))
    cross_head = compared.sum_kept(compared.exact * log_stored_PK)
    spread_tail = exact.spread_term - compared.sum_kept(compared.exact * log_spread_PK)
    cross_tail = spread_tail + compared.exact_tail * (np.log(compared.stored_tail) - spread_left)
    kl_P: NDArray[np.float64] = exact.negative_entropy - cross_head - cross_tail
    return kl_P


def compute_squared_error(exact: Exact, compared: Comparison) -> NDArray[np.float64]:
    """Sum over the vocabulary of (stored - exact) squared [P], 0 where nothing is stored.

    The squared norm of the error of the gradient with respect to the student's logits. Of an unbiased cache its mean
    is the variance; RS-KD's is (1 - sum of p squared) / N.
    """
    difference_PK = (compared.raw - compared.exact) ** 2 - compared.exact**2
    return exact.sum_of_squares + compared.sum_kept(difference_PK)


def log_ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(a / b), 0 where a is 0; finite where b underflowed."""
    return np.where(a > 0, np.log(np.maximum(a, _TINY)) - np.log(np.maximum(b, _TINY)), 0)


def measure(exact: Exact, stored: Stored) -> dict[str, float]:
    """Return the row of the table: means over positions.

    bytes: of a position, ids included. ids: kept at a position. head_kl, shape_kl, full_kl in nats. squared_error: see
    compute_squared_error. above_one: the share of positions whose kept probabilities sum to more than 1.001. An
    unbiased cache has no tail: its KLs are not defined, and are left out.
    """
    compared = compare(exact, stored)
    row = {
        "bytes": stored.bytes_per_position,
        "ids": compared.kept.sum(axis=1).mean(),
        "squared_error": compute_squared_error(exact, compared).mean(),
        "above_one": (compared.raw.sum(axis=1) > 1.001).mean(),
    }
    if not stored.unbiased:
        row["head_kl"] = compute_head_kl(compared).mean()
        row["shape_kl"] = compute_shape_kl(compared).mean()
        row["full_kl"] = compute_full_kl(exact, stored, compared).mean()
    return {name: float(value) for name, value in row.items()}
