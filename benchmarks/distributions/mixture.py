"""The teacher's distributions before the temperature: a GPT, the unigram and n-grams, weighted to fit held-out text.

Legend: P positions, T those of a sequence, V vocabulary.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from benchmarks.distributions.gpt import TinyGPT
from benchmarks.distributions.ngrams import NextTokens, look_up_all


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The weights of a mixture of GPT, unigram and counts.

    p = gpt_weight * gpt + (1 - gpt_weight) * unigram; then, for each kind of context, from short to long,
    p = (counts + m * p) / (num_counts + m), the Dirichlet smoothing of MacKay and Peto (1995). The last two kinds are
    contexts of 1 and 3 tokens of the sequence itself.
    """

    gpt_weight: float
    strengths: tuple[float, ...]  # m


def mix(
    mixture: Mixture,
    gpt_TV: NDArray[np.float32],
    unigram_V: NDArray[np.float64],
    kinds: list[list[NDArray[np.int32]]],
) -> NDArray[np.float32]:
    """Return the mixture's distributions [T, V]."""
    mixed = np.empty_like(gpt_TV)
    for t in range(len(gpt_TV)):
        gpt_V = gpt_TV[t].astype(np.float64)
        row = mixture.gpt_weight * gpt_V + (1 - mixture.gpt_weight) * unigram_V
        for followers, strength in zip((kind[t] for kind in kinds), mixture.strengths, strict=True):
            if len(followers) > 1000:
                counts_V = np.bincount(followers, minlength=len(row))
                row = (counts_V + strength * row) / (len(followers) + strength)
            elif len(followers):
                row *= strength / (len(followers) + strength)
                np.add.at(row, followers, 1 / (len(followers) + strength))
        mixed[t] = row
    return mixed


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What each part says of the token that did follow, at P positions: enough to compute any mixture's loss."""

    gpt: NDArray[np.float64]  # [P] probabilities
    unigram: NDArray[np.float64]  # [P]
    counts: NDArray[np.int64]  # [kinds, P], how often it followed that context
    totals: NDArray[np.int64]  # [kinds, P], how often that context occurred


def gather_evidence(
    model: TinyGPT,
    indexes: list[NextTokens],
    unigram_V: NDArray[np.float64],
    sequences: NDArray[np.int32],
) -> Evidence:
    """Return the evidence of held-out sequences, int32 [S, T + 1]."""
    gpt, counts, totals = [], [], []
    for sequence in sequences:
        targets = sequence[1:]
        kinds = look_up_all(indexes, sequence[:-1])
        gpt.append(model.compute_probs(sequence[:-1])[np.arange(len(targets)), targets])
        totals.append([[len(f) for f in kind] for kind in kinds])
        counts.append(
            [
                [np.count_nonzero(f == x) for f, x in zip(kind, targets, strict=True)]
                for kind in kinds
            ]
        )
    return Evidence(
        np.concatenate(gpt).astype(np.float64),
        unigram_V[sequences[:, 1:].reshape(-1)],
        np.concatenate(counts, axis=1),
        np.concatenate(totals, axis=1),
    )


def compute_loss(mixture: Mixture, evidence: Evidence) -> float:
    """Return the mixture's mean loss in nats."""
    p = mixture.gpt_weight * evidence.gpt + (1 - mixture.gpt_weight) * evidence.unigram
    for count, total, strength in zip(
        evidence.counts, evidence.totals, mixture.strengths, strict=True
    ):
        p = (count + strength * p) / (total + strength)
    return float(-np.log(p).mean())


def fit_mixture(evidence: Evidence) -> Mixture:
    """Return the weights with the least loss: coordinate descent over a grid, four rounds."""

    def loss(mixture: Mixture) -> float:
        return compute_loss(mixture, evidence)

    weights = np.linspace(0.05, 0.999, 40).tolist()
    unused = 1e9  # so strong a prior that the context does not count
    strengths = (*np.geomspace(0.3, 30_000, 60).tolist(), unused)
    best = Mixture(0.9, (10.0,) * len(evidence.counts))
    for _ in range(4):
        best = min((dataclasses.replace(best, gpt_weight=w) for w in weights), key=loss)
        for k in range(len(best.strengths)):
            before, after = best.strengths[:k], best.strengths[k + 1 :]
            best = min(
                (Mixture(best.gpt_weight, (*before, m, *after)) for m in strengths), key=loss
            )
    return best
