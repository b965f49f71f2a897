"""The teacher reads ahead: forwards of the next batches are queued before a batch's results are looked at."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from retort.cache.codec import SparseTargets
from retort.models.causal_lm import CausalLM, needs_mask, split_model
from retort.models.heads import Head
from retort.teacher import scoring
from retort.teacher.batches import batch_by_length
from retort.teacher.scoring import Scorer, score_part
from retort.teacher.selection import select
from support.scoring import make_codec, random_table, score_top_k
from support.syncs import CountSyncs
from support.teacher_job import Job, read_parts
from support.tiny import NUM_TOKENS, WIDTH

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 1.00 GiB"


@pytest.mark.parametrize("gpus", [1, 3])
def test_bytes_are_the_same_however_far_ahead_and_forwards_are_queued_across_parts(
    gpus: int,
    job: Job,
    undisturbed: dict[str, bytes],
    teacher: CausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = list[str]()
    run = CausalLM.features

    def features(self: CausalLM, *args: Any, **kwargs: Any) -> Tensor:
        seen.append("forward")
        return run(self, *args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append("selection")
        return select(*args, **kwargs)

    monkeypatch.setattr(CausalLM, "num_gpus", gpus)
    monkeypatch.setattr(CausalLM, "features", features)
    monkeypatch.setattr(scoring, "select", watched)
    job.work(tmp_path, load=lambda: teacher)
    assert read_parts(tmp_path) == undisturbed
    batches = [list(batch_by_length(job.index.read_part(part), 4)) for part in job.index.parts]
    forwards = sum(len(part) for part in batches)
    assert seen.count("forward") == forwards
    # Of a batch of more rows than the head takes at once, there are several selections.
    order = [
        kind
        for kind, before in zip(seen, [None, *seen], strict=False)
        if kind != before or kind == "forward"
    ]
    expected = ["forward"] * (gpus + 1) + ["selection", "forward"] * (forwards - gpus - 1)
    assert order[: len(expected)] == expected


def test_a_forward_waits_once_for_a_gpu(teacher: CausalLM) -> None:
    """Once in transformers, for the position ids on the first GPU, before any layer of this batch is queued."""
    table = random_table([30, 2, 17])
    reading = Scorer(teacher, 2).read(batch_by_length(table, 2))
    with CountSyncs() as syncs:
        number = sum(1 for _ in reading)
    assert number == 3 and not teacher.needs_mask
    assert syncs.found.total() == number


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "mistral": LLAMA | {"sliding_window": 4},
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 4},
    "phi3": LLAMA | {"pad_token_id": 0},
    "qwen3_moe": LLAMA
    | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_neox": SIZES | {"intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_right_needs_no_mask(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=WIDTH, **KINDS[kind])
    split = split_model(AutoModelForCausalLM.from_config(config).eval())
    assert not needs_mask(split)
    table, codec = random_table([30, 12, 27]), make_codec(6, WIDTH)
    alone = score_top_k(Scorer(split, 1), table, codec)
    unmasked = CausalLM(split.model, split.head, WIDTH, is_split=split.is_split, needs_mask=False)
    found = score_top_k(Scorer(unmasked, 3), table, codec)
    np.testing.assert_allclose(found.tail_logprobs, alone.tail_logprobs, atol=1e-4)


class _Peeking(CausalLM):
    """A model that sees the end of a row unless it is masked."""

    def features(self, ids: Tensor, attention: Tensor | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        features = super().features(ids, attention)
        return features if attention is not None else features + features[:, -1:]


def test_a_model_that_sees_padding_is_given_the_mask(teacher: CausalLM) -> None:
    peeking = _Peeking(teacher.model, teacher.head, teacher.vocabulary, is_split=True)
    assert needs_mask(peeking)


# ---------------------------------------------------------------------------------------------------------
# Out of memory


def test_out_of_memory_in_the_head_halves_its_rows(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table, codec = random_table([60] * 8), make_codec(6, WIDTH)
    expected = score_part(Scorer(teacher, 8), table, codec, num_tokens=NUM_TOKENS)
    compute = Head.logits

    def logits(self: Head, features: Tensor, *, out: Tensor | None = None) -> Tensor:
        if len(features) > 100:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return compute(self, features, out=out)

    monkeypatch.setattr(Head, "logits", logits)
    found = score_part(Scorer(teacher, 8), table, codec, num_tokens=NUM_TOKENS)
    assert found.is_halved and not expected.is_halved
    assert "128 rows at once" in caplog.text and "64 rows at once" in caplog.text
    first, second = (SparseTargets.concatenate(part.sequences) for part in (found, expected))
    np.testing.assert_array_equal(first.ids, second.ids)


class _Activation:
    """What a forward keeps in memory."""


def test_activations_of_a_failed_forward_are_free_before_the_next(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = list[Callable[[], Any]]()
    run = CausalLM.features

    def features(self: CausalLM, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert all(ref() is None for ref in alive)
        if len(ids) > 2:
            held = _Activation()
            alive.append(weakref.ref(held))
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return run(self, ids, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "features", features)
    gc.disable()  # only what nobody holds is free at once
    try:
        score_top_k(Scorer(teacher, 8), random_table([40] * 8), make_codec(6, WIDTH))
    finally:
        gc.enable()
    assert len(alive) == 2


def test_what_was_read_ahead_is_finished_before_a_batch_is_halved(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for two batches' features: the third forward fails once, and succeeds when they are gone."""
    table, codec = random_table([40] * 12), make_codec(6, WIDTH)
    expected = score_top_k(Scorer(teacher, 2), table, codec)
    at_work = list[Any]()
    run = Scorer._run

    def scarce(self: Scorer, batch: Any) -> Tensor:
        if sum(ref() is not None for ref in at_work) >= 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        features = run(self, batch)
        at_work.append(weakref.ref(features))
        return features

    monkeypatch.setattr(CausalLM, "num_gpus", 4)
    monkeypatch.setattr(Scorer, "_run", scarce)
    part = score_part(Scorer(teacher, 2), table, codec, num_tokens=NUM_TOKENS)
    assert not part.is_halved
    found = SparseTargets.concatenate(part.sequences)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_out_of_memory_while_a_model_is_split_is_not_taken_for_an_unknown_head(
    teacher: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(Head, "logits", logits)
    with pytest.raises(torch.OutOfMemoryError):
        split_model(teacher.model)
