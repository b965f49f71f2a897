"""Random log-probabilities, and the metrics of them as sums written out token by token in float64."""

import math

import pytest
import torch
from torch import Tensor

from retort.evaluation.metrics import compare_distributions, measure_model


def make_logprobs(width: int, *, seed: int, masked: int = 0, scale: float = 3.0) -> Tensor:
    """Return logprobs [12, width]; the last `masked` tokens have logprob -30, like tokens that a teacher lacks."""
    logits = scale * torch.randn(12, width, generator=torch.Generator().manual_seed(seed))
    logits[:, width - masked :] = -torch.inf
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.masked_fill(logprobs == -torch.inf, -30.0)


def _kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def _best(row: list[float], count: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda v: -row[v])[:count])


def check_comparison(width: int, seed: int, masked: int) -> None:
    """Compare `compare_distributions` with sums written out."""
    logp, logq = make_logprobs(width, seed=seed, masked=masked), make_logprobs(width, seed=seed + 1)
    found = {k: values.double().tolist() for k, values in compare_distributions(logp, logq).items()}
    for row in range(len(logp)):
        p, q = logp[row].double().exp().tolist(), logq[row].double().exp().tolist()
        k = min(10, width)
        assert found["kl_to_teacher"][row] == pytest.approx(_kl(p, q), abs=1e-5)
        assert found["reverse_kl"][row] == pytest.approx(_kl(q, p), rel=1e-5, abs=1e-5)
        assert found["acceptance"][row] == pytest.approx(sum(map(min, p, q)), abs=1e-6)
        assert found["agreement"][row] == float(_best(p, 1) == _best(q, 1))
        if width - masked >= k:  # else zeros are tied
            assert found["overlap"][row] == pytest.approx(len(_best(p, k) & _best(q, k)) / k)


def check_own_metrics(width: int, seed: int) -> None:
    """Compare `measure_model` with sums written out."""
    logq = make_logprobs(width, seed=seed)
    targets = torch.randint(width, (12,), generator=torch.Generator().manual_seed(seed))
    found = {k: values.double().tolist() for k, values in measure_model(logq, targets).items()}
    for row, target in enumerate(targets.tolist()):
        q = logq[row].double().exp().tolist()
        assert found["loss"][row] == pytest.approx(-math.log(q[target]), abs=1e-5)
        assert found["entropy"][row] == pytest.approx(-sum(x * math.log(x) for x in q), abs=1e-5)
        assert found["confidence"][row] == pytest.approx(max(q), abs=1e-6)
        assert found["accuracy"][row] == float(q[target] == max(q))
