"""Batches: the same whatever is learned, in an order of the seed alone, rows and labels of the same positions."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.cache.codec import SparseTargets
from retort.cache.reader import LogitCache
from retort.cluster.ranks import cut_global_batch
from retort.tokens.sequences import SequenceTable, build_table
from retort.training.batches import IGNORE_INDEX, Collator, Item, ShuffledStream, count_steps
from retort.training.loop import build_trainer, training_arguments
from support.bench import Bench


def read_batches(bench: Bench, source: SequenceTable | LogitCache, folder: Path) -> list[Any]:
    kind = "logit" if isinstance(source, LogitCache) else "output"
    job = bench.job(
        source, distillation_type=kind, batch_size=4, seed=3, device="cpu", temperature=1.0
    )
    return list(build_trainer(training_arguments(folder, job), job).get_train_dataloader())


@pytest.mark.slow
def test_batches_are_the_same_whatever_is_learned_from(bench: Bench, tmp_path: Path) -> None:
    from_text = read_batches(bench, bench.table, tmp_path)
    assert sum(len(b["input_ids"]) for b in from_text) == 4 * math.ceil(len(bench.table) / 4)
    for source in (bench.cache, bench.full):
        from_cache = read_batches(bench, source, tmp_path)
        for mine, theirs in zip(from_text, from_cache, strict=True):
            for name in ("input_ids", "attention_mask", "labels", "places"):
                assert torch.equal(mine[name], theirs[name])
            assert "teacher" in theirs and "teacher" not in mine


def take_order(table: SequenceTable, count: int) -> list[int]:
    return list(ShuffledStream(len(table), seed=0, count=count))


@given(
    number=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    epochs=st.integers(1, 4),
    more=st.integers(0, 200),
)
def test_the_stream_is_one_permutation_after_the_other(
    number: int, seed: int, epochs: int, more: int
) -> None:
    count = epochs * number + min(more, number - 1)
    order = list(ShuffledStream(number, seed=seed, count=count))
    assert len(order) == count == len(ShuffledStream(number, seed=seed, count=count))
    passes = [order[e * number : (e + 1) * number] for e in range(epochs)]
    assert all(sorted(found) == list(range(number)) for found in passes)
    assert order == list(ShuffledStream(number, seed=seed, count=count + 1))[:count]
    if number > 20:  # two shuffles of 20 are equal once in 10^18
        assert order[:number] != list(ShuffledStream(number, seed=seed + 1, count=number))
        assert all(a != b for a, b in itertools.pairwise(passes))


@given(
    sequences=st.integers(1, 1000),
    batch=st.integers(1, 64),
    epochs=st.floats(0.01, 5),
)
def test_steps_are_whole_global_batches(sequences: int, batch: int, epochs: float) -> None:
    steps = count_steps(sequences, global_batch=batch, max_steps=None, num_epochs=epochs)
    assert steps >= 1 and steps * batch >= epochs * sequences - 1e-6
    assert steps == 1 or (steps - 1) * batch < epochs * sequences
    assert count_steps(sequences, global_batch=batch, max_steps=7, num_epochs=epochs) == 7


@given(size=st.integers(1, 64), accumulation=st.integers(1, 64), ranks=st.integers(1, 16))
def test_every_number_of_ranks_shares_the_same_global_batch(
    size: int, accumulation: int, ranks: int
) -> None:
    if size * accumulation % ranks:
        with pytest.raises(
            ValueError, match=rf"{size * accumulation} sequences a step, which {ranks}"
        ):
            cut_global_batch(size, accumulation, ranks)
        return
    mine, passes = cut_global_batch(size, accumulation, ranks)
    assert mine * passes * ranks == size * accumulation
    assert mine <= max(1, size // ranks)  # no rank needs more memory than its share of one batch
    if size % ranks == 0:
        assert (mine, passes) == (size // ranks, accumulation)


@settings(deadline=None)
@given(data=st.data())
def test_labels_and_targets_belong_to_the_same_positions(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=6))
    masks = [data.draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1)) for n in lengths]
    rows = [
        ([100 * d + t for t in range(n)], [*mask, False], d, ("", ""))
        for d, (n, mask) in enumerate(zip(lengths, masks, strict=True))
    ]
    table = build_table(rows)
    items = []
    for d in range(len(table)):
        counted = np.flatnonzero(table[d].loss_mask)
        marks = (100 * d + counted).astype(np.int32)[:, None]  # the token at the position itself
        tails = np.stack([-counted - 1.0, -counted - 100.0], axis=1).astype(np.float32)
        items.append(
            Item(d, table[d], SparseTargets.from_rows(marks, -marks.astype(np.float32), tails))
        )
    batch = Collator(temperature_place=1)(items)
    assert batch["places"].tolist() == list(range(len(items)))
    rows, place = batch["teacher"], 0
    for b, item in enumerate(items):
        ids, mask = item.sequence.ids.tolist(), item.sequence.loss_mask.tolist()
        width = batch["labels"].shape[1]
        assert batch["input_ids"][b].tolist() == ids + [0] * (width - len(ids))
        assert batch["attention_mask"][b].tolist() == [1] * len(ids) + [0] * (width - len(ids))
        for t in range(width):
            counts = t < len(ids) and mask[t]
            label = int(batch["labels"][b, t + 1]) if t + 1 < width else IGNORE_INDEX
            assert label == (ids[t + 1] if counts else IGNORE_INDEX)
            if counts:  # targets' next row is this position's
                assert int(rows.offsets[place]) == place
                assert int(rows.ids[place]) == ids[t]
                assert float(rows.logprobs[place]) == -ids[t]
                assert float(rows.tail_logprobs[place]) == -t - 100.0
                place += 1
    assert place == len(rows.ids) == int((batch["labels"] != IGNORE_INDEX).sum())
