"""Records of top_p and sampled from random logits, and what must come back from them."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retort.cache.codec import SparseTargets, TokenOrder
from retort.cache.entropy import (
    LOW,
    SCALE,
    Lookup,
    build_encoder,
    build_lookup,
    build_tables,
    count_symbols,
    encode_lanes,
    pack_tables,
    pull,
    split,
    unpack_tables,
)
from retort.cache.entropy_codec import EntropyCodec, Selection, hash_to_uniform
from retort.cache.methods import build_codec
from retort.cache.reader import CacheHeader
from retort.cache.sparse_streams import TAIL_UNIT, Streams
from retort.teacher.selection import select_probable
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable
from support.sections import section
from support.synthetic import TOKENIZER, make_header

WIDTH = 300
KEY = bytes(range(16))
METHODS = {
    "top_p": {"method": "top_p", "min_probability": 0.01},
    "sampled": {"method": "sampled", "head_probability": 0.05},
}


def make_codec(
    method: str, *, vocabulary: int = WIDTH, seed: int = 0
) -> tuple[EntropyCodec, TokenOrder]:
    counts = np.random.default_rng(seed).integers(0, 50, vocabulary)
    cache = section("cache", **METHODS[method], temperatures=[1.0, 2.0])
    codec = build_codec(cache, vocabulary=vocabulary, token_counts=counts)
    assert isinstance(codec, EntropyCodec)
    return codec, TokenOrder.from_counts(counts, vocabulary=vocabulary)


def make_logits(num_positions: int, *, seed: int, width: int = WIDTH) -> torch.Tensor:
    """Rows from nearly one-hot to nearly uniform."""
    rng = np.random.default_rng(seed)
    sharpness = rng.uniform(0, 6, (num_positions, 1))
    return torch.from_numpy(sharpness * rng.standard_normal((num_positions, width))).float()


def select(logits_PV: torch.Tensor, codec: EntropyCodec, *, key: bytes = KEY) -> Selection:
    width = logits_PV.shape[1]
    uniform_P = hash_to_uniform(key, np.arange(len(logits_PV)))
    return select_probable(logits_PV.clone(), codec, num_tokens=width, uniform_P=uniform_P)


def code(
    selection: Selection,
    codec: EntropyCodec,
    order: TokenOrder,
    next_ids: NDArray[Any],
    key: bytes = KEY,
) -> tuple[bytes, bytes, SparseTargets]:
    """Encode one sequence with tables of its own and decode it."""
    streams = codec.prepare(selection, order, next_ids=next_ids, key=key)
    (record,), packed = codec.encode([streams])
    return record, packed, decode(record, packed, codec, order, next_ids)


def decode(
    record: bytes, packed: bytes, codec: EntropyCodec, order: TokenOrder, next_ids: NDArray[Any]
) -> SparseTargets:
    return codec.decode(record, codec.open_tables(packed, order), next_ids=next_ids)


def as_rows(targets: SparseTargets) -> list[dict[int, float]]:
    """Each position's tokens with their probabilities."""
    rows = []
    for first, stop in pairwise(targets.offsets.tolist()):
        ids, probs = targets.ids[first:stop], np.exp(targets.logprobs[first:stop])
        assert len(set(ids.tolist())) == len(ids), "a token twice"
        rows.append(dict(zip(ids.tolist(), probs.tolist(), strict=True)))
    return rows


def assert_same(selection: Selection, found: SparseTargets, codec: EntropyCodec) -> None:
    """The very tokens; top_p: the very probabilities of the grid; sampled: within a step of it, rounded at random."""
    firsts = np.concatenate([[0], np.cumsum(selection.sizes)])
    sampled_stops = np.concatenate([[0], np.cumsum(selection.sampled_sizes)])
    for p, row in enumerate(as_rows(found)):
        exact = selection.ids[firsts[p] : firsts[p + 1]].tolist()
        sampled = selection.sampled_ids[sampled_stops[p] : sampled_stops[p + 1]].tolist()
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


def check_round_trip(method: str, *, seed: int, num_positions: int, is_wide: bool) -> None:
    """Encode and decode random distributions: what is decoded is what was selected."""
    width = 40_000 if is_wide else WIDTH
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


def coded_header(index: TokenIndex, method: str) -> CacheHeader:
    cache = section("cache", **METHODS[method], temperatures=[2.0, 1.0])
    codec = build_codec(cache, vocabulary=WIDTH, token_counts=index.read_token_counts())
    return make_header(index, codec)


def streams_of(table: SequenceTable, codec: EntropyCodec, order: TokenOrder) -> list[Streams]:
    """Every sequence's own distributions, from its content key alone."""
    found = []
    for i in range(len(table)):
        row = table[i]
        logits = make_logits(row.num_positions, seed=int.from_bytes(row.key[:4], "little"))
        uniform_P = hash_to_uniform(row.key, np.arange(row.num_positions))
        selection = select_probable(logits, codec, num_tokens=TOKENIZER.size, uniform_P=uniform_P)
        found.append(codec.prepare(selection, order, next_ids=row.next_ids, key=row.key))
    return found


def check_integers(pairs: list[tuple[int, int]]) -> None:
    """Code (context, integer) pairs: they come back, in as many bits as their statistics allow."""
    contexts = np.array([c for c, _ in pairs], np.uint16)
    values = np.array([v for _, v in pairs], np.uint32)
    counts = count_symbols([(contexts, values)], num_contexts=6)
    assert counts.sum() == len(pairs)
    tables = build_tables(counts)
    assert set(tables.sum(axis=1).tolist()) <= {0, SCALE}
    assert np.array_equal(tables > 0, counts > 0)
    assert np.array_equal(unpack_tables(pack_tables(tables), num_contexts=6), tables)
    lookup = build_lookup(tables)
    lanes = encode_lanes(contexts, values, len(pairs) // 3, build_encoder(tables))
    ideal = sum(
        split(v)[1] - np.log2(tables[c, split(v)[0]] / SCALE)
        for c, v in zip(contexts, values.tolist(), strict=True)
    )
    assert 32 * sum(map(len, lanes)) <= ideal + 2 * 65 + 0.01 * len(pairs)
    cut = len(pairs) // 3
    found = [
        pull_all(words, part, lookup)
        for words, part in zip(lanes, (contexts[:cut], contexts[cut:]), strict=True)
    ]
    assert found[0] + found[1] == values.tolist()


def pull_all(words: NDArray[np.uint32], contexts: NDArray[np.uint16], lookup: Lookup) -> list[int]:
    """What a decoder reads; it must end where the coder began."""
    state, place, values = int(words[0]) | (int(words[1]) << 32), 2, []
    for context in contexts.tolist():
        state, place, value = pull(state, place, words, context, lookup)
        values.append(value)
    assert (state, place) == (LOW, len(words))
    return values
