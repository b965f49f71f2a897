"""The losses against float64 references: values, gradients, and the extremes of the tail."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from retort.training.fused_loss import (
    LossSettings,
    TeacherRows,
    compute_loss_of_logits,
    log1mexp,
    temper_rows,
)
from retort.training.losses import combine, compute_dense_divergence, compute_hard_loss, perplexity

torch.set_num_threads(1)  # on tensors of this size a second thread only costs

TEMPERATURES = (0.5, 1.0, 2.0)


def to_teacher(ids_PK: Tensor, logprobs_PK: Tensor, tail_P: Tensor) -> TeacherRows:
    offsets = torch.arange(len(ids_PK) + 1) * ids_PK.shape[1]
    return TeacherRows(offsets, ids_PK.reshape(-1).long(), logprobs_PK.reshape(-1), tail_P)


def compute_sparse_kl(
    logits_PV: Tensor,
    ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_P: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """The summed KL over the kept tokens and the tail, without its factor T^2."""
    labels_P = torch.zeros(len(logits_PV), dtype=torch.long)
    teacher = to_teacher(ids_PK, logprobs_PK, tail_P)
    how = LossSettings(0.0, temperature)
    return compute_loss_of_logits(logits_PV, labels_P, teacher, how).total / temperature**2


def random_logits(rows: int, vocabulary: int, *, scale: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def cut(teacher_PV: Tensor, *, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What an exact cache holds: ids, logprobs at T = 1, the tail's logprob at T; in float32."""
    head_PK, ids_PK = teacher_PV.log_softmax(dim=-1).topk(top_k, dim=-1)
    at_t_PV = (teacher_PV / temperature).log_softmax(dim=-1)
    tail_P = at_t_PV.scatter(1, ids_PK, -torch.inf).logsumexp(dim=-1)
    return ids_PK, head_PK.float(), tail_P.clamp(min=-10_000.0).float()


def reference_kl(
    student_PV: Tensor, teacher_PV: Tensor, ids_PK: Tensor, temperature: float
) -> Tensor:
    """KL over K tokens and one bucket for the others, written out in float64 probabilities."""
    p_PV = (teacher_PV / temperature).softmax(dim=-1)
    q_PV = (student_PV / temperature).softmax(dim=-1)
    kept_PV = torch.zeros_like(p_PV).scatter(1, ids_PK, 1.0)
    kl = torch.zeros((), dtype=torch.float64)
    for p, q in (
        (p_PV.gather(1, ids_PK), q_PV.gather(1, ids_PK)),
        ((p_PV * (1 - kept_PV)).sum(1), (q_PV * (1 - kept_PV)).sum(1)),
    ):
        kl = (
            kl
            + torch.where(
                p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0
            ).sum()
        )
    return kl


def value_and_gradient(loss: Tensor, student_PV: Tensor) -> tuple[float, Tensor]:
    (gradient_PV,) = torch.autograd.grad(loss, student_PV)
    return float(loss.detach()), gradient_PV.double()


