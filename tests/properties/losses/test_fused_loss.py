"""The fused loss against autograd in float64 that holds all logits at once, for all settings."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.losses.terms import LossSettings
from support.losses import DIVERGENCES, POSITION_WEIGHTS, TEMPERATURES, check_fused_loss

torch.set_num_threads(1)  # on tensors of this size a second thread only costs


@settings(max_examples=80)
@given(data=st.data())
def test_losses_and_gradients_are_those_of_a_dense_float64_reference(data: st.DataObject) -> None:
    how = LossSettings(
        data.draw(st.sampled_from([0.0, 0.3, 1.0])),
        data.draw(st.sampled_from(TEMPERATURES)),
        divergence=data.draw(st.sampled_from(DIVERGENCES)),
        scale=data.draw(st.sampled_from([1.0, 0.25])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        chunk_size=data.draw(st.integers(1, 10)),
        skew=data.draw(st.sampled_from([0.1, 0.6])),
        position_weights=data.draw(st.sampled_from(POSITION_WEIGHTS)),
    )
    check_fused_loss(
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(2, 60)),
        how,
        bias=data.draw(st.booleans()),
        normalizer=data.draw(st.sampled_from([1.0, 7.0])),
        seed=data.draw(st.integers(0, 10_000)),
    )
