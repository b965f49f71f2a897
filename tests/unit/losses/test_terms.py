"""The losses against float64 references: values, gradients, and the extremes of the tail."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from retort.losses.teacher_rows import log1mexp
from retort.losses.terms import combine, compute_dense_divergence, compute_hard_loss, perplexity
from support.losses import (
    TEMPERATURES,
    check_sparse_kl,
    check_tempered_rows,
    compute_sparse_kl,
    keep_top_k,
    mark,
    random_logits,
    reference_kl,
    sparse_kl,
    value_and_gradient,
)

torch.set_num_threads(1)  # on tensors of this size a second thread only costs


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("vocabulary", "top_k", "scale"), [(2, 1, 1.0), (60, 7, 4.0), (9, 9, 0.05)]
)
def test_sparse_kl_and_its_gradient_are_those_of_a_dense_float64_reference(
    vocabulary: int, top_k: int, scale: float, temperature: float
) -> None:
    check_sparse_kl(vocabulary, top_k, temperature, scale=scale, seed=20)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 0.5), (8, 1.0), (8, 1.7), (29, 4.0)])
def test_tempered_head_is_the_softmax_at_t_where_the_tail_at_t_is_exact(
    top_k: int, temperature: float
) -> None:
    check_tempered_rows(top_k, temperature, scale=1.0, seed=21)


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


def test_a_renormalised_head_would_have_another_value_and_gradient() -> None:
    teacher_PV = random_logits(4, 40, scale=1.0, seed=3)
    student_PV = random_logits(4, 40, scale=1.0, seed=4)
    ids_PK, head_PK, tail_P = keep_top_k(teacher_PV, top_k=4, temperature=1.0)
    assert float(tail_P.exp().min()) > 0.2  # else the two would hardly differ
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
    ids_PK, _, tail_P = keep_top_k(teacher_PV, top_k=1, temperature=2.0)
    assert float(tail_P.exp().min()) > 0.9999
    leaf_PV = student_PV.float().double().requires_grad_()
    expected, expected_gradient = value_and_gradient(
        reference_kl(leaf_PV, teacher_PV, mark(ids_PK, 20_000), 2.0), leaf_PV
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
    # The student's logprobs are 0 and -400; its tail, exp(-399) in fact, counts as exp(-30).
    expected = sixth / 6 + (sixth + 400) / 6 + 4 / 6 * (math.log(4 / 6) + 30)
    assert found == pytest.approx(expected, rel=1e-5)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0, 0]) > 0.1  # it lowers the token that has all the mass


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
    labels_P = torch.tensor([0, 6, 3, 3, 1])
    expected = -sum(float(logits_PV.softmax(-1)[i, y].log()) for i, y in enumerate(labels_P))
    assert float(compute_hard_loss(logits_PV, labels_P)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
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
    mixed = 0.1 * p + 0.9 * q
    forward = torch.where(p > 0, p * (p.clamp(min=1e-300) / mixed).log(), 0.0)
    expected["skew_forward_kl"] = forward.sum()
    expected["skew_reverse_kl"] = (q * (q / (0.9 * p + 0.1 * q)).log()).sum()
    expected["total_variation"] = (p - q).abs().sum() / 2
    for divergence, value in expected.items():
        found = compute_dense_divergence(
            student_PV.float(), teacher_PV.float(), temperature=2.0, divergence=divergence
        )
        assert float(found) == pytest.approx(float(value), rel=1e-5)
