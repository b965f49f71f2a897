"""Records of top_k: any targets come back within the error of float16, and damaged bytes are refused."""

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from retort.cache.codec import SparseTargets
from retort.cache.methods import read_codec
from retort.cache.top_k_codec import TopKCodec
from support.synthetic import CODEC, assert_close, decode, make_targets

widths = st.sampled_from([2, 300, 1 << 16, (1 << 16) + 1, 1 << 18])


@st.composite
def codecs(draw: st.DrawFn) -> TopKCodec:
    vocabulary = draw(widths)
    top_k = draw(st.integers(1, min(vocabulary, 12)))
    temperatures = draw(st.lists(st.floats(0.1, 9), min_size=1, max_size=3, unique=True))
    return TopKCodec(tuple(temperatures), vocabulary, top_k)


@st.composite
def encodable(draw: st.DrawFn, min_rows: int = 0) -> tuple[TopKCodec, SparseTargets]:
    codec, rows = draw(codecs()), draw(st.integers(min_rows, 5))
    logprobs = st.floats(-2e4, 0, width=32) | st.just(-np.inf)
    shape = (rows, codec.top_k)
    return codec, SparseTargets.from_rows(
        draw(arrays.arrays(np.int32, shape, elements=st.integers(0, codec.vocabulary - 1))),
        draw(arrays.arrays(np.float32, shape, elements=logprobs)),
        draw(arrays.arrays(np.float32, (rows, len(codec.temperatures)), elements=logprobs)),
    )


@given(encodable())
def test_any_record_comes_back_within_the_error_of_float16(
    found: tuple[TopKCodec, SparseTargets],
) -> None:
    codec, targets = found
    payload = codec.encode_record(targets)
    assert_close(decode(payload, codec, num_positions=len(targets)), targets)
    assert payload == codec.encode_record(targets)


@given(encodable(min_rows=1), st.data())
def test_a_record_cut_short_is_refused(
    found: tuple[TopKCodec, SparseTargets], data: st.DataObject
) -> None:
    codec, targets = found
    payload = codec.encode_record(targets)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ValueError, match="the cache is damaged"):
        decode(payload[:cut], codec, num_positions=len(targets))


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_record_of_another_number_of_positions_is_refused(stored: int, asked: int) -> None:
    payload = CODEC.encode_record(make_targets(stored, CODEC, seed=0))
    if stored == asked:
        assert len(decode(payload, CODEC, num_positions=asked)) == stored
    else:
        with pytest.raises(ValueError, match=f"a record of {asked} positions has"):
            decode(payload, CODEC, num_positions=asked)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: b"\x28\xb5\x2f\xfd" + b))
def test_bytes_that_are_no_record_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="the cache is damaged"):
        decode(payload, CODEC, num_positions=3)


@given(codecs())
def test_a_codec_travels_as_json(codec: TopKCodec) -> None:
    assert read_codec(codec.to_json()) == codec


@given(encodable())
def test_the_planned_size_bounds_the_columns(found: tuple[TopKCodec, SparseTargets]) -> None:
    codec, targets = found
    raw = zstandard.ZstdDecompressor().decompress(codec.encode_record(targets))
    assert len(raw) == len(targets) * codec.bytes_per_position
