"""Batches: the same for every kind of training, ordered by the seed alone, labels and rows of the same positions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from retort.cache.reader import LogitCache
from retort.cluster.ranks import split_global_batch
from retort.tokens.sequences import SequenceTable
from retort.training.arguments import training_arguments
from retort.training.batches import count_steps
from retort.training.loop import build_trainer
from support.batches import check_batch, check_stream
from support.bench import Bench
from support.sections import replace, section


def read_batches(bench: Bench, source: SequenceTable | LogitCache, folder: Path) -> list[Any]:
    kind = "logit" if isinstance(source, LogitCache) else "output"
    job = bench.job(
        source, distillation_type=kind, batch_size=4, seed=3, device="cpu", temperature=1.0
    )
    return list(build_trainer(training_arguments(folder, job), job).get_train_dataloader())


@pytest.mark.slow
def test_batches_are_the_same_whatever_is_learned_from(bench: Bench, tmp_path: Path) -> None:
    from_text = read_batches(bench, bench.table, tmp_path)
    assert sum(len(b["sequences"]) for b in from_text) == 4 * math.ceil(len(bench.table) / 4)
    for source in (bench.cache, bench.full):
        from_cache = read_batches(bench, source, tmp_path)
        for mine, theirs in zip(from_text, from_cache, strict=True):
            assert theirs.keys() == mine.keys() | {"teacher"} and "teacher" not in mine
            for name in ("input_ids", "labels", "sequences"):
                assert torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("number", [1, 7, 30])
def test_the_stream_is_one_permutation_after_the_other(number: int) -> None:
    check_stream(number, seed=3, epochs=3, more=5)


@pytest.mark.parametrize(
    ("sequences", "batch", "epochs", "steps"),
    [(10, 5, 2.0, 4), (10, 4, 2.0, 5), (10, 4, 0.1, 1), (3, 8, 1.0, 1), (1000, 8, 0.5, 63)],
)
def test_steps_are_whole_global_batches(
    sequences: int, batch: int, epochs: float, steps: int
) -> None:
    training = section("training", batch_size=batch, num_epochs=epochs)
    assert count_steps(sequences, training) == steps
    assert count_steps(sequences, replace(training, max_steps=7)) == 7


def test_every_number_of_ranks_shares_the_same_global_batch() -> None:
    assert split_global_batch(8, 3, 1) == (8, 3)
    assert split_global_batch(8, 3, 4) == (2, 3)
    assert split_global_batch(2, 6, 4) == (1, 3)
    with pytest.raises(ValueError, match="24 sequences a step, which 5"):
        split_global_batch(8, 3, 5)


@pytest.mark.parametrize("per_row", [1, 2])
def test_labels_and_targets_belong_to_the_same_positions(per_row: int) -> None:
    masks = [[True, False, True, True], [False], [True], [True] * 11, [False, True]]
    check_batch(masks, per_row=per_row)
