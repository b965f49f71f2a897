"""Every document is in exactly one shard; reading resumes at the end of any window of a shuffle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retort.config.sections import Dataset
from retort.corpus.reading import CorpusReader
from support.corpora import make_stream, read_all, read_shards, write_numbered
from support.sections import replace


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    num_shards=st.integers(1, 200),
    sharding=st.sampled_from(["interleaved", "contiguous"]),
    max_samples=st.none() | st.integers(1, 200),
    shuffle=st.booleans(),
)
def test_every_document_is_in_exactly_one_shard(
    numbered: Dataset, num_shards: int, sharding: str, max_samples: int | None, shuffle: bool
) -> None:
    dataset = replace(numbered, sharding=sharding, max_samples=max_samples, shuffle=shuffle)
    whole = read_all(replace(dataset, sharding="interleaved"))
    shards, counts = read_shards(dataset, num_shards)
    assert sorted((d for shard in shards for d in shard), key=lambda d: d.index) == whole
    assert counts.read == min(137, max_samples or 137)
    assert all([d.index for d in shard] == sorted(d.index for d in shard) for shard in shards)


@settings(max_examples=40)
@given(
    shuffle=st.booleans(),
    window=st.integers(1, 30),
    max_samples=st.integers(1, 70),
    stop=st.integers(1, 70),
    shard=st.none() | st.integers(0, 1),
)
def test_reading_resumes_at_any_window_with_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory,
    shuffle: bool,
    window: int,
    max_samples: int,
    stop: int,
    shard: int | None,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "resumed"
    stream = make_stream(folder, files=4, rows=15, num_shards=2, max_samples=max_samples)
    stream = replace(stream, shuffle=shuffle, streaming_buffer_size=window)
    stream = stream if shard is None else replace(stream, sharding="files")
    whole = [(index, row()) for index, _, row in CorpusReader(stream, shard=shard)]
    first = CorpusReader(stream, shard=shard)
    seen = []
    for index, _, row in first:
        seen.append((index, row()))
        if len(seen) >= stop and first.cursor.documents % first.window == 0:
            break
    rest = CorpusReader(stream, shard=shard, cursor=first.cursor)
    assert seen + [(index, row()) for index, _, row in rest] == whole
    longer = replace(stream, max_samples=max_samples + 20)
    assert [(i, row()) for i, _, row in CorpusReader(longer, shard=shard)][: len(whole)] == whole
