"""top_p and sampled: decoded distributions equal the selected ones within a step of the grid; samples are unbiased."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retort.cache.codec import TokenOrder
from retort.cache.entropy_codec import EntropyCodec, hash_to_uniform
from retort.cache.merged import merge_parts
from retort.cache.methods import build_codec
from retort.cache.parts import part_path, write_part
from retort.cache.reader import LogitCache
from retort.cache.sparse_streams import TAIL_UNIT
from retort.cache.stream_writer import sort_by_rank
from retort.teacher.selection import _separate, select_probable
from retort.tokens.index import TokenIndex
from support.coded import (
    KEY,
    METHODS,
    WIDTH,
    as_rows,
    assert_same,
    check_round_trip,
    code,
    coded_header,
    decode,
    make_codec,
    make_logits,
    select,
    streams_of,
)
from support.sections import section
from support.synthetic import CODEC, make_header, make_table, write_parts, write_tokens


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_positions", "is_wide"), [(1, True), (2, False), (40, False)])
def test_what_is_decoded_is_what_was_selected(
    method: str, num_positions: int, is_wide: bool
) -> None:
    check_round_trip(method, seed=num_positions, num_positions=num_positions, is_wide=is_wide)


EXTREMES = {
    "one-hot": torch.full((3, WIDTH), -1e4).index_fill(1, torch.tensor([7]), 0.0),
    "uniform": torch.zeros(3, WIDTH),
    "ties": torch.zeros(3, WIDTH).index_fill(1, torch.tensor([1, 2, 200]), 9.0),
    "two tokens": torch.zeros(3, 2),
    "one token": torch.zeros(3, 1),
    "-inf logits": torch.full((3, WIDTH), -torch.inf).index_fill(1, torch.tensor([1, 9]), 2.0),
    "far apart": torch.linspace(-3e4, 3e4, WIDTH).expand(3, WIDTH),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_vocabulary_is_coded_whole(method: str) -> None:
    width = 1 << 20
    codec, order = make_codec(method, vocabulary=width)
    rare = int(order.ids[-1])
    logits = torch.full((2, width), -20.0)
    logits[:, [rare, int(order.ids[0])]] = 1.0
    selection = select(logits, codec)
    found = code(selection, codec, order, np.array([rare, 5]))[2]
    assert_same(selection, found, codec)
    assert as_rows(found)[0][rare] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 4096, 4097, 70_000])
def test_tokens_are_sorted_by_rank_in_each_position(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    rank_of_id = rng.permutation(vocabulary)
    sizes = rng.integers(0, min(vocabulary, 90) + 1, 20)
    sizes[[0, 7]] = 0, vocabulary  # none, and all
    ids = np.concatenate([rng.permutation(vocabulary)[:size] for size in sizes])
    levels = rng.integers(1, 1025, len(ids))
    found, found_levels = sort_by_rank(sizes, ids, levels, rank_of_id)
    order = np.lexsort([rank_of_id[ids], np.repeat(np.arange(20), sizes)])
    np.testing.assert_array_equal(found, rank_of_id[ids][order])
    np.testing.assert_array_equal(found_levels, levels[order])
    if vocabulary > 1:
        with pytest.raises(AssertionError):
            sort_by_rank(np.array([2]), np.array([1, 1]), np.array([1, 1]), rank_of_id)
    with pytest.raises(AssertionError):
        sort_by_rank(np.array([1]), np.array([vocabulary]), np.array([1]), rank_of_id)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_distributions_come_back(method: str, name: str) -> None:
    logits = EXTREMES[name]
    codec, order = make_codec(method, vocabulary=logits.shape[1])
    selection = select(logits, codec)
    found = code(selection, codec, order, np.array([0, 1, 1]) % logits.shape[1])[2]
    assert_same(selection, found, codec)
    total = [sum(row.values()) for row in as_rows(found)]
    if method == "top_p":
        total += np.exp(found.tail_logprobs[:, 0])
    assert np.allclose(total, 1, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_ids_beyond_the_tokenizer_are_never_kept(method: str) -> None:
    codec, _ = make_codec(method)
    logits = torch.zeros(4, WIDTH)
    logits[:, 290:] = 50.0
    found = select_probable(logits, codec, num_tokens=290, uniform_P=np.full(4, 0.5))
    assert found.ids.max(initial=0) < 290 and found.sampled_ids.max(initial=0) < 290


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_stores_nothing(method: str) -> None:
    logits = torch.zeros(4, WIDTH)
    logits[2, 5] = torch.nan
    with pytest.raises(ValueError, match="token 5 is nan at row 2"):
        select(logits, make_codec(method)[0])


def test_a_position_does_not_depend_on_how_its_sequence_was_cut() -> None:
    codec, _ = make_codec("sampled")
    logits = make_logits(20, seed=3)
    whole = select(logits, codec)
    cut = [
        select_probable(
            logits[a:b].clone(),
            codec,
            num_tokens=WIDTH,
            uniform_P=hash_to_uniform(KEY, np.arange(a, b)),
        )
        for a, b in ((0, 7), (7, 20))
    ]
    for name in vars(whole):
        assert np.array_equal(
            getattr(whole, name), np.concatenate([getattr(c, name) for c in cut])
        ), name


@pytest.mark.parametrize("num_samples", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_samples_are_unbiased_and_vary_less_than_sampling_with_replacement(
    num_samples: int,
) -> None:
    codec, order = make_codec("sampled")
    logits = make_logits(6, seed=1)
    probs = logits.double().softmax(dim=-1).numpy()
    total, squares, kept = np.zeros_like(probs), np.zeros_like(probs), 0.0
    for number in range(num_samples):
        key = number.to_bytes(8, "little") * 2
        selection = select(logits, codec, key=key)
        kept += selection.sizes.sum() + selection.sampled_sizes.sum()
        found = code(selection, codec, order, np.zeros(6, np.int64), key)[2]
        for p, row in enumerate(as_rows(found)):
            for token, value in row.items():
                total[p, token] += value
                squares[p, token] += value**2
    mean = total / num_samples
    variance = squares / num_samples - mean**2
    # The variance of a token that was hardly ever sampled is not known from the samples; p times its weight bounds it.
    standard_error = np.sqrt(
        np.maximum(variance, probs * METHODS["sampled"]["head_probability"]) / num_samples
    )
    # Below 1/65,535 the tail's mass is rounded down; a row's scaling to sum to one is of second order in its step.
    bias = np.abs(mean - probs) - 2 / TAIL_UNIT - probs / codec.steps**2
    assert np.all(bias <= 5 * standard_error + 1e-9), (bias - 5 * standard_error).max()
    tokens_kept = kept / (num_samples * len(probs))
    with_replacement = (1 - (probs**2).sum(axis=1)) / tokens_kept
    assert variance.sum(axis=1).mean() < 0.7 * with_replacement.mean()


def test_a_token_sampled_twice_by_rounding_is_replaced_by_the_most_probable_one_left() -> None:
    rest_PV = torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25, 0.0]])
    ids, rows = np.array([1, 1, 4, 3, 3]), np.array([0, 0, 0, 1, 1])
    assert _separate(ids, rows, rest_PV).tolist() == [1, 3, 4, 3, 0]


def test_uniform_numbers_are_uniform_and_depend_on_key_and_place_alone() -> None:
    places = np.arange(100_000)
    found = hash_to_uniform(KEY, places)
    assert found.min() >= 0 and found.max() < 1
    assert np.allclose(np.histogram(found, 20, (0, 1))[0] / 5000, 1, atol=0.08)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
    assert hash_to_uniform(KEY, places[500:501])[0] == found[500]
    assert not np.array_equal(hash_to_uniform(KEY[::-1], places), found)


@pytest.mark.parametrize("method", METHODS)
def test_a_record_that_was_cut_or_changed_is_refused_or_says_the_same(method: str) -> None:
    codec, order = make_codec(method)
    next_ids = np.arange(30)
    record, packed, whole = code(select(make_logits(30, seed=5), codec), codec, order, next_ids)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(record)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(12, len(record))]
        try:
            found = decode(bytes(damaged), packed, codec, order, next_ids)
        except ValueError:
            refused += 1
            continue
        assert len(found) == len(whole)  # low bits only: the record's checksum is what tells
    assert refused > 100


# ---------------------------------------------------------------------------------------------------------
# In a cache


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> TokenIndex:
    tables = [make_table(9, seed=0), make_table(7, seed=1, first_document=100)]
    return write_tokens(tmp_path_factory.mktemp("tokens"), tables, chunk_size=3)


def make_merged(folder: Path, index: TokenIndex, method: str) -> Path:
    """Write every part and merge them."""
    if method == "top_k":
        header = make_header(index, CODEC)
        write_parts(index, folder / "parts", header)
    else:
        header = coded_header(index, method)
        assert isinstance(header.codec, EntropyCodec)
        order = header.codec.order_tokens(index.read_token_counts())
        (folder / "parts").mkdir(parents=True)
        for part in index.parts:
            table = index.read_part(part)
            path = part_path(folder / "parts", part.name, header)
            write_part(path, table, streams_of(table, header.codec, order), header, order)
    merge_parts(index, folder / "parts", header, folder / "teacher_logits.h5")
    return folder / "teacher_logits.h5"


@pytest.mark.parametrize("method", ["top_k", *METHODS])
def test_the_documented_reader_reads_a_cache_as_ours_does(
    method: str, index: TokenIndex, tmp_path: Path
) -> None:
    merged = make_merged(tmp_path, index, method)
    page = (Path(__file__).resolve().parents[3] / "docs" / "cache-format.md").read_text(
        encoding="utf-8"
    )
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    cache = LogitCache(merged)
    found = list(names["read_cache"](merged))
    assert len(found) == len(cache)
    for i, (ids, positions, rows) in enumerate(found):
        table, targets = cache.table[i], cache.read_targets(i)
        assert ids.tolist() == table.ids.tolist()
        assert positions.tolist() == np.flatnonzero(table.loss_mask).tolist()
        assert len(rows) == len(targets)
        for (kept, tails), mine, tail in zip(
            rows, as_rows(targets), targets.tail_logprobs, strict=True
        ):
            kept = {k: np.exp(v) for k, v in kept.items() if v > -10_000}
            assert sorted(kept) == sorted(k for k, v in mine.items() if v > 0)
            assert all(kept[k] == pytest.approx(mine[k], rel=1e-5) for k in kept)
            if method != "sampled":  # whose tail is the mass of the sampled tokens
                assert np.allclose(tails, tail, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_cache_says_what_its_parts_say(
    method: str, index: TokenIndex, tmp_path: Path
) -> None:
    merged = LogitCache(make_merged(tmp_path, index, method))
    header = coded_header(index, method)
    place = 0
    for part in index.parts:
        cache = LogitCache(part_path(tmp_path / "parts", part.name, header))
        for i in range(len(cache)):
            mine, theirs = merged.read_targets(place), cache.read_targets(i)
            assert as_rows(mine) == as_rows(theirs)
            assert mine.tail_logprobs.tolist() == theirs.tail_logprobs.tolist()
            place += 1
    assert place == len(merged)
    again = make_merged(tmp_path / "again", index, method)
    assert again.read_bytes() == merged.path.read_bytes()


@pytest.mark.parametrize(("method", "least"), [("top_p", 0.001), ("sampled", 0.05)])
def test_a_method_alone_is_a_whole_config(method: str, least: float) -> None:
    codec = build_codec(section("cache", method=method), vocabulary=WIDTH)
    assert isinstance(codec, EntropyCodec)
    assert codec.min_probability == least
    assert codec.temperatures == ((1.0, 2.0) if method == "top_p" else (1.0,))


def test_another_order_of_tokens_is_refused(index: TokenIndex, tmp_path: Path) -> None:
    header = coded_header(index, "top_p")
    assert isinstance(header.codec, EntropyCodec)
    order = header.codec.order_tokens(index.read_token_counts())
    table = index.read_part(index.parts[0])
    other = TokenOrder.from_ids(order.ids[::-1])
    streams = streams_of(table, header.codec, order)
    with pytest.raises(ValueError, match="order of tokens is not the one"):
        write_part(tmp_path / "part.h5", table, streams, header, other)
    assert not list(tmp_path.iterdir())
