"""Records of top_k: decoded targets equal the encoded ones within the error of float16."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from retort.cache.codec import Codec, SparseTargets
from retort.cache.entropy_codec import EntropyCodec, choose_steps
from retort.cache.methods import build_codec, read_codec
from retort.cache.top_k_codec import TopKCodec
from retort.config.sections import Cache
from support.synthetic import CODEC, CODED, assert_close, decode, make_targets

WIDE = TopKCodec((0.5, 1.0, 3.0), (1 << 16) + 1, 12)


@pytest.mark.parametrize("codec", [CODEC, WIDE], ids=["narrow", "wide"])
def test_any_record_comes_back_within_the_error_of_float16(codec: TopKCodec) -> None:
    for num_positions in (0, 1, 5):
        targets = make_targets(num_positions, codec, seed=num_positions)
        payload = codec.encode_record(targets)
        assert_close(decode(payload, codec, num_positions=num_positions), targets)
        assert len(zstandard.ZstdDecompressor().decompress(payload)) == (
            num_positions * codec.bytes_per_position
        )


def test_what_was_decoded_is_encoded_to_the_same_bytes() -> None:
    payload = CODEC.encode_record(make_targets(40, CODEC, seed=0))
    assert CODEC.encode_record(decode(payload, CODEC, num_positions=40)) == payload


def softmax_targets(logits: NDArray[Any], codec: TopKCodec) -> SparseTargets:
    """The K most probable tokens of rows of logits [P, V], and the tail at temperature 1."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : codec.top_k]
    kept = np.take_along_axis(logprobs, ids, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(0.0, 1.0 - np.exp(kept).sum(axis=1, keepdims=True)))
    return SparseTargets.from_rows(
        ids.astype(np.int32), kept.astype(np.float32), tail.astype(np.float32)
    )


ONE_HOT = np.where(np.eye(4, 50) == 1, 0.0, -np.inf)
UNIFORM = np.zeros((4, 50))
TIES = np.repeat(np.arange(10.0), 5)[None]
MASKED = np.concatenate([np.zeros((4, 20)), np.full((4, 30), -np.inf)], axis=1)


@pytest.mark.parametrize("top_k", [1, 7, 50])
@pytest.mark.parametrize("logits", [ONE_HOT, UNIFORM, TIES, MASKED], ids=range(4))
def test_extreme_distributions_survive(logits: NDArray[Any], top_k: int) -> None:
    codec = TopKCodec((1.0,), 50, top_k)
    targets = softmax_targets(logits, codec)
    found = decode(codec.encode_record(targets), codec, num_positions=len(logits))
    assert_close(found, targets)
    assert np.isfinite(found.logprobs).all()
    assert np.isfinite(found.tail_logprobs).all()
    mass = np.exp(found.to_rows()[1]).sum(axis=1) + np.exp(found.tail_logprobs).sum(axis=1)
    assert np.abs(mass - 1).max() < 2e-3
    if top_k == 50:
        assert np.exp(found.tail_logprobs).max() < 1e-6


def test_the_highest_ids_of_narrow_and_wide_vocabularies_survive() -> None:
    for vocabulary, size in ((1 << 16, 2), ((1 << 16) + 1, 4), (262_144, 4)):
        codec = TopKCodec((1.0,), vocabulary, 2)
        ids = np.array([[vocabulary - 1, 0]], dtype=np.int32)
        targets = SparseTargets.from_rows(
            ids, np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32)
        )
        found = decode(codec.encode_record(targets), codec, num_positions=1)
        assert found.to_rows()[0].tolist() == ids.tolist()
        assert codec.id_dtype.itemsize == size


def test_bytes_that_are_no_record_are_refused() -> None:
    payload = CODEC.encode_record(make_targets(3, CODEC, seed=0))
    for damaged in (b"", b"\x28\xb5\x2f\xfd", payload[:-1], payload[1:], payload[:9]):
        with pytest.raises(ValueError, match="the cache is damaged"):
            decode(damaged, CODEC, num_positions=3)
    with pytest.raises(ValueError, match="a record of 4 positions has"):
        decode(payload, CODEC, num_positions=4)


def test_a_record_that_claims_to_be_huge_is_refused_before_it_is_unpacked() -> None:
    header = zstandard.ZstdCompressor().compress(bytes(100))[:4]
    claim = header + b"\xe0" + (1 << 50).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError, match="the cache is damaged"):
        decode(claim, CODEC, num_positions=3)


def test_rows_of_another_shape_than_the_codec_says_are_our_own_mistake() -> None:
    targets = make_targets(3, CODEC, seed=0)
    with pytest.raises(AssertionError):
        replace(CODEC, top_k=3).encode_record(targets)
    with pytest.raises(AssertionError):
        replace(CODEC, temperatures=(1.0,)).encode_record(targets)


def test_slices_of_targets_are_targets() -> None:
    targets = make_targets(9, CODEC, seed=0)
    piece = targets[2:5]
    assert len(piece) == 3
    for mine, whole in zip(piece.to_rows(), targets.to_rows(), strict=True):
        assert mine.tolist() == whole[2:5].tolist()
    assert piece.tail_logprobs.tolist() == targets.tail_logprobs[2:5].tolist()


@pytest.mark.parametrize("codec", [CODEC, WIDE, *CODED.values()])
def test_a_codec_travels_as_json(codec: Codec) -> None:
    assert read_codec(codec.to_json()) == codec


def cache_section(**values: Any) -> Cache:
    section: Cache = Cache.model_validate(values)
    return section


@pytest.mark.parametrize(
    ("top_k", "vocabulary", "expected"),
    [(64, 300, 64), (64, 32, 32), ("full", 300, 300), (1, 1, 1)],
)
def test_top_k_never_exceeds_the_vocabulary(
    top_k: int | str, vocabulary: int, expected: int
) -> None:
    codec = build_codec(cache_section(top_k=top_k), vocabulary=vocabulary)
    assert isinstance(codec, TopKCodec)
    assert codec.top_k == expected
    assert codec.is_complete == (expected == vocabulary)


def test_a_cache_that_could_not_be_measured_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"cache.temperatures is \[2.0, 4.0\].*\[1.0, 2.0, 4.0\]"):
        build_codec(cache_section(temperatures=[2.0, 4.0]), vocabulary=300)


def test_what_no_record_can_be_coded_with_is_refused() -> None:
    good = EntropyCodec((1.0,), 300, "top_p", 0.01, 43, "0" * 32)
    for changes in ({"steps": 1024}, {"steps": 0}, {"vocabulary": (1 << 20) + 1}):
        with pytest.raises(
            ValueError, match=str(*changes.values()).replace("1048577", "1,048,577")
        ):
            read_codec(good.to_json() | changes)
    assert choose_steps("top_p", 1e-12) == choose_steps("sampled", 1e-12) == 1023
