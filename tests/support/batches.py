"""Checks of the stream of sequences and of a collated batch, for examples and for properties."""

import itertools
from dataclasses import replace

import numpy as np

from retort.cache.codec import SparseTargets
from retort.tokens.sequences import SequenceTable, build_table
from retort.training.batches import IGNORE_INDEX, Collator, Item, RowStream, Shuffled
from retort.training.packing import Grouped, Packed


def read_order(number: int, *, seed: int, count: int) -> list[int]:
    """Return the first sequences that a training reads, where a row has one."""
    return [index for (index,) in RowStream(Shuffled(number, seed), count=count)]


def take_order(table: SequenceTable, count: int) -> list[int]:
    """Return the first sequences that a training of seed 0 reads."""
    return read_order(len(table), seed=0, count=count)


def check_stream(number: int, *, seed: int, epochs: int, more: int) -> None:
    """Check that the stream is one permutation after another, and that it depends on the seed."""
    count = epochs * number + min(more, number - 1)
    order = read_order(number, seed=seed, count=count)
    assert len(order) == count == len(RowStream(Shuffled(number, seed), count=count))
    passes = [order[e * number : (e + 1) * number] for e in range(epochs)]
    assert all(sorted(found) == list(range(number)) for found in passes)
    assert order == read_order(number, seed=seed, count=count + 1)[:count]
    if number > 20:  # two shuffles of 20 are equal once in 10^18
        assert order[:number] != read_order(number, seed=seed + 1, count=number)
        assert all(a != b for a, b in itertools.pairwise(passes))


def check_packing(lengths: list[int], *, capacity: int, seed: int, batch: int) -> None:
    """Check packed rows and grouped batches of sequences of these lengths, in three epochs."""
    sizes, everything = np.array(lengths), list(range(len(lengths)))
    packed, grouped = Packed(sizes, capacity, seed), Grouped(sizes, batch, seed)
    for order in (packed, grouped):
        for epoch in range(3):
            rows = list(order.list_rows(epoch))
            assert len(rows) == order.rows_per_epoch
            assert sorted(index for row in rows for index in row) == everything
            assert rows == list(replace(order).list_rows(epoch))
    filled = sorted(int(sizes[list(row)].sum()) for row in packed.list_rows(0))
    assert filled[-1] <= capacity
    assert len(filled) < 2 or filled[0] + filled[1] > capacity  # else they would be one row


def check_batch(masks: list[list[bool]], *, per_row: int = 1) -> None:
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
    rows = [items[i : i + per_row] for i in range(0, len(items), per_row)]
    batch = Collator(tail_column=1)(rows)
    assert batch["sequences"].tolist() == list(range(len(items)))
    assert ("position_ids" in batch) == (len(items) > len(rows))
    assert ("attention_mask" in batch) == (len(items) == len(rows))
    teacher, counted, found = batch["teacher"], batch["counted"].tolist(), 0
    for b, row in enumerate(rows):
        tokens = [int(i) for item in row for i in item.sequence.ids]
        counts = [bool(c) for item in row for c in item.sequence.loss_mask]
        own = [t for item in row for t in range(len(item.sequence.ids))]
        width = batch["labels"].shape[1]
        padding = width - len(tokens)
        assert batch["input_ids"][b].tolist() == tokens + [0] * padding
        if "attention_mask" in batch:
            assert batch["attention_mask"][b].tolist() == [1] * len(tokens) + [0] * padding
        else:
            assert batch["position_ids"][b].tolist() == own + list(range(padding))
        labels = [tokens[t + 1] if c else IGNORE_INDEX for t, c in enumerate(counts)]
        assert (
            batch["labels"][b].tolist() == [IGNORE_INDEX, *labels, *[IGNORE_INDEX] * width][:width]
        )
        # The teacher's next row, and the next counted index, are those of each position that counts.
        for t in np.flatnonzero(counts).tolist():
            assert counted[found] == b * width + t
            assert int(teacher.offsets[found]) == found
            assert int(teacher.ids[found]) == tokens[t]
            assert float(teacher.logprobs[found]) == -tokens[t]
            assert float(teacher.tail_logprobs[found]) == -own[t] - 100.0
            found += 1
    num_labels = int((batch["labels"] != IGNORE_INDEX).sum())
    assert found == len(teacher.ids) == len(counted) == num_labels
