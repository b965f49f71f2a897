"""top_p and sampled: what is decoded is what was selected, within the grid's step; draws are unbiased."""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retort.cache.codec import Codec, SparseTargets, TokenOrder, build_codec
from retort.cache.entropy import (
    LOW,
    NUM_SYMBOLS,
    SCALE,
    Lookup,
    build_lookup,
    build_tables,
    count_symbols,
    encode_words,
    pack_tables,
    pull,
    split,
    unpack_tables,
)
from retort.cache.merged import merge_parts
from retort.cache.parts import find_order, part_path, write_part
from retort.cache.reader import CacheHeader, LogitCache
from retort.cache.sparse_codec import (
    Selection,
    decode_streams,
    draw_uniform,
    encode_streams,
    to_streams,
)
from retort.cache.sparse_streams import TAIL_UNIT, Streams, count_contexts
from retort.teacher.selection import _separate, select_probable
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from support.synthetic import CODEC, TOKENIZER, make_header, make_table, write_parts, write_tokens
from support.tiny import section

WIDTH = 300
KEY = bytes(range(16))
METHODS = {
    "top_p": {"method": "top_p", "min_probability": 0.01},
    "sampled": {"method": "sampled", "head_probability": 0.05},
}


def make_codec(method: str, *, vocabulary: int = WIDTH, seed: int = 0) -> tuple[Codec, TokenOrder]:
    counts = np.random.default_rng(seed).integers(0, 50, vocabulary)
    cache = section("cache", **METHODS[method], temperatures=[1.0, 2.0])
    codec = build_codec(cache, vocabulary=vocabulary, token_counts=counts)
    return codec, TokenOrder.from_counts(counts, vocabulary=vocabulary)


def make_logits(num_positions: int, *, seed: int, width: int = WIDTH) -> torch.Tensor:
    """Rows from nearly one-hot to nearly uniform."""
    chance = np.random.default_rng(seed)
    sharpness = chance.uniform(0, 6, (num_positions, 1))
    return torch.from_numpy(sharpness * chance.standard_normal((num_positions, width))).float()


def select(logits_PV: torch.Tensor, codec: Codec, *, key: bytes = KEY) -> Selection:
    width = logits_PV.shape[1]
    uniform_P = draw_uniform(key, np.arange(len(logits_PV)))
    return select_probable(logits_PV.clone(), codec, num_tokens=width, uniform_P=uniform_P)


def code(
    selection: Selection, codec: Codec, order: TokenOrder, next_ids: NDArray[Any], key: bytes = KEY
) -> tuple[bytes, bytes, SparseTargets]:
    """Encode one sequence with tables of its own and decode it."""
    streams = to_streams(selection, codec, order, next_ids=next_ids, key=key)
    (record,), packed = encode_streams([streams], codec)
    return record, packed, decode(record, packed, codec, order, next_ids)


def decode(
    record: bytes, packed: bytes, codec: Codec, order: TokenOrder, next_ids: NDArray[Any]
) -> SparseTargets:
    tables = unpack_tables(packed, num_contexts=count_contexts(len(codec.temperatures)))
    return decode_streams(record, codec, order, build_lookup(tables), next_ids=next_ids)


def as_rows(targets: SparseTargets) -> list[dict[int, float]]:
    """Each position's tokens with their probabilities."""
    rows = []
    for first, stop in pairwise(targets.offsets.tolist()):
        ids, probs = targets.ids[first:stop], np.exp(targets.logprobs[first:stop])
        assert len(set(ids.tolist())) == len(ids), "a token twice"
        rows.append(dict(zip(ids.tolist(), probs.tolist(), strict=True)))
    return rows


