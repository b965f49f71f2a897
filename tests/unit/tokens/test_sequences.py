"""Content keys and tables of sequences."""

from dataclasses import replace

import numpy as np
import pytest

from retort.tokens.sequences import build_table, concatenate_tables, content_key
from support.synthetic import make_table
from support.tokenizing import rows


def key_of(ids: list[int], mask: list[bool], starts: list[int]) -> bytes:
    return content_key(
        np.array(ids, np.int32), np.array(mask, np.bool_), np.array(starts, np.int32)
    )


def test_a_number_that_moves_from_one_column_to_the_next_changes_the_key() -> None:
    assert key_of([5, 0], [True], [0]) != key_of([5], [True], [0, 0])
    assert key_of([5, 6], [True, False], [0]) != key_of([5, 6], [True, False], [0, 1])


def test_the_key_does_not_depend_on_memory_layout_or_dtype() -> None:
    ids, mask, starts = np.arange(8, dtype=np.int32), np.ones(8, np.bool_), np.zeros(1, np.int32)
    strided = np.repeat(ids, 2)[::2]
    wide = ids.astype(np.int64)
    assert content_key(ids, mask, starts) == content_key(strided, mask, starts)
    assert content_key(ids, mask, starts) == content_key(wide, mask, starts)  # type: ignore[arg-type]  # on purpose


def test_a_table_is_cut_and_joined_with_its_labels() -> None:
    table = build_table(
        [
            ([5, 6, 7], [False, True, False], 3, ("code", "c")),
            ([8, 9], [True, False], 4, ("", "")),
        ]
    )
    assert table.lengths.tolist() == [3, 2]
    assert table.position_offsets.tolist() == [0, 1, 2]
    second, first = table.slice(1, 2), table.slice(0, 1)
    joined = concatenate_tables([second, first])
    assert rows(joined) == [rows(table)[1], rows(table)[0]]
    assert joined.documents.tolist() == [4, 3]
    assert [joined.label_names[label] for label in joined.labels] == [("", ""), ("code", "c")]
    joined.verify_keys(source="joined")


def test_a_sequence_that_does_not_match_its_key_is_refused_with_its_number() -> None:
    table = make_table(3, seed=0)
    ids = table.ids.copy()
    ids[table.offsets[2]] += 1
    with pytest.raises(ValueError, match=r"here\.h5: sequence 12 does not match its content key"):
        replace(table, ids=ids).verify_keys(source="here.h5", first=10)


def test_a_table_may_be_empty() -> None:
    for empty in (build_table([]), concatenate_tables([]), make_table(2, seed=0).slice(1, 1)):
        assert (len(empty), empty.num_positions, empty.lengths.tolist()) == (0, 0, [])
        assert empty.position_offsets.tolist() == [0]
