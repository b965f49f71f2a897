"""Output layers of teacher and student may have different widths: each may have padding beyond the tokenizer's ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retort.cache.codec import LOGPROB_FLOOR, SparseTargets
from retort.cache.reader import LogitCache
from retort.io.files import read_json, write_json
from retort.losses.terms import compute_dense_divergence
from support.batches import take_order
from support.bench import Bench, read_log
from support.losses import check_widths, random_logits, reference_kl
from support.tiny import NUM_TOKENS, WIDTH, make_cache

NARROW = 308  # between the tokenizer's 300 ids and the teacher's 320


@pytest.mark.parametrize(
    ("tokens", "teacher", "student", "top_k"),
    [(10, 16, 12, 4), (10, 12, 30, 12), (10, 16, 16, 16), (10, 10, 10, 1), (2, 22, 2, 22)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_of_any_widths_are_those_of_a_dense_float64_reference(
    tokens: int, teacher: int, student: int, top_k: int, temperature: float
) -> None:
    check_widths(tokens, teacher, student, top_k, temperature, seed=5)


@pytest.mark.parametrize("student", [7, 10, 14])
def test_a_live_teachers_distribution_is_over_the_tokenizers_ids(student: int) -> None:
    tokens, temperature = 7, 2.0
    logits = random_logits(3, student, scale=3.0, seed=0)
    teacher = random_logits(3, 12, scale=3.0, seed=1)[:, :tokens]
    exact, mine = logits.clone().requires_grad_(), logits.float().requires_grad_()
    everything = torch.ones((3, student), dtype=torch.bool)
    expected = temperature**2 * reference_kl(exact, teacher, everything, temperature)
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
    with pytest.raises(AssertionError, match="an id without a token has mass"):
        targets.below(4)


def _student(folder: Path, bench: Bench, width: int) -> Path:
    path = folder / f"student_{width}.json"
    write_json(path, read_json(bench.student_path) | {"vocab_size": width})
    return path


def compute_by_hand(
    bench: Bench, folder: Path, cache: LogitCache, *, count: int
) -> tuple[float, float]:
    """Hard and soft loss a position of the untrained student in the first `count` sequences, in float64.

    Against the teacher's own logits; with a sampled cache, against its samples.
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
        rows_N = torch.from_numpy(np.arange(len(counted)).repeat(targets.sizes))
        is_kept_N = torch.from_numpy(targets.ids < NUM_TOKENS)
        rows_N, ids_N = rows_N[is_kept_N], torch.from_numpy(targets.ids).long()[is_kept_N]
        if cache.header.codec.method == "sampled":
            logp_N = torch.from_numpy(targets.logprobs).double()[is_kept_N]
            logq_N = logits_PV.log_softmax(-1)[rows_N, ids_N]
            soft += float((logp_N.exp() * (logp_N - logq_N)).sum())
        else:
            kept_PV = torch.zeros(logits_PV.shape, dtype=torch.bool)
            kept_PV[rows_N, ids_N] = True
            soft += float(reference_kl(logits_PV, teacher_PV[:, :NUM_TOKENS], kept_PV, 1.0))
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
    hard, soft = compute_by_hand(bench, tmp_path / "run", cache, count=4)
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