def assert_same(selection: Selection, found: SparseTargets, codec: Codec) -> None:
    """The very tokens; top_p: the very probabilities of the grid; sampled: within a step of it, drawn by chance."""
    assert codec.steps is not None
    firsts = np.concatenate([[0], np.cumsum(selection.sizes)])
    drawn = np.concatenate([[0], np.cumsum(selection.drawn_sizes)])
    for p, row in enumerate(as_rows(found)):
        exact = selection.ids[firsts[p] : firsts[p + 1]].tolist()
        sampled = selection.drawn_ids[drawn[p] : drawn[p + 1]].tolist()
        assert sorted(row) == sorted(exact + sampled)
        tail = selection.tails[p, 0] / TAIL_UNIT
        assert sum(row[i] for i in sampled) == pytest.approx(tail if sampled else 0, rel=1e-5)
        if not exact:
            continue
        assert sum(row[i] for i in exact) == pytest.approx(
            max(1 - tail, 0.25 / TAIL_UNIT), rel=1e-5
        )
        roots = np.sqrt(selection.probs[firsts[p] : firsts[p + 1]]) * codec.steps
        found_probs = np.array([row[i] for i in exact])
        mass = max(1 - tail, 0.25 / TAIL_UNIT)
        if codec.method == "top_p":
            squares = np.maximum(1, np.rint(roots)) ** 2
            assert found_probs == pytest.approx(mass * squares / squares.sum(), rel=1e-5)
        else:
            # A row is scaled to the mass that the tail leaves: its levels may all be off by one to the same side.
            low, high = np.maximum(1, np.floor(roots)), np.floor(roots) + 1
            assert np.all(found_probs >= mass * low**2 / (high**2).sum() * (1 - 1e-5))
            assert np.all(found_probs <= mass * high**2 / (low**2).sum() * (1 + 1e-5))


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 2**31), num_positions=st.integers(1, 40), wide=st.booleans())
@settings(max_examples=25)
def test_what_is_decoded_is_what_was_selected(
    method: str, seed: int, num_positions: int, wide: bool
) -> None:
    width = 40_000 if wide else WIDTH
    codec, order = make_codec(method, vocabulary=width, seed=seed)
    selection = select(make_logits(num_positions, seed=seed, width=width), codec)
    next_ids = np.random.default_rng(seed).integers(0, width, num_positions)
    if len(selection.ids):
        next_ids[::2] = selection.ids[0]  # often kept, as the text's own tokens are
    record, packed, found = code(selection, codec, order, next_ids)
    assert_same(selection, found, codec)
    assert (record, packed) == code(selection, codec, order, next_ids)[:2]
    if method == "top_p":
        tails = np.log(np.maximum(selection.tails, 0.25) / TAIL_UNIT)
        assert np.allclose(found.tail_logprobs, tails, atol=1e-6)


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
    assert found.ids.max(initial=0) < 290 and found.drawn_ids.max(initial=0) < 290


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
            uniform_P=draw_uniform(KEY, np.arange(a, b)),
        )
        for a, b in ((0, 7), (7, 20))
    ]
    for name in vars(whole):
        assert np.array_equal(
            getattr(whole, name), np.concatenate([getattr(c, name) for c in cut])
        ), name


@pytest.mark.parametrize("num_draws", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_draws_are_unbiased_and_vary_less_than_draws_with_replacement(num_draws: int) -> None:
    codec, order = make_codec("sampled")
    logits = make_logits(6, seed=1)
    probs = logits.double().softmax(dim=-1).numpy()
    total, squares, kept = np.zeros_like(probs), np.zeros_like(probs), 0.0
    for draw in range(num_draws):
        key = draw.to_bytes(8, "little") * 2
        selection = select(logits, codec, key=key)
        kept += selection.sizes.sum() + selection.drawn_sizes.sum()
        found = code(selection, codec, order, np.zeros(6, np.int64), key)[2]
        for p, row in enumerate(as_rows(found)):
            for token, value in row.items():
                total[p, token] += value
                squares[p, token] += value**2
    mean = total / num_draws
    variance = squares / num_draws - mean**2
    # Of a token that was hardly ever drawn, the draws do not tell the variance; p times its weight does.
    standard_error = np.sqrt(
        np.maximum(variance, probs * METHODS["sampled"]["head_probability"]) / num_draws
    )
    # Below 1/65,535 the tail's mass is rounded down; a row's scaling to sum to one is of second order in its step.
    assert codec.steps is not None
    bias = np.abs(mean - probs) - 2 / TAIL_UNIT - probs / codec.steps**2
    assert np.all(bias <= 5 * standard_error + 1e-9), (bias - 5 * standard_error).max()
    draws = kept / (num_draws * len(probs))
    with_replacement = (1 - (probs**2).sum(axis=1)) / draws
    assert variance.sum(axis=1).mean() < 0.7 * with_replacement.mean()


def test_a_token_that_rounding_draws_twice_gives_way_to_the_most_probable_one_left() -> None:
    rest_PV = torch.tensor([[0.0, 0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25, 0.0]])
    ids, rows = np.array([1, 1, 4, 3, 3]), np.array([0, 0, 0, 1, 1])
    assert _separate(ids, rows, rest_PV).tolist() == [1, 3, 4, 3, 0]


def test_uniform_numbers_are_uniform_and_depend_on_key_and_place_alone() -> None:
    places = np.arange(100_000)
    found = draw_uniform(KEY, places)
    assert found.min() >= 0 and found.max() < 1
    assert np.allclose(np.histogram(found, 20, (0, 1))[0] / 5000, 1, atol=0.08)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01
    assert draw_uniform(KEY, places[500:501])[0] == found[500]
    assert not np.array_equal(draw_uniform(KEY[::-1], places), found)


# ---------------------------------------------------------------------------------------------------------
# Entropy coding


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**21 - 1)), max_size=200))
def test_any_integers_take_what_their_statistics_allow(pairs: list[tuple[int, int]]) -> None:
    contexts = np.array([c for c, _ in pairs], np.uint16)
    values = np.array([v for _, v in pairs], np.uint32)
    counts = count_symbols(contexts, values, num_contexts=6)
    assert counts.sum() == len(pairs)
    tables = build_tables(counts)
    assert set(tables.sum(axis=1).tolist()) <= {0, SCALE}
    assert np.array_equal(tables > 0, counts > 0)
    assert np.array_equal(unpack_tables(pack_tables(tables), num_contexts=6), tables)
    lookup = build_lookup(tables)
    words = encode_words(contexts, values, lookup)
    ideal = sum(
        split(v)[1] - np.log2(tables[c, split(v)[0]] / SCALE)
        for c, v in zip(contexts, values.tolist(), strict=True)
    )
    assert 32 * len(words) <= ideal + 65 + 0.01 * len(pairs)
    assert pull_all(words, contexts, lookup) == values.tolist()


