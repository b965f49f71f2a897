"""Scoring: batches, packing and memory that runs out change nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retort.cache.codec import SparseTargets
from retort.models.causal_lm import CausalLM
from retort.models.heads import Head
from retort.models.load import load_teacher, refuse_offloaded
from retort.teacher import scoring
from retort.teacher.batches import pad_batch
from retort.teacher.scoring import Scorer, score_features, score_part
from support.scoring import Small, check_batches, log_softmax, make_codec, random_table, score_top_k
from support.sections import section
from support.tiny import NUM_TOKENS, WIDTH

# ---------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("batch_size", [1, 3, 9])
@pytest.mark.parametrize("lengths", [[], [7], [2, 40, 38, 40, 2, 17, 36, 35], [5] * 20])
def test_batches_cover_every_sequence_once_in_order_of_length(
    lengths: list[int], batch_size: int
) -> None:
    check_batches(lengths, batch_size)


def test_padding_is_on_the_right_and_masked() -> None:
    table = random_table([5, 3])
    rows, cpu = [table[0], table[1]], torch.device("cpu")
    inputs = pad_batch(rows, device=cpu)
    assert inputs.attention is not None
    assert inputs.attention.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert inputs.ids[1, :3].tolist() == table[1].ids.tolist()
    counts = torch.zeros(2, 5, dtype=torch.bool)
    counts.view(-1)[inputs.counted] = True
    assert counts[0].tolist() == table[0].loss_mask.tolist()
    assert counts[1].tolist() == [*table[1].loss_mask.tolist(), False, False]
    assert pad_batch(rows, device=cpu, needs_mask=False).attention is None


def whole(teacher: CausalLM) -> CausalLM:
    """The same teacher, as if its head had an unknown form."""
    return CausalLM(teacher.model, Head(weight=None), teacher.vocabulary, is_split=False)


@pytest.mark.parametrize("form", [lambda t: t, whole])
def test_scoring_a_part_is_scoring_each_sequence_alone_and_unpadded(
    form: Callable[[CausalLM], CausalLM], teacher: CausalLM
) -> None:
    table = random_table([30, 2, 17, 5, 44, 9, 3])
    codec = make_codec(6, WIDTH)
    found = score_top_k(Scorer(form(teacher), 3), table, codec)
    assert len(found) == table.num_positions
    start = 0
    for index in range(len(table)):
        row = table[index]
        with torch.inference_mode():
            ids = torch.from_numpy(row.ids.astype(np.int64))[None]
            logits_TV = teacher.model(input_ids=ids).logits[0].double().numpy()
        logprobs_PV = log_softmax(logits_TV[:, :NUM_TOKENS])[row.loss_mask]
        own = found[start : start + row.num_positions]
        start += row.num_positions
        kept = np.take_along_axis(logprobs_PV, own.to_rows()[0].astype(np.int64), axis=1)
        np.testing.assert_allclose(own.to_rows()[1], kept, atol=1e-5)
        np.testing.assert_allclose(kept, -np.sort(-logprobs_PV, axis=1)[:, :6], atol=1e-5)


def test_scoring_again_gives_the_same_bits(teacher: CausalLM) -> None:
    table, codec = random_table([30, 2, 17, 5, 44, 9, 3]), make_codec(6, WIDTH)
    first, again = (score_top_k(Scorer(teacher, 2), table, codec) for _ in range(2))
    assert first.ids.tobytes() == again.ids.tobytes()
    assert first.logprobs.tobytes() == again.logprobs.tobytes()
    assert first.tail_logprobs.tobytes() == again.tail_logprobs.tobytes()


def test_more_positions_than_head_rows_change_nothing(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, codec = random_table([30, 44]), make_codec(6, WIDTH)
    expected = score_top_k(Scorer(teacher, 2), table, codec)
    monkeypatch.setattr(scoring, "_HEAD_ROWS", {"cpu": 7})
    found = score_top_k(Scorer(teacher, 2), table, codec)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.tail_logprobs, expected.tail_logprobs, atol=1e-6)


def test_scoring_counts_every_token_once(teacher: CausalLM) -> None:
    table, seen = random_table([30, 2, 17, 5]), list[int]()
    for _ in score_features(Scorer(teacher, 3), table, on_batch=seen.append):
        pass
    assert sum(seen) == len(table.ids)


# ---------------------------------------------------------------------------------------------------------
# Out of memory, packing


def test_out_of_memory_halves_batches_once_and_says_so(
    teacher: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    table, codec = random_table([40] * 16), make_codec(6, WIDTH)
    expected = score_top_k(Scorer(teacher, 8), table, codec)
    small = Small.of(teacher, max_tokens=100)
    scorer = Scorer(small, 8)
    part = score_part(scorer, table, codec, num_tokens=NUM_TOKENS)
    # 8 fail, then 4; no further batch of these sizes is tried.
    assert small.__dict__["tried"] == [320, 160] + [80] * 8
    assert part.is_halved
    said = caplog.messages[0]
    assert "out of memory with 8 sequences (320 tokens) at once" in said and "batch_size" in said
    found = SparseTargets.concatenate(part.sequences)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_out_of_memory_with_one_sequence_says_what_to_lower(teacher: CausalLM) -> None:
    table = random_table([40, 40])
    scorer = Scorer(Small.of(teacher, max_tokens=30), 2)
    with pytest.raises(ValueError, match=r"one sequence of 40 tokens.*gpus_per_model.*max_length"):
        score_part(scorer, table, make_codec(6, WIDTH), num_tokens=NUM_TOKENS)


OUT_OF_MEMORY = """
import resource, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from retort.cache.codec import SparseTargets
from retort.cache.top_k_codec import TopKCodec
from retort.cli import configure_logging
from retort.models.causal_lm import split_model
from retort.teacher.scoring import Scorer, score_part
from retort.tokens.sequences import build_table
configure_logging()
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
teacher = split_model(AutoModelForCausalLM.from_config(config).eval())
mask = [False] * 500 + [True] * 11 + [False]
table = build_table([([i % 64] * 512, mask, i, ("", "")) for i in range(64)])
codec = TopKCodec((1.0,), 64, 4)
whole = score_part(Scorer(teacher, 2), table, codec, num_tokens=64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (60 << 20), resource.RLIM_INFINITY))
found = score_part(Scorer(teacher, 64), table, codec, num_tokens=64)
logprobs = [SparseTargets.concatenate(part.sequences).logprobs for part in (whole, found)]
assert not whole.is_halved and np.allclose(*logprobs, atol=1e-4)
print(int(found.is_halved))
"""


@pytest.mark.slow
def test_a_machine_that_really_has_no_more_memory_halves_batches_too() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
    assert "out of memory with 64 sequences (32,768 tokens)" in done.stderr


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
    alone = score_top_k(Scorer(padded, 1), table, codec, num_tokens=WIDTH).to_rows()
    for teacher, batch_size in ((packed, 2), (packed, 8), (padded, 3)):
        found = score_top_k(Scorer(teacher, batch_size), table, codec, num_tokens=WIDTH)
        assert_same_rows(found.to_rows(), alone)


def assert_same_rows(found: Any, expected: Any) -> None:
    """Compare logprobs id by id: rounding may change the order of equal ones."""
    rows = np.arange(len(expected[0]))[:, None]
    by_id = [np.empty_like(logprobs) for _, logprobs, *_ in (found, expected)]
    for (ids, logprobs, *_), dense in zip((found, expected), by_id, strict=True):
        dense[rows, ids] = logprobs
    np.testing.assert_allclose(by_id[0], by_id[1], atol=2e-4)


def test_a_teacher_that_mixes_packed_sequences_is_found_and_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(save_model(tmp_path, "bloom", hidden_size=32, n_layer=2, n_head=4))
    teacher = load_teacher(path, section("teacher", device="cpu", generation=PACKING))
    assert not teacher.packs_sequences
    assert "packed sequences see each other" in caplog.text


def test_a_teacher_that_does_not_fit_its_group_is_refused() -> None:
    refuse_offloaded({"model.embed": 0, "model.layers.0": 1}, path="big")
    with pytest.raises(ValueError, match=r"'big' does not fit.*2 of its 3 pieces.*gpus_per_model"):
        refuse_offloaded({"model.embed": 0, "model.layers.0": "cpu", "head": "disk"}, path="big")
