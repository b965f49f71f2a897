"""The head's product is not rounded to the dtype of its factors."""

import pytest
import torch

from retort.models.heads import Head, multiply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_are_float32_whatever_the_weights(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(3, 5, 64).to(dtype), torch.randn(9000, 64).to(dtype)
    bias = torch.randn(9000).to(dtype) if has_bias else None
    expected = features.double() @ weight.double().t()
    if bias is not None:
        expected += bias.double()
    head = Head(weight, bias, scale=0.5, softcap=30.0)
    expected = 30.0 * torch.tanh(0.5 * expected / 30.0)
    out = torch.empty(15, 9000)
    for found in (
        head.logits(features),
        head.logits(features.flatten(0, 1), out=out).view(3, 5, -1),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_features_that_are_logits_are_copied() -> None:
    logits = torch.randn(4, 7)
    found = Head(weight=None).logits(logits)
    assert torch.equal(found, logits) and found.data_ptr() != logits.data_ptr()


def test_products_of_float64_stay_float64() -> None:
    left, right = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(multiply(left, right), left @ right)
