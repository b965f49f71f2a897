"""Output layers of teacher and student may have different widths: both hold padding beyond the tokenizer's ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from retort.cache.codec import LOGPROB_FLOOR, Codec, SparseTargets
from retort.cache.reader import LogitCache
from retort.io.files import read_json, write_json
from retort.teacher.selection import select_top_k
from retort.tokens.sequences import build_table
from retort.training.batches import Collator, Item
from retort.training.fused_loss import LossSettings, compute_fused_loss
from retort.training.losses import compute_dense_divergence
from support.bench import Bench, read_log
from support.tiny import NUM_TOKENS, WIDTH, make_cache
from unit.training.test_batches import take_order

NARROW = 308  # between the tokenizer's 300 ids and the teacher's 320


def _draw(rows: int, width: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def _dense_loss(
    logits_PV: Tensor, teacher_PV: Tensor, kept_PV: Tensor, temperature: float
) -> Tensor:
    """T^2 KL over the kept tokens and one bucket of all others, from probabilities in float64.

    The teacher's are over the tokenizer's ids alone; the student's other ids are in the bucket.
    """
    p_PV = torch.zeros_like(logits_PV)
    p_PV[:, : teacher_PV.shape[1]] = (teacher_PV / temperature).softmax(-1)
    q_PV = (logits_PV / temperature).softmax(-1)
    pairs = [(p_PV[kept_PV], q_PV[kept_PV])]
    pairs += [((p_PV * ~kept_PV).sum(-1), (q_PV * ~kept_PV).sum(-1))]
    terms = [
        torch.where(p > 1e-12, p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log(), 0.0)
        for p, q in pairs
    ]
    return temperature**2 * (terms[0].sum() + terms[1].sum())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_loss_and_gradient_of_any_widths_are_those_of_a_dense_float64_reference(
    data: st.DataObject,
) -> None:
    tokens = data.draw(st.integers(2, 30))
    teacher, student = (data.draw(st.integers(tokens, tokens + 20)) for _ in range(2))
    top_k = data.draw(st.integers(1, teacher))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    seed, rows = data.draw(st.integers(0, 10_000)), 4
    teacher_PV = _draw(rows, teacher, seed=seed)
    codec = Codec("top_k", top_k, (temperature,), teacher)
    targets = select_top_k(teacher_PV.float(), codec, num_tokens=tokens)
    stored = np.maximum(targets.logprobs, LOGPROB_FLOOR)
    tails = np.maximum(targets.tail_logprobs, LOGPROB_FLOOR)
    targets = SparseTargets(targets.offsets, targets.ids, stored, tails)
    table = build_table([([0] * (rows + 1), [True] * rows + [False], 0, ("", ""))])
    collator = Collator(0, student if student < teacher else None)
    batch = collator([Item(0, table[0], targets)])

    hidden, weight = _draw(rows, 5, seed=seed + 1) / 3, _draw(student, 5, seed=seed + 2) / 3
    exact = [x.clone().requires_grad_() for x in (hidden, weight)]
    kept_PV = torch.zeros((rows, student), dtype=torch.bool)
    best_PK = teacher_PV[:, :tokens].topk(min(top_k, tokens), dim=-1).indices
    expected = _dense_loss(
        exact[0] @ exact[1].T,
        teacher_PV[:, :tokens],
        kept_PV.scatter(1, best_PK, True),
        temperature,
    )
    expected.backward()
    mine = [x.float().requires_grad_() for x in (hidden, weight)]
    labels = torch.zeros(rows, dtype=torch.long)
    how = LossSettings(0.0, temperature, chunk_size=3)
    found = compute_fused_loss(mine[0], mine[1], labels, batch["teacher"], how)
    found.total.backward()
    assert float(found.total.detach()) == pytest.approx(
        float(expected.detach()), rel=1e-4, abs=1e-4
    )
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("student", [7, 10, 14])
def test_a_live_teacher_is_one_over_the_tokenizers_ids(student: int) -> None:
    tokens, temperature = 7, 2.0
    logits, teacher = _draw(3, student, seed=0), _draw(3, 12, seed=1)[:, :tokens]
    exact, mine = logits.clone().requires_grad_(), logits.float().requires_grad_()
    everything = torch.ones((3, student), dtype=torch.bool)
    expected = _dense_loss(exact, teacher, everything, temperature)
    found = temperature**2 * compute_dense_divergence(
        mine, teacher.float(), temperature=temperature
    )
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, mine)
    (reference,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def test_ids_beyond_a_vocabulary_are_left_out_row_by_row() -> None:
    targets = SparseTargets(
        offsets=np.array([0, 3, 3, 6]),
        ids=np.array([9, 1, 2, 4, 8, 3], np.int32),
        logprobs=np.array([-np.inf, -1, -2, -3, LOGPROB_FLOOR, -4], np.float32),
        tail_logprobs=np.zeros((3, 1), np.float32),
        num_exact=np.array([2, 0, 3]),
    )
    found = targets.below(8)
    assert found.offsets.tolist() == [0, 2, 2, 4] and found.ids.tolist() == [1, 2, 4, 3]
    assert found.logprobs.tolist() == [-1, -2, -3, -4]
    assert found.num_exact is not None and found.num_exact.tolist() == [1, 0, 2]
    with pytest.raises(AssertionError, match="probability beyond"):
        targets.below(4)


def _student(folder: Path, bench: Bench, width: int) -> Path:
    path = folder / f"student_{width}.json"
    write_json(path, read_json(bench.student_path) | {"vocab_size": width})
    return path


def _by_hand(bench: Bench, folder: Path, cache: LogitCache, *, count: int) -> tuple[float, float]:
    """Hard and soft loss a position of the untrained student in the first `count` sequences, in float64.

    Against the teacher's own logits; against what is stored where it was drawn.
    """
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(folder / "final").config
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).double()
    teacher = AutoModelForCausalLM.from_pretrained(bench.teacher_path).double()
    hard, soft, positions = 0.0, 0.0, 0
    for index in take_order(bench.table, count):
        row, targets = bench.table[index], cache.read_targets(index)
        ids = torch.from_numpy(np.array(row.ids, dtype=np.int64))
        counted = np.flatnonzero(row.loss_mask)
        with torch.no_grad():
            logits_PV, teacher_PV = (
                model(input_ids=ids[None]).logits[0][counted] for model in (student, teacher)
            )
        places_N = torch.from_numpy(np.arange(len(counted)).repeat(targets.sizes))
        is_kept_N = torch.from_numpy(targets.ids < NUM_TOKENS)
        places_N, ids_N = places_N[is_kept_N], torch.from_numpy(targets.ids).long()[is_kept_N]
        if cache.header.codec.method == "sampled":
            logp_N = torch.from_numpy(targets.logprobs).double()[is_kept_N]
            soft += float(
                (logp_N.exp() * (logp_N - logits_PV.log_softmax(-1)[places_N, ids_N])).sum()
            )
        else:
            kept_PV = torch.zeros(logits_PV.shape, dtype=torch.bool)
            kept_PV[places_N, ids_N] = True
            soft += float(_dense_loss(logits_PV, teacher_PV[:, :NUM_TOKENS], kept_PV, 1.0))
        hard -= float(logits_PV.log_softmax(-1).gather(1, ids[counted + 1][:, None]).sum())
        positions += len(counted)
    return hard / positions, soft / positions


@pytest.mark.parametrize("width", [NUM_TOKENS, NARROW, WIDTH + 30])
@pytest.mark.parametrize("method", ["top_k", "full", "top_p", "sampled"])
def test_the_first_step_of_a_student_of_any_width_is_that_computed_by_hand(
    width: int, method: str, bench: Bench, tmp_path: Path
) -> None:
    given = {"top_k": bench.cache, "full": bench.full}
    cache = given.get(method) or make_cache(
        tmp_path / "cache", bench.index_path, bench.teacher_path, method=method
    )
    bench.train(tmp_path / "run", cache, student=_student(tmp_path, bench, width), max_steps=1)
    hard, soft = _by_hand(bench, tmp_path / "run", cache, count=4)
    (row,) = read_log(tmp_path / "run")
    assert float(row["hard_loss"]) == pytest.approx(hard, abs=1e-5)
    # Stored values are rounded, to half precision or to the steps of top_p's grid.
    assert float(row["soft_loss"]) == pytest.approx(soft, abs=2e-3)


def test_a_live_teacher_gives_a_narrower_student_the_losses_of_a_full_cache(
    bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"student": _student(tmp_path, bench, NARROW), "learning_rate": 1e-2}
    bench.train(tmp_path / "cached", bench.full, **keys)
    bench.train(tmp_path / "live", bench.table, live=True, use_cached_logits=False, **keys)
    cached, live = read_log(tmp_path / "cached"), read_log(tmp_path / "live")
    assert len(cached) == 4
    for mine, theirs in zip(cached, live, strict=True):
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), abs=1e-3)
