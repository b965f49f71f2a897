"""The order of sequences, global batches and their shares, labels and targets, for any sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.cluster.ranks import split_global_batch
from retort.training.batches import count_steps
from support.batches import check_batch, check_packing, check_stream
from support.sections import replace, section


@given(
    number=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    epochs=st.integers(1, 4),
    more=st.integers(0, 200),
)
def test_the_stream_is_one_permutation_after_the_other(
    number: int, seed: int, epochs: int, more: int
) -> None:
    check_stream(number, seed=seed, epochs=epochs, more=more)


@given(
    sequences=st.integers(1, 1000),
    batch=st.integers(1, 64),
    epochs=st.floats(0.01, 5),
)
def test_steps_are_whole_global_batches(sequences: int, batch: int, epochs: float) -> None:
    training = section("training", batch_size=batch, num_epochs=epochs)
    steps = count_steps(sequences, training)
    assert steps >= 1 and steps * batch >= epochs * sequences - 1e-6
    assert steps == 1 or (steps - 1) * batch < epochs * sequences
    assert count_steps(sequences, replace(training, max_steps=7)) == 7


@given(size=st.integers(1, 64), accumulation=st.integers(1, 64), ranks=st.integers(1, 16))
def test_every_number_of_ranks_shares_the_same_global_batch(
    size: int, accumulation: int, ranks: int
) -> None:
    if size * accumulation % ranks:
        with pytest.raises(
            ValueError, match=rf"{size * accumulation} sequences a step, which {ranks}"
        ):
            split_global_batch(size, accumulation, ranks)
        return
    mine, passes = split_global_batch(size, accumulation, ranks)
    assert mine * passes * ranks == size * accumulation
    assert mine <= max(1, size // ranks)  # no rank needs more memory than its share of one batch
    if size % ranks == 0:
        assert (mine, passes) == (size // ranks, accumulation)


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=11), min_size=1, max_size=6),
    per_row=st.integers(1, 3),
)
def test_labels_and_targets_belong_to_the_same_positions(
    masks: list[list[bool]], per_row: int
) -> None:
    check_batch(masks, per_row=per_row)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    more=st.integers(0, 30),
    seed=st.integers(0, 99),
    batch=st.integers(1, 9),
)
def test_an_epoch_holds_every_sequence_once(
    lengths: list[int], more: int, seed: int, batch: int
) -> None:
    check_packing(lengths, capacity=max(lengths) + more, seed=seed, batch=batch)
