"""Output layers of teacher and student of any widths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.losses import TEMPERATURES, check_widths

torch.set_num_threads(1)  # on tensors of this size a second thread only costs


@given(data=st.data())
def test_loss_and_gradient_of_any_widths_are_those_of_a_dense_float64_reference(
    data: st.DataObject,
) -> None:
    tokens = data.draw(st.integers(2, 30))
    teacher, student = (data.draw(st.integers(tokens, tokens + 20)) for _ in range(2))
    check_widths(
        tokens,
        teacher,
        student,
        data.draw(st.integers(1, teacher)),
        data.draw(st.sampled_from(TEMPERATURES)),
        seed=data.draw(st.integers(0, 10_000)),
    )