def sparse_kl(
    student_PV: Tensor, teacher_PV: Tensor, *, top_k: int, temperature: float
) -> tuple[float, Tensor]:
    student_PV = student_PV.float().requires_grad_()
    targets = cut(teacher_PV, top_k=top_k, temperature=temperature)
    loss = compute_sparse_kl(student_PV, *targets, temperature=temperature)
    return value_and_gradient(loss, student_PV)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_sparse_kl_and_its_gradient_are_those_of_a_dense_float64_reference(
    data: st.DataObject,
) -> None:
    vocabulary = data.draw(st.integers(2, 60))
    top_k = data.draw(st.integers(1, vocabulary))
    temperature = data.draw(st.sampled_from(TEMPERATURES))
    seed = data.draw(st.integers(0, 10_000))
    scale = data.draw(st.sampled_from([0.05, 1.0, 4.0]))
    student_PV = random_logits(3, vocabulary, scale=2.0, seed=seed).float().double()
    teacher_PV = random_logits(3, vocabulary, scale=scale, seed=seed + 1)
    ids_PK = teacher_PV.topk(top_k, dim=-1).indices
    leaf_PV = student_PV.clone().requires_grad_()
    expected, expected_gradient = value_and_gradient(
        reference_kl(leaf_PV, teacher_PV, ids_PK, temperature), leaf_PV
    )
    found, gradient = sparse_kl(student_PV, teacher_PV, top_k=top_k, temperature=temperature)
    assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sparse_kl_with_all_tokens_kept_is_the_kl_over_the_vocabulary(temperature: float) -> None:
    student_PV = random_logits(5, 30, scale=2.0, seed=0)
    teacher_PV = random_logits(5, 30, scale=2.0, seed=1)
    expected = F.kl_div(
        (student_PV / temperature).log_softmax(-1),
        (teacher_PV / temperature).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    found, _ = sparse_kl(student_PV, teacher_PV, top_k=30, temperature=temperature)
    assert found == pytest.approx(float(expected), rel=1e-5)
    dense = compute_dense_divergence(
        student_PV.float(), teacher_PV.float(), temperature=temperature
    )
    assert float(dense) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_k", [1, 4, 29])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(
    temperature: float, top_k: int
) -> None:
    # A head renormalised over its K tokens would push the student's tail down here.
    teacher_PV = random_logits(6, 30, scale=1.0, seed=2).float().double()
    found, gradient = sparse_kl(teacher_PV, teacher_PV, top_k=top_k, temperature=temperature)
    assert abs(found) < 1e-5
    assert float(gradient.abs().max()) < 1e-6


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000), top_k=st.integers(1, 20), temperature=st.sampled_from(TEMPERATURES)
)
def test_kl_is_never_negative_and_buckets_never_add_to_it(
    seed: int, top_k: int, temperature: float
) -> None:
    student_PV = random_logits(2, 20, scale=2.0, seed=seed)
    teacher_PV = random_logits(2, 20, scale=2.0, seed=seed + 1)
    found, _ = sparse_kl(student_PV, teacher_PV, top_k=top_k, temperature=temperature)
    dense = float(
        compute_dense_divergence(student_PV.float(), teacher_PV.float(), temperature=temperature)
    )
    assert -1e-5 <= found <= dense + 1e-4


def test_a_renormalised_head_would_have_another_value_and_gradient() -> None:
    teacher_PV = random_logits(4, 40, scale=1.0, seed=3)
    student_PV = random_logits(4, 40, scale=1.0, seed=4)
    ids_PK, head_PK, tail_P = cut(teacher_PV, top_k=4, temperature=1.0)
    assert float(tail_P.exp().min()) > 0.2  # else there would be nothing to tell apart
    leaf_PV = student_PV.clone().requires_grad_()
    log_q_PK = leaf_PV.log_softmax(-1).gather(1, ids_PK)
    log_p_PK = head_PK.double().log_softmax(-1)
    renormalised = (log_p_PK.exp() * (log_p_PK - log_q_PK)).sum()
    other, other_gradient = value_and_gradient(renormalised, leaf_PV)
    found, gradient = sparse_kl(student_PV, teacher_PV, top_k=4, temperature=1.0)
    assert abs(found - other) > 0.5
    assert float((gradient - other_gradient).abs().max()) > 0.05


def test_a_tail_of_no_mass_is_no_loss_and_a_finite_gradient() -> None:
    # One-hot: the float16 record holds -10,000 for every token but the first, and for the tail.
    student_PV = random_logits(1, 10, scale=1.0, seed=5).float().requires_grad_()
    ids_PK = torch.tensor([[7, 1, 2]], dtype=torch.int32)
    head_PK = torch.tensor([[0.0, -10_000.0, -10_000.0]])
    for temperature in TEMPERATURES:
        loss = compute_sparse_kl(
            student_PV, ids_PK, head_PK, torch.tensor([-10_000.0]), temperature=temperature
        )
        found, gradient = value_and_gradient(loss, student_PV)
        q_V = (student_PV.detach().double()[0] / temperature).softmax(-1)
        assert found == pytest.approx(-math.log(q_V[7]), rel=1e-5)
        expected = (q_V - F.one_hot(torch.tensor(7), 10)) / temperature
        torch.testing.assert_close(gradient[0], expected, rtol=1e-4, atol=1e-6)


