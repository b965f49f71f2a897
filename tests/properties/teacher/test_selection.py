"""Selection of any distribution, against references."""

from hypothesis import given, settings
from hypothesis import strategies as st

from support.scoring import check_probable, check_top_k, check_top_k_of_wide_rows

seeds = st.integers(0, 10_000)


@given(st.data(), st.integers(2, 80), st.sampled_from([0.1, 2.0, 20.0]), seeds)
def test_kept_tokens_and_tails_are_those_of_a_float64_reference(
    data: st.DataObject, vocabulary: int, scale: float, seed: int
) -> None:
    num_tokens = data.draw(st.integers(1, vocabulary))
    top_k = data.draw(st.integers(1, num_tokens))
    check_top_k(vocabulary=vocabulary, num_tokens=num_tokens, top_k=top_k, scale=scale, seed=seed)


@settings(max_examples=25)
@given(st.data(), st.integers(600, 3000), st.integers(1, 12), seeds)
def test_the_top_k_of_wide_rows_are_torchs(
    data: st.DataObject, width: int, top_k: int, seed: int
) -> None:
    num_tokens = data.draw(st.integers(top_k, width))
    check_top_k_of_wide_rows(width=width, num_tokens=num_tokens, top_k=top_k, seed=seed)


@settings(max_examples=25)
@given(st.integers(600, 3000), st.sampled_from([0.3, 0.01, 0.0005]), seeds)
def test_the_probable_tokens_of_wide_rows_are_all_found(
    width: int, least: float, seed: int
) -> None:
    check_probable(width=width, least=least, seed=seed)
