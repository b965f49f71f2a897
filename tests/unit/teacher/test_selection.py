"""Selection: the kept tokens and the tails of distributions, against references."""

import numpy as np
import pytest
import torch

from retort.cache.entropy_codec import EntropyCodec
from retort.cache.top_k_codec import TopKCodec
from retort.teacher.selection import pad_width, select_probable, select_top_k
from support.scoring import check_probable, check_top_k, check_top_k_of_wide_rows, make_codec
from support.tiny import WIDTH


@pytest.mark.parametrize(
    ("vocabulary", "num_tokens", "top_k"), [(2, 1, 1), (80, 80, 80), (80, 60, 7), (33, 33, 1)]
)
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_kept_tokens_and_tails_are_those_of_a_float64_reference(
    vocabulary: int, num_tokens: int, top_k: int, scale: float
) -> None:
    check_top_k(vocabulary=vocabulary, num_tokens=num_tokens, top_k=top_k, scale=scale, seed=0)


def test_ids_beyond_the_tokenizer_have_probability_zero() -> None:
    logits_PV = torch.randn(3, 20)
    logits_PV[:, 15:] += 50.0  # the layer's padding, untrained, may say anything
    found = select_top_k(logits_PV, make_codec(15, 20), num_tokens=15)
    assert found.ids.max() < 15
    np.testing.assert_allclose(np.exp(found.to_rows()[1]).sum(axis=1), 1.0, rtol=1e-5)
    assert np.isneginf(found.tail_logprobs).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_refused_with_its_place(value: float) -> None:
    logits_PV = torch.zeros(3, 20)
    logits_PV[1, 7] = value
    with pytest.raises(ValueError, match=r"logit of token 7 is (nan|inf) at row 1"):
        select_top_k(logits_PV, make_codec(4, 20), num_tokens=20)


def test_a_logit_of_minus_infinity_is_a_probability_of_zero() -> None:
    logits_PV = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    logits_PV[1, 2:] = -torch.inf
    codec = TopKCodec((1.0,), WIDTH, 4)
    found = select_top_k(logits_PV.clone(), codec, num_tokens=WIDTH)
    expected = logits_PV[1, :2].log_softmax(dim=-1).sort(descending=True).values
    np.testing.assert_allclose(found.to_rows()[1][1, :2], expected, rtol=1e-6)
    assert np.isneginf(found.to_rows()[1][1, 2:]).all()
    logits_PV[1] = -torch.inf
    with pytest.raises(ValueError, match="is -inf at row 1"):
        select_top_k(logits_PV, codec, num_tokens=WIDTH)


# ---------------------------------------------------------------------------------------------------------
# Wide vocabularies, which are searched by blocks


@pytest.mark.parametrize(
    ("width", "num_tokens", "top_k"), [(600, 600, 1), (2999, 2000, 12), (3000, 12, 12)]
)
def test_the_top_k_of_wide_rows_are_torchs(width: int, num_tokens: int, top_k: int) -> None:
    check_top_k_of_wide_rows(width=width, num_tokens=num_tokens, top_k=top_k, seed=0)


@pytest.mark.parametrize("least", [0.3, 0.01, 0.0005])
def test_the_probable_tokens_of_wide_rows_are_all_found(least: float) -> None:
    check_probable(width=2999, least=least, seed=0)


def test_of_a_row_without_a_probable_token_one_is_kept() -> None:
    codec = EntropyCodec((1.0,), 1000, "top_p", 0.01, 60, "order")
    found = select_probable(torch.zeros(3, 1000), codec, num_tokens=990, uniform_P=np.empty(0))
    assert found.sizes.tolist() == [1, 1, 1] and found.ids.max() < 990


@pytest.mark.parametrize(
    ("width", "num_tokens", "top_k"), [(317, 300, 317), (1001, 5, 8), (33, 31, 33)]
)
def test_no_id_is_beyond_the_vocabulary_where_fewer_than_k_are_possible(
    width: int, num_tokens: int, top_k: int
) -> None:
    # In whole blocks, as the teacher's pass gives them.
    logits_PV = torch.randn(4, pad_width(width), generator=torch.Generator().manual_seed(0))
    found = select_top_k(logits_PV, make_codec(top_k, width), num_tokens=num_tokens)
    ids_PK = found.to_rows()[0]
    assert ids_PK.max() < width
    assert all(len(set(ids)) == top_k for ids in ids_PK.tolist())
