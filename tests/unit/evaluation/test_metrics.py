"""What is measured at positions, against float64 sums written out token by token; and in how much memory."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from retort.evaluation.metrics import compare, measure_model


def draw_logprobs(width: int, *, seed: int, masked: int = 0, scale: float = 3.0) -> Tensor:
    """Logprobs [12, width]; the last `masked` tokens have probability exp(-30), as one that a teacher does not have."""
    logits = scale * torch.randn(12, width, generator=torch.Generator().manual_seed(seed))
    logits[:, width - masked :] = -torch.inf
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.masked_fill(logprobs == -torch.inf, -30.0)


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def best(row: list[float], count: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda v: -row[v])[:count])


@given(st.integers(2, 60), st.integers(0, 1000), st.data())
def test_comparisons_are_those_of_sums_written_out(width: int, seed: int, data: Any) -> None:
    masked = data.draw(st.integers(0, width - 1))
    logp, logq = draw_logprobs(width, seed=seed, masked=masked), draw_logprobs(width, seed=seed + 1)
    found = {name: values.double().tolist() for name, values in compare(logp, logq).items()}
    for row in range(len(logp)):
        p, q = logp[row].double().exp().tolist(), logq[row].double().exp().tolist()
        k = min(10, width)
        assert found["kl_to_teacher"][row] == pytest.approx(kl(p, q), abs=1e-5)
        assert found["reverse_kl"][row] == pytest.approx(kl(q, p), rel=1e-5, abs=1e-5)
        assert found["acceptance"][row] == pytest.approx(sum(map(min, p, q)), abs=1e-6)
        assert found["agreement"][row] == float(best(p, 1) == best(q, 1))
        if width - masked >= k:  # else zeros are tied
            assert found["overlap"][row] == pytest.approx(len(best(p, k) & best(q, k)) / k)


@given(st.integers(2, 60), st.integers(0, 1000))
def test_a_models_own_measures_are_those_of_sums_written_out(width: int, seed: int) -> None:
    logq = draw_logprobs(width, seed=seed)
    targets = torch.randint(width, (12,), generator=torch.Generator().manual_seed(seed))
    found = {
        name: values.double().tolist() for name, values in measure_model(logq, targets).items()
    }
    for row, target in enumerate(targets.tolist()):
        q = logq[row].double().exp().tolist()
        assert found["loss"][row] == pytest.approx(-math.log(q[target]), abs=1e-5)
        assert found["entropy"][row] == pytest.approx(-sum(x * math.log(x) for x in q), abs=1e-5)
        assert found["confidence"][row] == pytest.approx(max(q), abs=1e-6)
        assert found["accuracy"][row] == float(q[target] == max(q))


@pytest.mark.parametrize(("teacher", "student"), [(40, 30), (30, 40)])
def test_layers_of_two_widths_are_compared_over_the_students(teacher: int, student: int) -> None:
    logp = draw_logprobs(teacher, seed=0, masked=max(0, teacher - 25))
    logq = draw_logprobs(student, seed=1)
    same = torch.full((12, student), -30.0)
    same[:, : min(teacher, student)] = logp[:, :student]
    for name, values in compare(same, logq).items():
        assert torch.equal(compare(logp, logq)[name], values), name


def test_of_a_model_and_itself_nothing_differs() -> None:
    logp = draw_logprobs(50, seed=2)
    found = compare(logp, logp.clone())
    assert found["kl_to_teacher"].abs().max() == found["reverse_kl"].abs().max() == 0
    assert found["agreement"].all() and (found["overlap"] == 1).all()
    assert found["acceptance"].numpy() == pytest.approx(1, abs=1e-6)


def test_acceptance_is_what_speculative_sampling_accepts() -> None:
    """The procedure itself: a token x of q is kept with probability min(1, p(x) / q(x))."""
    p, q = (draw_logprobs(8, seed=s, scale=1.0)[0].double().exp().numpy() for s in (5, 6))
    chance = np.random.default_rng(0)
    drafted = chance.choice(8, size=200_000, p=q / q.sum())
    kept = chance.random(200_000) < p[drafted] / q[drafted]
    expected = float(
        compare(*(torch.from_numpy(np.log(x))[None].float() for x in (p, q)))["acceptance"]
    )
    assert kept.mean() == pytest.approx(expected, abs=0.005)


def test_kl_is_known_where_it_has_a_formula() -> None:
    """Of two geometric distributions with ratios a and b: KL = log((1 - a) / (1 - b)) + a / (1 - a) log(a / b)."""
    a, b = 0.5, 0.7
    places = torch.arange(200, dtype=torch.float64)
    logp, logq = (math.log(1 - r) + places * math.log(r) for r in (a, b))
    found = compare(logp[None].float(), logq[None].float())
    assert float(found["kl_to_teacher"]) == pytest.approx(
        math.log((1 - a) / (1 - b)) + a / (1 - a) * math.log(a / b), abs=1e-6
    )
    # Twice the total variation is a sum of differences: sum min(p, q) = 1 - TV.
    tv = 0.5 * float((logp.exp() - logq.exp()).abs().sum())
    assert float(found["acceptance"]) == pytest.approx(1 - tv, abs=1e-6)


MEASURE = """
import sys, torch
from retort.teacher.features import TeacherFeatures
from retort.evaluation.metrics import measure_positions
from retort.models.heads import Head
from retort.models.load import CausalLM
from retort.tokens.sequences import build_table
import numpy as np
from types import SimpleNamespace

torch.set_num_threads(1)
V, D, length = 131072, 8, int(sys.argv[1])
head = Head(torch.randn(V, D))
class Body:  # a body that costs nothing: what is measured is the memory of the distributions
    dtype = torch.float32
    def get_input_embeddings(self): return SimpleNamespace(weight=head.weight)
    base_model = staticmethod(lambda input_ids, **_: SimpleNamespace(
        last_hidden_state=torch.nn.functional.one_hot(input_ids % D, D).float()))
ids = np.random.default_rng(0).integers(0, V, length)
table = build_table([(ids, [True] * (length - 1) + [False], 0, ("", ""))])
features = torch.randn(length - 1, D)
teacher = TeacherFeatures({"val": features}, np.zeros(0, np.int64), Head(torch.randn(V, D)), V, "", "", 1, {})
student = CausalLM(Body(), head, V, is_split=True)
def peak():  # of this process alone, in MB: ru_maxrss begins with the parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
found = measure_positions(student, table, teacher=teacher, batch_size=1)
assert len(found["kl_to_teacher"]) == length - 1
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_at_131072_tokens_whatever_the_positions() -> None:
    def measure(length: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(length)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    few, many = measure(65), measure(257)
    # All logits of one model would take 128 MB, then 512 MB in float32, and there are two models.
    assert many < few + 60 and many < 300, (few, many)
