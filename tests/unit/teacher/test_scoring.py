"""Scoring: a numpy reference of what is kept, and batches that change nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from retort.cache.codec import Codec
from retort.cache.sparse_streams import TAIL_UNIT
from retort.models.heads import Head
from retort.models.load import CausalLM, _refuse_offloaded, load_teacher
from retort.teacher import scoring as teacher_room
from retort.teacher.scoring import Scorer, batch_by_length, pad_batch, score_features, score_part
from retort.teacher.selection import pad_width, select_probable, select_top_k
from retort.tokens.sequences import SequenceTable, build_table
from support.tiny import NUM_TOKENS, WIDTH, section

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
    logits_PV = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
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


# ---------------------------------------------------------------------------------------------------------
# Out of memory, packing


class Small(CausalLM):
    """A teacher on a device that has memory for `room` tokens at once; `tried` are the sizes it was given."""

    @classmethod
    def of(cls, teacher: CausalLM, room: int) -> "Small":
        small = cls(teacher.model, teacher.head, teacher.vocabulary, is_split=True)
        small.__dict__.update(room=room, tried=[])
        return small

    def features(self, ids_BT: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["tried"].append(ids_BT.numel())
        if ids_BT.numel() > self.__dict__["room"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().features(ids_BT, *args, **kwargs)


def test_out_of_memory_halves_batches_once_and_says_so(
    teacher: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    table, codec = random_table([40] * 16), make_codec(6, WIDTH)
    expected = score_part(Scorer(teacher, 8), table, codec, num_tokens=NUM_TOKENS)
    small = Small.of(teacher, room=100)
    scorer = Scorer(small, 8)
    found = score_part(scorer, table, codec, num_tokens=NUM_TOKENS)
    # 8 fail, then 4; no further batch of these sizes is tried.
    assert small.__dict__["tried"] == [320, 160] + [80] * 8
    assert expected.halved == 0 and found.halved == 6
    said = caplog.messages[0]
    assert "out of memory with 8 sequences (320 tokens) at once" in said and "batch_size" in said
    np.testing.assert_array_equal(found.targets.ids, expected.targets.ids)
    np.testing.assert_allclose(found.targets.logprobs, expected.targets.logprobs, atol=1e-5)


def test_out_of_memory_with_one_sequence_says_what_to_lower(teacher: CausalLM) -> None:
    table = random_table([40, 40])
    scorer = Scorer(Small.of(teacher, room=30), 2)
    with pytest.raises(ValueError, match=r"one sequence of 40 tokens.*gpus_per_model.*max_length"):
        score_part(scorer, table, make_codec(6, WIDTH), num_tokens=NUM_TOKENS)


OUT_OF_MEMORY = """
import resource, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from retort.cache.codec import Codec
from retort.models.load import split_model
from retort.teacher.scoring import Scorer, score_part
from retort.tokens.sequences import build_table
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
teacher = split_model(AutoModelForCausalLM.from_config(config).eval())
mask = [False] * 500 + [True] * 11 + [False]
table = build_table([([i % 64] * 512, mask, i, ("", "")) for i in range(64)])
codec = Codec("top_k", 4, (1.0,), 64)
whole = score_part(Scorer(teacher, 2), table, codec, num_tokens=64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (60 << 20), resource.RLIM_INFINITY))
found = score_part(Scorer(teacher, 64), table, codec, num_tokens=64)
assert whole.halved == 0 and np.allclose(found.targets.logprobs, whole.targets.logprobs, atol=1e-4)
print(found.halved)
"""


@pytest.mark.slow
def test_a_machine_that_really_has_no_more_memory_halves_batches_too() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
    assert "out of memory with 64 sequences (32,768 tokens)" in done.stdout


def save_model(folder: Path, kind: str, **values: Any) -> Path:
    """Write a tiny model of that kind, with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=WIDTH, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PACKABLE = {
    "llama": SIZES | {"intermediate_size": 64},
    "qwen2": SIZES | {"intermediate_size": 64, "num_key_value_heads": 4},
    "gpt_neox": SIZES | {"intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
LEAKING = {
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
PACKING = {"packing": True}


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_or_padded_and_in_any_batches_the_records_are_the_same(
    kind: str, tmp_path: Path
) -> None:
    path = str(save_model(tmp_path, kind, **PACKABLE[kind]))
    packed = load_teacher(path, section("teacher", device="cpu", generation=PACKING))
    padded = load_teacher(path, section("teacher", device="cpu"))
    assert packed.packs_sequences and not padded.packs_sequences
    table, codec = random_table([30, 2, 17, 5, 44, 9, 3, 43]), make_codec(WIDTH, WIDTH)
    alone = score_part(Scorer(padded, 1), table, codec, num_tokens=WIDTH).targets.to_rows()
    for teacher, batch_size in ((packed, 2), (packed, 8), (padded, 3)):
        found = score_part(Scorer(teacher, batch_size), table, codec, num_tokens=WIDTH).targets
        assert_same_rows(found.to_rows(), alone)


def assert_same_rows(found: Any, expected: Any) -> None:
    """Compare logprobs id by id: rounding may change the order of equal ones."""
    rows = np.arange(len(expected[0]))[:, None]
    by_id = [np.empty_like(logprobs) for _, logprobs, *_ in (found, expected)]
    for (ids, logprobs, *_), dense in zip((found, expected), by_id, strict=True):
        dense[rows, ids] = logprobs
    np.testing.assert_allclose(*by_id, atol=2e-4)


@pytest.mark.parametrize("kind", LEAKING)
def test_a_teacher_that_mixes_packed_sequences_is_found_and_padded(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(save_model(tmp_path, kind, **LEAKING[kind]))
    teacher = load_teacher(path, section("teacher", device="cpu", generation=PACKING))
    assert not teacher.packs_sequences
    assert "packed sequences see each other" in caplog.text


def test_a_teacher_that_does_not_fit_its_group_is_refused() -> None:
    _refuse_offloaded({"model.embed": 0, "model.layers.0": 1}, path="big")
    with pytest.raises(ValueError, match=r"'big' does not fit.*2 of its 3 pieces.*gpus_per_model"):
        _refuse_offloaded({"model.embed": 0, "model.layers.0": "cpu", "head": "disk"}, path="big")


# ---------------------------------------------------------------------------------------------------------
# Wide vocabularies, where tokens are looked for by blocks


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_the_top_k_of_wide_rows_are_torchs(data: st.DataObject) -> None:
    width = data.draw(st.integers(600, 3000))
    top_k = data.draw(st.integers(1, 12))
    num_tokens = data.draw(st.integers(top_k, width))
    chance = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    logits_PV = torch.from_numpy(5 * chance.standard_normal((5, width))).float()
    found = select_top_k(logits_PV.clone(), make_codec(top_k, width), num_tokens=num_tokens)
    expected = logits_PV[:, :num_tokens].topk(top_k, dim=-1)
    np.testing.assert_array_equal(found.to_rows()[0], expected.indices)
    logprobs_PV = logits_PV[:, :num_tokens].double().log_softmax(dim=-1)
    np.testing.assert_allclose(
        found.to_rows()[1], logprobs_PV.gather(1, expected.indices), atol=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_the_probable_tokens_of_wide_rows_are_all_found(data: st.DataObject) -> None:
    width = data.draw(st.integers(600, 3000))
    least = data.draw(st.sampled_from([0.3, 0.01, 0.0005]))
    chance = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    sharpness = chance.uniform(0, 5, (6, 1))
    logits_PV = torch.from_numpy(sharpness * chance.standard_normal((6, width))).float()
    codec = Codec("top_p", None, (1.0, 2.0, 5.0), width, least, 60, "order")
    found = select_probable(logits_PV.clone(), codec, num_tokens=width, uniform_P=np.empty(0))
    starts = np.concatenate([[0], np.cumsum(found.sizes)])
    for row, logits_V in enumerate(logits_PV.double()):
        probs_V = logits_V.softmax(dim=-1)
        mine = slice(starts[row], starts[row + 1])
        expected = set((probs_V >= least).nonzero()[:, 0].tolist()) or {int(probs_V.argmax())}
        borderline = set(((probs_V / least - 1).abs() < 1e-5).nonzero()[:, 0].tolist())
        assert set(found.ids[mine].tolist()) ^ expected <= borderline
        np.testing.assert_allclose(found.probs[mine], probs_V[found.ids[mine]], rtol=1e-5)
        for place, temperature in enumerate(codec.temperatures):
            outside_V = (logits_V / temperature).softmax(dim=-1)
            outside_V[found.ids[mine]] = 0.0
            np.testing.assert_allclose(
                found.tails[row, place], float(outside_V.sum()) * TAIL_UNIT, atol=1.0
            )


def test_of_a_row_without_a_probable_token_one_is_kept() -> None:
    codec = Codec("top_p", None, (1.0,), 1000, 0.01, 60, "order")
    found = select_probable(torch.zeros(3, 1000), codec, num_tokens=990, uniform_P=np.empty(0))
    assert found.sizes.tolist() == [1, 1, 1] and found.ids.max() < 990


@pytest.mark.parametrize(
    ("width", "num_tokens", "top_k"), [(317, 300, 317), (1001, 5, 8), (33, 31, 33)]
)
def test_no_id_is_beyond_the_vocabulary_where_fewer_than_k_are_possible(
    width: int, num_tokens: int, top_k: int
) -> None:
    # As the teacher's pass hands them over: in whole blocks already.
    logits_PV = torch.randn(4, pad_width(width), generator=torch.Generator().manual_seed(0))
    found = select_top_k(logits_PV, make_codec(top_k, width), num_tokens=num_tokens)
    ids_PK = found.to_rows()[0]
    assert ids_PK.max() < width
    assert all(len(set(ids)) == top_k for ids in ids_PK.tolist())
