"""Metrics at positions, against sums written out token by token in float64; and their memory."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from retort.evaluation.metrics import compare_distributions
from support.logprobs import check_comparison, check_own_metrics, make_logprobs


@pytest.mark.parametrize(
    ("width", "seed", "masked"), [(2, 0, 1), (9, 1, 0), (40, 2, 5), (60, 3, 0)]
)
def test_comparisons_are_those_of_sums_written_out(width: int, seed: int, masked: int) -> None:
    check_comparison(width, seed, masked)


@pytest.mark.parametrize(("width", "seed"), [(2, 0), (60, 1)])
def test_a_models_own_measures_are_those_of_sums_written_out(width: int, seed: int) -> None:
    check_own_metrics(width, seed)


@pytest.mark.parametrize(("teacher", "student"), [(40, 30), (30, 40)])
def test_layers_of_two_widths_are_compared_over_the_students(teacher: int, student: int) -> None:
    logp = make_logprobs(teacher, seed=0, masked=max(0, teacher - 25))
    logq = make_logprobs(student, seed=1)
    same = torch.full((12, student), -30.0)
    same[:, : min(teacher, student)] = logp[:, :student]
    for name, values in compare_distributions(same, logq).items():
        assert torch.equal(compare_distributions(logp, logq)[name], values), name


def test_a_model_does_not_differ_from_itself() -> None:
    logp = make_logprobs(50, seed=2)
    found = compare_distributions(logp, logp.clone())
    assert found["kl_to_teacher"].abs().max() == found["reverse_kl"].abs().max() == 0
    assert found["agreement"].all() and (found["overlap"] == 1).all()
    assert found["acceptance"].numpy() == pytest.approx(1, abs=1e-6)


def test_acceptance_is_what_speculative_sampling_accepts() -> None:
    """Against a simulation: a token x drawn from q is accepted with probability min(1, p(x) / q(x))."""
    p, q = (make_logprobs(8, seed=s, scale=1.0)[0].double().exp().numpy() for s in (5, 6))
    rng = np.random.default_rng(0)
    drafted = rng.choice(8, size=200_000, p=q / q.sum())
    is_accepted = rng.random(200_000) < p[drafted] / q[drafted]
    expected = float(
        compare_distributions(*(torch.from_numpy(np.log(x))[None].float() for x in (p, q)))[
            "acceptance"
        ]
    )
    assert is_accepted.mean() == pytest.approx(expected, abs=0.005)


def test_kl_of_geometric_distributions_is_that_of_the_formula() -> None:
    """With ratios a and b: KL = log((1 - a) / (1 - b)) + a / (1 - a) log(a / b)."""
    a, b = 0.5, 0.7
    n = torch.arange(200, dtype=torch.float64)
    logp, logq = (math.log(1 - r) + n * math.log(r) for r in (a, b))
    found = compare_distributions(logp[None].float(), logq[None].float())
    assert float(found["kl_to_teacher"]) == pytest.approx(
        math.log((1 - a) / (1 - b)) + a / (1 - a) * math.log(a / b), abs=1e-6
    )
    # sum min(p, q) = 1 - TV, the total variation: half of the sum of absolute differences.
    tv = 0.5 * float((logp.exp() - logq.exp()).abs().sum())
    assert float(found["acceptance"]) == pytest.approx(1 - tv, abs=1e-6)


MEASURE = """
import sys, torch
from retort.teacher.features import TeacherFeatures
from retort.evaluation.metrics import measure_positions
from retort.models.heads import Head
from retort.models.causal_lm import CausalLM
from retort.tokens.sequences import build_table
import numpy as np
from types import SimpleNamespace

torch.set_num_threads(1)
V, D, length = 131072, 8, int(sys.argv[1])
head = Head(torch.randn(V, D))
class Body:  # costs nothing, so that the memory of the distributions is measured
    dtype = torch.float32
    def get_input_embeddings(self): return SimpleNamespace(weight=head.weight)
    base_model = staticmethod(lambda input_ids, **_: SimpleNamespace(
        last_hidden_state=torch.nn.functional.one_hot(input_ids % D, D).float()))
ids = np.random.default_rng(0).integers(0, V, length)
table = build_table([(ids, [True] * (length - 1) + [False], 0, ("", ""))])
features = torch.randn(length - 1, D)
teacher = TeacherFeatures({"val": features}, np.zeros(0, np.int64), Head(torch.randn(V, D)), V, "", "", 1, {})
student = CausalLM(Body(), head, V, is_split=True)
def peak():  # MB, of this process only: ru_maxrss starts at the parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
found = measure_positions(student, table, teacher=teacher, batch_size=1)
assert len(found["kl_to_teacher"]) == length - 1
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_at_131072_tokens_with_any_number_of_positions() -> None:
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
