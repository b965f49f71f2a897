"""Checks of the stream of sequences and of a collated batch, for examples and for properties."""

import itertools

import numpy as np

from retort.cache.codec import SparseTargets
from retort.tokens.sequences import SequenceTable, build_table
from retort.training.batches import IGNORE_INDEX, Collator, Item, ShuffledStream


def take_order(table: SequenceTable, count: int) -> list[int]:
    """Return the first sequences that a training of seed 0 reads."""
    return list(ShuffledStream(len(table), seed=0, count=count))


def check_stream(number: int, *, seed: int, epochs: int, more: int) -> None:
    """Check that the stream is one permutation after another, and that it depends on the seed."""
    count = epochs * number + min(more, number - 1)
    order = list(ShuffledStream(number, seed=seed, count=count))
    assert len(order) == count == len(ShuffledStream(number, seed=seed, count=count))
    passes = [order[e * number : (e + 1) * number] for e in range(epochs)]
    assert all(sorted(found) == list(range(number)) for found in passes)
    assert order == list(ShuffledStream(number, seed=seed, count=count + 1))[:count]
    if number > 20:  # two shuffles of 20 are equal once in 10^18
        assert order[:number] != list(ShuffledStream(number, seed=seed + 1, count=number))
        assert all(a != b for a, b in itertools.pairwise(passes))


def check_batch(masks: list[list[bool]]) -> None:
    """Check a batch of sequences with these loss masks: padding, labels, and the teacher's row of each label."""
    table = build_table(
        [
            ([100 * d + t for t in range(len(mask) + 1)], [*mask, False], d, ("", ""))
            for d, mask in enumerate(masks)
        ]
    )
    items = []
    for d in range(len(table)):
        counted = np.flatnonzero(table[d].loss_mask)
        ids = (100 * d + counted).astype(np.int32)[:, None]  # the token at the position itself
        tails = np.stack([-counted - 1.0, -counted - 100.0], axis=1).astype(np.float32)
        targets = SparseTargets.from_rows(ids, -ids.astype(np.float32), tails)
        items.append(Item(d, table[d], targets))
    batch = Collator(tail_column=1)(items)
    assert batch["sequences"].tolist() == list(range(len(items)))
    rows, row = batch["teacher"], 0
    width = batch["labels"].shape[1]
    for b, item in enumerate(items):
        tokens, mask = item.sequence.ids.tolist(), item.sequence.loss_mask.tolist()
        padding = [0] * (width - len(tokens))
        assert batch["input_ids"][b].tolist() == tokens + padding
        assert batch["attention_mask"][b].tolist() == [1] * len(tokens) + padding
        for t in range(width):
            counts = t < len(tokens) and mask[t]
            label = int(batch["labels"][b, t + 1]) if t + 1 < width else IGNORE_INDEX
            assert label == (tokens[t + 1] if counts else IGNORE_INDEX)
            if counts:  # the teacher's next row, and the next counted index, are this position's
                assert int(batch["counted"][row]) == b * width + t
                assert int(rows.offsets[row]) == row
                assert int(rows.ids[row]) == tokens[t]
                assert float(rows.logprobs[row]) == -tokens[t]
                assert float(rows.tail_logprobs[row]) == -t - 100.0
                row += 1
    assert (
        row
        == len(rows.ids)
        == len(batch["counted"])
        == int((batch["labels"] != IGNORE_INDEX).sum())
    )
