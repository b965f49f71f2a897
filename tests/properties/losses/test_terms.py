"""Sparse KL against a dense float64 reference, for any vocabulary, number of kept tokens and temperature."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from retort.losses.terms import compute_dense_divergence
from support.losses import (
    TEMPERATURES,
    check_sparse_kl,
    check_tempered_rows,
    random_logits,
    sparse_kl,
)

torch.set_num_threads(1)  # on tensors of this size a second thread only costs


@given(data=st.data())
def test_sparse_kl_and_its_gradient_are_those_of_a_dense_float64_reference(
    data: st.DataObject,
) -> None:
    vocabulary = data.draw(st.integers(2, 60))
    check_sparse_kl(
        vocabulary,
        data.draw(st.integers(1, vocabulary)),
        data.draw(st.sampled_from(TEMPERATURES)),
        scale=data.draw(st.sampled_from([0.05, 1.0, 4.0])),
        seed=data.draw(st.integers(0, 10_000)),
    )


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


@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, 29),
    temperature=st.sampled_from((0.5, 1.0, 1.7, 2.0, 4.0)),
    scale=st.sampled_from((0.1, 1.0, 5.0)),
)
def test_tempered_head_is_the_softmax_at_t_where_the_tail_at_t_is_exact(
    seed: int, top_k: int, temperature: float, scale: float
) -> None:
    check_tempered_rows(top_k, temperature, scale=scale, seed=seed)