def test_a_tail_of_nearly_all_mass_is_weighed_as_it_is() -> None:
    teacher_PV = random_logits(2, 20_000, scale=0.01, seed=6)
    student_PV = random_logits(2, 20_000, scale=1.0, seed=7)
    ids_PK, _, tail_P = cut(teacher_PV, top_k=1, temperature=2.0)
    assert float(tail_P.exp().min()) > 0.9999
    leaf_PV = student_PV.float().double().requires_grad_()
    expected, expected_gradient = value_and_gradient(
        reference_kl(leaf_PV, teacher_PV, ids_PK, 2.0), leaf_PV
    )
    found, gradient = sparse_kl(student_PV, teacher_PV, top_k=1, temperature=2.0)
    assert found == pytest.approx(expected, abs=2e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-8)


def test_a_student_that_gives_the_tail_nothing_has_a_finite_loss_and_gradient() -> None:
    student_PV = torch.full((1, 6), -200.0).index_fill(1, torch.tensor([0]), 200.0).requires_grad_()
    ids_PK, sixth = torch.tensor([[0, 1]]), -math.log(6)
    loss = compute_sparse_kl(
        student_PV,
        ids_PK,
        torch.full((1, 2), sixth),
        torch.tensor([math.log(4 / 6)]),
        temperature=1.0,
    )
    found, gradient = value_and_gradient(loss, student_PV)
    # The student's logprobs are 0 and -400; its tail, in truth -399, is taken as exp(-30).
    expected = sixth / 6 + (sixth + 400) / 6 + 4 / 6 * (math.log(4 / 6) + 30)
    assert found == pytest.approx(expected, rel=1e-5)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0, 0]) > 0.1  # down with the token that has all the mass


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, 29),
    temperature=st.sampled_from((0.5, 1.0, 1.7, 2.0, 4.0)),
    scale=st.sampled_from((0.1, 1.0, 5.0)),
)
def test_tempered_head_is_the_softmax_at_t_where_the_tail_at_t_is_exact(
    seed: int, top_k: int, temperature: float, scale: float
) -> None:
    teacher_PV = random_logits(3, 30, scale=scale, seed=seed)
    ids_PK, head_PK, tail_P = cut(teacher_PV, top_k=top_k, temperature=temperature)
    expected_PK = (teacher_PV / temperature).softmax(-1).gather(1, ids_PK)
    teacher = temper_rows(to_teacher(ids_PK, head_PK, tail_P), temperature)
    found_PK = teacher.logprobs.double().exp().view_as(expected_PK)
    torch.testing.assert_close(found_PK, expected_PK, rtol=3e-5, atol=1e-7)
    total_P = found_PK.sum(-1) + tail_P.double().exp()
    torch.testing.assert_close(total_P, torch.ones_like(total_P), rtol=0, atol=3e-6)


