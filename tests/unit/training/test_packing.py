"""Packing: the losses and gradients of padded batches, every sequence once an epoch, and students that cannot."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from retort.io.files import write_json
from retort.models.attention import join_attention
from retort.models.load import load_teacher
from retort.training.arguments import training_arguments
from retort.training.batches import Row, RowStream, Shuffled
from retort.training.loop import build_trainer
from retort.training.packing import Grouped, Packed, fit_lengths
from retort.training.trainer import DistillationTrainer
from support.batches import check_packing
from support.bench import GPT2_WITH_DROPOUT, Bench, assert_same_curve, assert_same_weights, read_log
from support.scoring import random_table
from support.sections import section
from support.tiny import make_cache

BLOOM = {"model_type": "bloom", "hidden_size": 8, "n_layer": 1, "n_head": 2}
LENGTHS = np.random.default_rng(0).lognormal(3, 0.8, 400).clip(2, 48).astype(np.int64)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bloom") / "student.json"
    write_json(path, BLOOM)
    return path


def make_trainer(bench: Bench, folder: Path, source: Any, **keys: Any) -> DistillationTrainer:
    job = bench.job(
        source, **{"device": "cpu", "temperature": 1.0, "dataloader_num_workers": 0, **keys}
    )
    return build_trainer(training_arguments(folder, job), job)


# ---------------------------------------------------------------------------------------------------------
# Losses and gradients


def learn(
    trainer: DistillationTrainer, rows: list[Row], *, joins: bool
) -> tuple[dict[str, float], list[Any]]:
    """Return the losses and the gradients of one step, with its rows end to end or not."""
    collator = replace(trainer.data_collator, is_joined=joins)
    batch = collator([trainer.train_dataset[row] for row in rows])
    assert (len(batch["input_ids"]) == 1) == ("bounds" in batch) == joins
    positions = len(batch["counted"])
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=positions).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    return trainer.window.take(), gradients


def assert_packed_as_padded(trainer: DistillationTrainer) -> None:
    """Compare packed rows, and rows of a sequence each, end to end, with padded ones."""
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)  # else attention hardly matters
    packed = sorted(trainer.order.list_rows(0), key=len)[-3:]
    assert len(packed[0]) > 1
    single: list[Row] = [(i,) for row in packed for i in row]
    assert trainer.data_collator.is_joined
    expected, expected_gradients = learn(trainer, single, joins=False)
    for rows, joins in ((packed, True), (single, True), (packed, False)):
        if not joins:  # transformers' block mask between the sequences of a row
            for model in (trainer.model, *([trainer.teacher.model] if trainer.teacher else [])):
                join_attention(model)
        losses, gradients = learn(trainer, rows, joins=joins)
        for name in ("total_loss", "hard_loss", "soft_loss"):
            assert losses.get(name) == pytest.approx(expected.get(name), abs=1e-5)
        assert len(gradients) == len(expected_gradients) > 3
        for found, gradient in zip(gradients, expected_gradients, strict=True):
            assert float(gradient.abs().max()) > 1e-4
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["top_k", "full", "top_p", "sampled"])
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones_from_every_cache(
    method: str, bench: Bench, tmp_path: Path
) -> None:
    if method in ("top_k", "full"):
        cache = bench.cache if method == "top_k" else bench.full
    else:
        keys = {"method": method, "temperatures": [1.0]}
        cache = make_cache(tmp_path / "cache", bench.index_path, bench.teacher_path, **keys)
    assert_packed_as_padded(make_trainer(bench, tmp_path, cache, packing=True, alpha=0.3))


@pytest.mark.parametrize("kind", ["output", "hybrid"])
def test_packed_rows_give_those_of_text_and_of_a_live_teacher_where_some_positions_count(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    table = random_table(LENGTHS[:40].tolist())
    teacher = load_teacher(str(bench.teacher_path), section("teacher", device="cpu"))
    keys = {"distillation_type": kind, "packing": True}
    if kind == "hybrid":
        keys |= {"teacher": teacher, "use_cached_logits": False}
    trainer = make_trainer(bench, tmp_path, table, **keys)
    assert_packed_as_padded(trainer)


def test_another_sequence_in_a_row_changes_nothing_for_its_neighbours(
    bench: Bench, tmp_path: Path
) -> None:
    trainer = make_trainer(bench, tmp_path, bench.table, distillation_type="output")
    batch = trainer.data_collator([trainer.train_dataset[(index,)] for index in range(6)])
    inputs = {name: batch[name] for name in ("position_ids", "bounds")}
    ids_BT = batch["input_ids"]
    changed_BT = ids_BT.clone()
    first = len(bench.table[0].ids)
    changed_BT[0, :first] = (changed_BT[0, :first] + 7) % 300
    with torch.no_grad():
        one, other = (
            trainer.model(input_ids=ids, **inputs).logits[0] for ids in (ids_BT, changed_BT)
        )
    assert not torch.equal(one[:first], other[:first])
    assert torch.equal(one[first:], other[first:])


def test_full_rows_are_read_as_they_are_without_packing(bench: Bench, tmp_path: Path) -> None:
    table = random_table([96] * 6)
    keys = {"distillation_type": "output", "batch_size": 2}
    packed, padded = (
        make_trainer(bench, tmp_path, table, packing=packing, **keys) for packing in (True, False)
    )
    batch, other = (
        t.data_collator([t.train_dataset[(i,)] for i in (3, 1)]) for t in (packed, padded)
    )
    assert packed.order.rows_per_epoch == 6 and packed.args.max_steps == 3
    assert batch.keys() == other.keys()
    assert all(torch.equal(batch[name], other[name]) for name in batch)


# ---------------------------------------------------------------------------------------------------------
# The order of rows


def test_a_sequence_goes_into_the_fullest_row_that_has_room() -> None:
    assert fit_lengths(np.array([7, 5, 4, 3, 2, 2, 1]), 10).tolist() == [0, 1, 1, 0, 2, 2, 1]


def test_every_epoch_holds_every_sequence_once_in_rows_that_are_nearly_full() -> None:
    check_packing(LENGTHS.tolist(), capacity=48, seed=3, batch=8)
    check_packing([5, 5, 5], capacity=5, seed=0, batch=8)
    packed = Packed(LENGTHS, 48, 0)
    assert LENGTHS.sum() > 0.97 * 48 * packed.rows_per_epoch
    epochs = [list(packed.list_rows(epoch)) for epoch in (0, 1)]
    assert set(epochs[0]) != set(epochs[1]), "other sequences share rows"
    assert set(epochs[0]) != set(replace(packed, seed=1).list_rows(0))


def test_batches_of_similar_length_need_little_padding_and_come_in_a_random_order() -> None:
    grouped = Grouped(LENGTHS[:397], 8, 0)
    stream = [index for (index,) in RowStream(grouped, count=8 * 140)]
    lengths = LENGTHS[stream].reshape(-1, 8)  # epochs end within a batch
    assert lengths.max(axis=1).sum() * 8 < 1.1 * lengths.sum()
    assert abs(np.corrcoef(np.arange(50), lengths.mean(axis=1)[:50])[0, 1]) < 0.5


@pytest.mark.parametrize("order", [Packed(LENGTHS, 48, 0), Grouped(LENGTHS, 8, 0)])
def test_any_number_of_ranks_reads_the_same_steps(order: Any) -> None:
    steps = []
    for ranks in (1, 2, 4):
        stream: Any = RowStream(order, count=800)
        batches = BatchSampler(stream, 8 // ranks, drop_last=False)
        shares = [list(BatchSamplerShard(batches, ranks, rank)) for rank in range(ranks)]
        steps.append(
            [sorted(row for batch in share for row in batch) for share in zip(*shares, strict=True)]
        )
    assert len(steps[0]) == 100 and steps[0] == steps[1] == steps[2]


# ---------------------------------------------------------------------------------------------------------
# Whole trainings


def test_an_epoch_of_packed_rows_learns_every_position_once(bench: Bench, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "max_steps": None,
        "num_epochs": 1,
        "batch_size": 1,
        "logging_steps": 100,
    }
    summary = bench.train(tmp_path, bench.cache, packing=True, **keys)
    rows = Packed(bench.table.lengths, 96, 0).rows_per_epoch
    assert summary.steps == rows < 0.8 * len(bench.table)
    assert summary.trained_positions == bench.table.num_positions


@pytest.mark.parametrize("packing", [True, "auto"])
def test_a_packed_training_resumes_to_the_same_weights_however_it_is_cut(
    packing: bool | str, bench: Bench, bloom: Path, tmp_path: Path
) -> None:
    student = tmp_path / "dropout.json"
    write_json(student, GPT2_WITH_DROPOUT)
    keys: dict[str, Any] = {"packing": packing, "max_steps": 9, "save_steps": 3, "batch_size": 24}
    keys["student"] = bloom if packing == "auto" else student
    bench.train(tmp_path / "one", bench.cache, **keys)
    bench.train(tmp_path / "two", bench.cache, **keys, dataloader_num_workers=1)
    for name in ("final", "checkpoint-9", "checkpoint-6"):
        (tmp_path / "two" / name).rename(tmp_path / f"old-{name}")
    bench.train(tmp_path / "two", bench.cache, **keys)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    if packing is True:
        keys |= {"batch_size": 8, "gradient_accumulation_steps": 3, "student": bench.student_path}
        bench.train(tmp_path / "three", bench.cache, **keys)
        keys |= {"batch_size": 24, "gradient_accumulation_steps": 1}
        bench.train(tmp_path / "four", bench.cache, **keys)
        for mine, theirs in zip(
            read_log(tmp_path / "three"), read_log(tmp_path / "four"), strict=True
        ):
            assert float(mine["total_loss"]) == pytest.approx(float(theirs["total_loss"]), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------
# What cannot be packed


def test_a_student_that_mixes_sequences_gets_batches_of_similar_length_or_is_refused(
    bench: Bench, bloom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "retort")
    trainer = make_trainer(
        bench, tmp_path, bench.table, student=bloom, packing="auto", distillation_type="output"
    )
    assert isinstance(trainer.order, Grouped)
    (line,) = [r.message for r in caplog.records if "similar length" in r.message]
    assert line.startswith("in BloomForCausalLM packed sequences see each other")
    with pytest.raises(ValueError, match=r"packing is true, but in Bloom.*training.packing: auto"):
        make_trainer(bench, tmp_path, bench.table, student=bloom, packing=True)


def test_such_a_student_is_padded_unless_it_must_not_be(
    bench: Bench, bloom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "retort")
    keys = {"student": bloom, "distillation_type": "output"}
    trainer = make_trainer(bench, tmp_path, bench.table, **keys)
    assert isinstance(trainer.order, Shuffled) and not trainer.data_collator.is_joined
    (line,) = [r.message for r in caplog.records if "padded" in r.message]
    assert line.startswith("BloomForCausalLM uses eager attention, which computes all pairs")
    with pytest.raises(ValueError, match=r"padding_free is true, but Bloom.*padding_free: auto"):
        make_trainer(bench, tmp_path, bench.table, padding_free=True, **keys)


def test_a_sequence_longer_than_a_row_is_refused(bench: Bench, tmp_path: Path) -> None:
    table = random_table([20, 97])
    with pytest.raises(ValueError, match=r"max_length \(96\) tokens, but a sequence has 97"):
        make_trainer(bench, tmp_path, table, distillation_type="output", packing="auto")
