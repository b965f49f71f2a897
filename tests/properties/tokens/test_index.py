"""Parts cover the training sequences once, in order; a sample has the sequences whose numbers it returns."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retort.tokens.index import TokenIndex, name_part
from support.synthetic import SIZES, as_rows, make_tables, write_tokens


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    return write_tokens(tmp_path_factory.mktemp("tokens"), make_tables(0))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), chunk_size=st.integers(1, 9))
def test_parts_cover_the_training_sequences_once_in_order(
    tmp_path: Path, seed: int, chunk_size: int
) -> None:
    tables = make_tables(seed)
    index = write_tokens(tmp_path, tables, chunk_size=chunk_size)
    parts = [index.read_part(part) for part in index.parts]
    assert as_rows(parts) == as_rows(tables) == as_rows([index.read_split("train")])
    for part, table in zip(index.parts, parts, strict=True):
        assert part.positions == table.num_positions
        assert part.tokens == len(table.ids)
        assert part.name == name_part(table)
        assert len(set(table.documents.tolist())) <= chunk_size
    train = index.record.train
    assert train.sequences == sum(part.sequences for part in index.parts)
    assert train.positions == sum(part.positions for part in index.parts)
    assert train.documents == sum(SIZES)
    for shard, size in enumerate(SIZES):
        count = sum(part.shard == shard for part in index.parts)
        assert count == -(-size // chunk_size)


@settings(max_examples=20)
@given(num_positions=st.integers(1, 200))
def test_a_sample_has_the_sequences_whose_numbers_it_returns(
    index: TokenIndex, num_positions: int
) -> None:
    whole = as_rows([index.read_split("train")])
    numbers, table = index.read_sample(num_positions=num_positions)
    assert as_rows([table]) == [whole[number] for number in numbers]
    assert len(set(numbers.tolist())) == len(numbers) >= 1