@pytest.mark.parametrize("x", [-1e-7, -1e-3, -0.5, -0.6931471, -0.6931473, -1.0, -20.0, -80.0])
def test_log1mexp_keeps_its_digits_at_both_ends(x: float) -> None:
    found = float(log1mexp(torch.tensor(x, dtype=torch.float32)))
    expected = np.log(-np.expm1(np.float64(np.float32(x))))
    assert found == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dense_kl_takes_a_student_wider_than_its_teacher(temperature: float) -> None:
    student_PV = random_logits(4, 12, scale=2.0, seed=8).float().requires_grad_()
    teacher_PV = random_logits(4, 9, scale=2.0, seed=9)
    log_q_PV = (student_PV.detach().double() / temperature).log_softmax(-1)[:, :9]
    log_p_PV = (teacher_PV / temperature).log_softmax(-1)
    expected = (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum()
    loss = compute_dense_divergence(student_PV, teacher_PV.float(), temperature=temperature)
    found, gradient = value_and_gradient(loss, student_PV)
    assert found == pytest.approx(float(expected), rel=1e-5)
    p_PV = F.pad(log_p_PV.exp(), (0, 3))
    q_PV = (student_PV.detach().double() / temperature).softmax(-1)
    torch.testing.assert_close(gradient, (q_PV - p_PV) / temperature, rtol=1e-4, atol=1e-6)


def test_hard_loss_is_the_summed_negative_log_probability_of_the_text() -> None:
    logits_PV = random_logits(5, 7, scale=2.0, seed=10)
    targets_P = torch.tensor([0, 6, 3, 3, 1])
    expected = -sum(float(logits_PV.softmax(-1)[i, y].log()) for i, y in enumerate(targets_P))
    assert float(compute_hard_loss(logits_PV, targets_P)) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(alpha=st.floats(0, 1), temperature=st.sampled_from(TEMPERATURES))
def test_alpha_weighs_the_hard_loss_and_the_soft_loss_carries_t_squared(
    alpha: float, temperature: float
) -> None:
    hard, kl = torch.tensor(3.0), torch.tensor(5.0)
    terms = combine(hard, kl, alpha=alpha, temperature=temperature)
    assert terms.soft is not None
    assert float(terms.soft) == pytest.approx(temperature**2 * 5.0)
    assert float(terms.hard) == 3.0
    assert float(terms.total) == pytest.approx(alpha * 3.0 + (1 - alpha) * float(terms.soft))


def test_without_a_teacher_the_total_is_the_hard_loss() -> None:
    terms = combine(torch.tensor(3.0), None, alpha=1.0, temperature=2.0)
    assert float(terms.total) == 3.0 and terms.soft is None
    with pytest.raises(AssertionError):
        combine(torch.tensor(3.0), None, alpha=0.5, temperature=2.0)


def test_t_squared_keeps_the_soft_gradient_as_large_as_hinton_says() -> None:
    # At high T the gradient of T^2 KL tends to (z - u) / V for logits of mean zero.
    student_PV = random_logits(1, 8, scale=1.0, seed=11)
    teacher_PV = random_logits(1, 8, scale=1.0, seed=12)
    student_PV, teacher_PV = student_PV - student_PV.mean(), teacher_PV - teacher_PV.mean()
    leaf_PV = student_PV.float().requires_grad_()
    kl = compute_dense_divergence(leaf_PV, teacher_PV.float(), temperature=100.0)
    total = combine(torch.tensor(0.0), kl, alpha=0.0, temperature=100.0).total
    (gradient_PV,) = torch.autograd.grad(total, leaf_PV)
    torch.testing.assert_close(
        gradient_PV.double(), (student_PV - teacher_PV) / 8, rtol=0.05, atol=2e-3
    )


def test_perplexity_is_the_exponential_and_infinite_beyond_a_float() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e6) == math.inf


def test_dense_divergences_are_their_definitions() -> None:
    student_PV = random_logits(4, 30, scale=2.0, seed=8)
    teacher_PV = random_logits(4, 30, scale=2.0, seed=9)
    teacher_PV[0, 3] = -torch.inf
    p, q = (teacher_PV / 2).softmax(-1), (student_PV / 2).softmax(-1)
    m = (p + q) / 2
    floored = p.clamp(min=math.exp(-30))
    half = [torch.where(a > 0, a * (a.clamp(min=1e-300) / m).log(), 0.0).sum() / 2 for a in (p, q)]
    expected = {"reverse_kl": (q * (q / floored).log()).sum(), "jensen_shannon": sum(half)}
    for divergence, value in expected.items():
        found = compute_dense_divergence(
            student_PV.float(), teacher_PV.float(), temperature=2.0, divergence=divergence
        )
        assert float(found) == pytest.approx(float(value), rel=1e-5)
