"""Content keys are equal exactly if sequences are; tables can be cut and joined anywhere."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retort.tokens.sequences import SequenceTable, concatenate_tables, content_key
from support.synthetic import make_table
from support.tokenizing import rows

arrays = st.tuples(
    st.lists(st.integers(0, 99), min_size=2, max_size=8),
    st.lists(st.booleans(), min_size=2, max_size=8),
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
)


def key_of(ids: list[int], mask: list[bool], starts: list[int]) -> bytes:
    return content_key(
        np.array(ids, np.int32), np.array(mask, np.bool_), np.array(starts, np.int32)
    )


@given(arrays, arrays)
def test_keys_are_equal_exactly_when_ids_mask_and_segments_are(one: Any, other: Any) -> None:
    assert (key_of(*one) == key_of(*other)) == (one == other)


@given(arrays, st.data())
def test_one_change_in_any_of_the_three_changes_the_key(found: Any, data: st.DataObject) -> None:
    before = key_of(*found)
    which = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(0, len(found[which]) - 1))
    found[which][place] = not found[which][place] if which == 1 else found[which][place] + 1
    assert key_of(*found) != before


tables = st.builds(make_table, st.integers(1, 6), seed=st.integers(0, 10**6))


def labels_of(table: SequenceTable) -> list[tuple[str, str]]:
    return [table.label_names[label] for label in table.labels]


def assert_equal(one: SequenceTable, other: SequenceTable) -> None:
    assert rows(one) == rows(other)
    assert one.keys.tolist() == other.keys.tolist()
    assert one.documents.tolist() == other.documents.tolist()
    assert labels_of(one) == labels_of(other)


@given(table=tables, cuts=st.lists(st.integers(0, 18), max_size=4))
def test_a_table_cut_anywhere_and_joined_again_is_the_same(
    table: SequenceTable, cuts: list[int]
) -> None:
    places = sorted({0, len(table), *(cut for cut in cuts if cut < len(table))})
    pieces = [table.slice(first, stop) for first, stop in pairwise(places)]
    joined = concatenate_tables(pieces)
    assert_equal(joined, table)
    joined.verify_keys(source="joined")


@given(st.lists(tables, max_size=3))
def test_joined_tables_keep_rows_labels_and_documents(found: list[SequenceTable]) -> None:
    renamed = [
        replace(t, label_names=(*t.label_names[:-1], (f"label {i}", "")))
        for i, t in enumerate(found)
    ]
    joined = concatenate_tables(renamed)
    assert rows(joined) == [row for table in renamed for row in rows(table)]
    assert labels_of(joined) == [label for table in renamed for label in labels_of(table)]
    assert joined.documents.tolist() == [d for table in renamed for d in table.documents]


@given(tables)
def test_position_offsets_bound_the_counted_positions(table: SequenceTable) -> None:
    offsets = table.position_offsets
    assert np.diff(offsets).tolist() == [table[i].num_positions for i in range(len(table))]
    assert offsets[-1] == table.num_positions == int(table.loss_mask.sum())
    assert table.lengths.tolist() == [len(table[i].ids) for i in range(len(table))]


@given(tables, st.data())
def test_a_sequence_that_does_not_match_its_key_is_refused(
    table: SequenceTable, data: st.DataObject
) -> None:
    table.verify_keys(source="whole")
    column = data.draw(st.sampled_from(["ids", "loss_mask", "segment_starts", "keys"]))
    values = getattr(table, column).copy()
    place = data.draw(st.integers(0, values.size - 1))
    values.reshape(-1)[place] ^= 1
    with pytest.raises(ValueError, match=r"here\.h5: sequence \d+ does not match its content key"):
        replace(table, **{column: values}).verify_keys(source="here.h5")
