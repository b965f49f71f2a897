"""Scoring: a numpy reference of what is kept, and batches that change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NUM_TOKENS, WIDTH, section

from retort import teacher as teacher_room
from retort.codec import Codec
from retort.models import CausalLM, Head, load_teacher
from retort.selection import select_top_k
from retort.teacher import (
    Scorer,
    batch_by_length,
    pad_batch,
    score_features,
    score_part,
)
from retort.tokens import SequenceTable, build_table

TEMPERATURES = (0.5, 1.0, 2.0)


def make_codec(top_k: int, vocabulary: int) -> Codec:
    return Codec("top_k", top_k, TEMPERATURES, vocabulary)


def log_softmax(z_PV: Any) -> Any:
    z_PV = np.asarray(z_PV, dtype=np.float64)
    z_PV = z_PV - z_PV.max(axis=1, keepdims=True)
    return z_PV - np.log(np.exp(z_PV).sum(axis=1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------
# What is kept of a distribution


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_kept_tokens_and_tails_are_those_of_a_float64_reference(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(2, 80))
    num_tokens = data.draw(st.integers(1, vocabulary))
    top_k = data.draw(st.integers(1, num_tokens))
    scale = data.draw(st.sampled_from([0.1, 2.0, 20.0]))
    chance = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    logits_PV = (scale * chance.standard_normal((4, vocabulary))).astype(np.float32)
    found = select_top_k(
        torch.from_numpy(logits_PV.copy()), make_codec(top_k, vocabulary), num_tokens=num_tokens
    )
    logprobs_PV = log_softmax(logits_PV[:, :num_tokens])
    order_PV = np.argsort(-logprobs_PV, axis=1)
    np.testing.assert_array_equal(found.to_rows()[0], order_PV[:, :top_k])
    expected_PK = np.take_along_axis(logprobs_PV, order_PV[:, :top_k], axis=1)
    np.testing.assert_allclose(found.to_rows()[1], expected_PK, rtol=1e-5, atol=1e-5)
    for place, temperature in enumerate(TEMPERATURES):
        p_PV = np.exp(log_softmax(logits_PV[:, :num_tokens] / temperature))
        tail_P = np.take_along_axis(p_PV, order_PV[:, top_k:], axis=1).sum(axis=1)
        tail_logprobs_P = found.tail_logprobs[:, place].astype(np.float64)
        # At temperature 2, probabilities below 1e-38 are lost: masses of some 1e-19 each.
        np.testing.assert_allclose(np.exp(tail_logprobs_P), tail_P, rtol=2e-4, atol=1e-18)


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
    logits_PV = torch.randn(3, WIDTH)
    logits_PV[1, 2:] = -torch.inf
    codec = Codec("top_k", 4, (1.0,), WIDTH)
    found = select_top_k(logits_PV.clone(), codec, num_tokens=WIDTH)
    expected = logits_PV[1, :2].log_softmax(dim=-1).sort(descending=True).values
    np.testing.assert_allclose(found.to_rows()[1][1, :2], expected, rtol=1e-6)
    assert np.isneginf(found.to_rows()[1][1, 2:]).all()
    logits_PV[1] = -torch.inf
    with pytest.raises(ValueError, match="is -inf at row 1"):
        select_top_k(logits_PV, codec, num_tokens=WIDTH)


# ---------------------------------------------------------------------------------------------------------
# Batches


def random_table(
    lengths: list[int], *, seed: int = 0, vocabulary: int = NUM_TOKENS
) -> SequenceTable:
    chance = np.random.default_rng(seed)
    rows = []
    for document, length in enumerate(lengths):
        mask = [bool(b) for b in chance.random(length - 1) < 0.7] + [False]
        mask[0] = True
        ids = chance.integers(3, vocabulary, length).tolist()
        rows.append((ids, mask, document, ("", "")))
    return build_table(rows)


@given(lengths=st.lists(st.integers(2, 40), max_size=30), batch_size=st.integers(1, 9))
def test_batches_cover_every_sequence_once_in_order_of_length(
    lengths: list[int], batch_size: int
) -> None:
    table = random_table(lengths)
    batches = list(batch_by_length(table, batch_size))
    indices = np.concatenate([np.empty(0, np.int64), *batches])
    assert sorted(indices.tolist()) == list(range(len(lengths)))
    in_order = table.lengths[indices]
    assert (np.diff(in_order) <= 0).all()
    room = batch_size * max(lengths, default=0)
    widths = [int(table.lengths[batch].max()) for batch in batches]
    assert all(len(batch) * w <= room for batch, w in zip(batches, widths, strict=True))
    for batch, following, width in zip(batches, batches[1:], widths, strict=False):
        assert table.lengths[batch].min() >= 0.875 * width
        is_full = (len(batch) + 1) * width > room
        assert is_full or table.lengths[following].max() < 0.875 * width


def test_padding_is_on_the_right_and_masked() -> None:
    table = random_table([5, 3])
    ids_BT, attention_BT, loss_BT = pad_batch([table[0], table[1]], device=torch.device("cpu"))
    assert attention_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert ids_BT[1, :3].tolist() == table[1].ids.tolist()
    assert loss_BT[1].tolist() == [*table[1].loss_mask.tolist(), False, False]


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> CausalLM:
    return load_teacher(str(tiny_teacher), section("teacher", device="cpu"))


def whole(teacher: CausalLM) -> CausalLM:
    """The same teacher, as if its head were of an unknown form."""
    return CausalLM(teacher.model, Head(weight=None), teacher.vocabulary, is_split=False)


@pytest.mark.parametrize("form", [lambda t: t, whole])
def test_scoring_a_part_is_scoring_each_sequence_alone_and_unpadded(
    form: Callable[[CausalLM], CausalLM], teacher: CausalLM
) -> None:
    table = random_table([30, 2, 17, 5, 44, 9, 3])
    codec = make_codec(6, WIDTH)
    found = score_part(Scorer(form(teacher), 3), table, codec, num_tokens=NUM_TOKENS).targets
    assert len(found) == table.num_positions
    start = 0
    for index in range(len(table)):
        row = table[index]
        with torch.inference_mode():
            ids = torch.from_numpy(row.ids.astype(np.int64))[None]
            logits_TV = teacher.model(input_ids=ids).logits[0].double().numpy()
        logprobs_PV = log_softmax(logits_TV[:, :NUM_TOKENS])[row.loss_mask]
        mine = found[start : start + row.num_positions]
        start += row.num_positions
        kept = np.take_along_axis(logprobs_PV, mine.to_rows()[0].astype(np.int64), axis=1)
        np.testing.assert_allclose(mine.to_rows()[1], kept, atol=1e-5)
        np.testing.assert_allclose(kept, -np.sort(-logprobs_PV, axis=1)[:, :6], atol=1e-5)


def test_scoring_again_gives_the_same_bits(teacher: CausalLM) -> None:
    table, codec = random_table([30, 2, 17, 5, 44, 9, 3]), make_codec(6, WIDTH)
    first, again = (
        score_part(Scorer(teacher, 2), table, codec, num_tokens=NUM_TOKENS).targets
        for _ in range(2)
    )
    assert first.ids.tobytes() == again.ids.tobytes()
    assert first.logprobs.tobytes() == again.logprobs.tobytes()
    assert first.tail_logprobs.tobytes() == again.tail_logprobs.tobytes()


def test_more_positions_than_head_rows_change_nothing(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, codec = random_table([30, 44]), make_codec(6, WIDTH)
    expected = score_part(Scorer(teacher, 2), table, codec, num_tokens=NUM_TOKENS).targets
    monkeypatch.setattr(teacher_room, "_HEAD_ROWS", {"cpu": 7})
    found = score_part(Scorer(teacher, 2), table, codec, num_tokens=NUM_TOKENS).targets
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.tail_logprobs, expected.tail_logprobs, atol=1e-6)


def test_scoring_counts_every_token_once(teacher: CausalLM) -> None:
    table, seen = random_table([30, 2, 17, 5]), []
    for _ in score_features(Scorer(teacher, 3), table, on_batch=seen.append):
        pass
    assert sum(seen) == len(table.ids)