def pull_all(words: NDArray[np.uint32], contexts: NDArray[np.uint16], lookup: Lookup) -> list[int]:
    """What a decoder reads; it must end where the coder began."""
    state, place, values = int(words[0]) | (int(words[1]) << 32), 2, []
    for context in contexts.tolist():
        state, place, value = pull(state, place, words, context, lookup)
        values.append(value)
    assert (state, place) == (LOW, len(words))
    return values


def test_machine_code_is_kept_apart_for_every_state_of_its_sources(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[3] / "src" / "retort"
    shutil.copytree(source, tmp_path / "retort", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import numba, retort.cache.sparse_streams; print(numba.config.CACHE_DIR)"
    found = []
    for comment in ("", "", "# another\n"):
        with (tmp_path / "retort" / "cache" / "entropy.py").open("a") as file:
            file.write(comment)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(Path(done.stdout.strip()))
    assert found[0] == found[1] != found[2]
    assert all(path.is_dir() and path.is_relative_to(tmp_path) for path in found)


def test_tables_stay_whole_however_rare_their_symbols() -> None:
    counts = np.ones((1, NUM_SYMBOLS), np.int64)
    counts[0, 3] = 10**12
    tables = build_tables(counts)
    assert tables.sum() == SCALE and tables.min() == 1


def test_a_damaged_table_is_refused() -> None:
    tables = np.zeros((2, NUM_SYMBOLS), np.uint16)
    tables[0, 0] = SCALE - 1
    with pytest.raises(ValueError, match=f"do not sum to {SCALE}"):
        unpack_tables(pack_tables(tables), num_contexts=2)
    with pytest.raises(ValueError, match="damaged"):
        unpack_tables(b"nonsense", num_contexts=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_record_that_was_cut_or_changed_is_refused_or_says_the_same(method: str) -> None:
    codec, order = make_codec(method)
    next_ids = np.arange(30)
    record, packed, whole = code(select(make_logits(30, seed=5), codec), codec, order, next_ids)
    chance = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(record)
        damaged[chance.integers(len(damaged))] ^= 1 << chance.integers(8)
        if chance.random() < 0.3:
            damaged = damaged[: chance.integers(12, len(record))]
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


def coded_header(index: TokenIndex, method: str) -> CacheHeader:
    cache = section("cache", **METHODS[method], temperatures=[2.0, 1.0])
    codec = build_codec(cache, vocabulary=WIDTH, token_counts=index.read_token_counts())
    return make_header(index, codec)


def streams_of(table: SequenceTable, codec: Codec, order: TokenOrder) -> list[Streams]:
    """Every sequence's own distributions, from its content key alone."""
    found = []
    for i in range(len(table)):
        row = table[i]
        logits = make_logits(row.num_positions, seed=int.from_bytes(row.key[:4], "little"))
        uniform_P = draw_uniform(row.key, np.arange(row.num_positions))
        selection = select_probable(
            logits, codec, num_tokens=TOKENIZER["size"], uniform_P=uniform_P
        )
        next_ids = row.ids[1:][row.loss_mask[:-1]]
        found.append(to_streams(selection, codec, order, next_ids=next_ids, key=row.key))
    return found


def make_merged(folder: Path, index: TokenIndex, method: str) -> Path:
    """Write every part and merge them."""
    if method == "top_k":
        header = make_header(index, CODEC)
        write_parts(index, folder / "parts", header)
    else:
        header = coded_header(index, method)
        order = find_order(index, header.codec)
        assert order is not None
        (folder / "parts").mkdir(parents=True)
        for part in index.parts:
            table = index.read_part(part)
            path = part_path(folder / "parts", part["name"], header)
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
            if method != "sampled":  # whose tail is what was drawn
                assert np.allclose(tails, tail, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_cache_says_what_its_parts_say(
    method: str, index: TokenIndex, tmp_path: Path
) -> None:
    merged = LogitCache(make_merged(tmp_path, index, method))
    header = coded_header(index, method)
    place = 0
    for part in index.parts:
        cache = LogitCache(part_path(tmp_path / "parts", part["name"], header))
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
    assert codec.min_probability == least
    assert codec.temperatures == ((1.0, 2.0) if method == "top_p" else (1.0,))


def test_another_order_of_tokens_is_refused(index: TokenIndex, tmp_path: Path) -> None:
    header = coded_header(index, "top_p")
    order = find_order(index, header.codec)
    assert order is not None
    table = index.read_part(index.parts[0])
    other = TokenOrder.from_ids(order.ids[::-1])
    streams = streams_of(table, header.codec, order)
    with pytest.raises(ValueError, match="order of tokens is not the one"):
        write_part(tmp_path / "part.h5", table, streams, header, other)
    assert not list(tmp_path.iterdir())
