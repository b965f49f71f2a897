"""What each way of the quality benchmark gives a student of the teacher's distributions, and in how many bytes.

Legend: P training positions, T those of a sequence, V vocabulary, K most ids kept at any position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from cache import find_codec
from cache_logits import Distributions, say
from cache_opponents import Stored, draw_rs_kd, keep_top_k

from retort.codec import LOGPROB_FLOOR, SparseTargets, TokenOrder
from retort.entropy import build_lookup, unpack_tables
from retort.fused_loss import TeacherRows
from retort.selection import select_probable
from retort.sparse_codec import (
    Selection,
    decode_streams,
    draw_uniform,
    encode_streams,
    to_streams,
)
from retort.sparse_streams import Streams, count_contexts

CHUNK = 16  # positions selected at once: three times as fast as all 512


@dataclass(frozen=True)
class Targets:
    """A way's targets at P positions, and the bytes that a position took."""

    bytes_per_position: float
    sparse: SparseTargets

    def rows(self, positions: slice) -> TeacherRows:
        """Return some positions as the loss takes them."""
        found = self.sparse[positions]
        tails = np.ascontiguousarray(found.tail_logprobs[:, 0])
        columns = (found.offsets, found.ids.astype(np.int64), found.logprobs, tails)
        return TeacherRows(*map(torch.from_numpy, columns))


def code_ours(given: Distributions, num_train: int, method: str, dial: float) -> Targets:
    """Select, encode and decode the first num_train sequences: what a cache gives back, its tables counted."""
    codec = find_codec(method, dial, given)
    order = TokenOrder.from_counts(given.unigram_counts, vocabulary=codec.vocabulary)
    length = given.tokens.shape[1]
    next_ids = given.next_tokens.reshape(-1, length)[:num_train].astype(np.int64)

    def code(i: int) -> Streams:
        key = xxhash.xxh3_128_digest(given.tokens[i].tobytes())
        pieces = [
            select_probable(
                torch.from_numpy(np.array(given.logprobs[i * length + t : i * length + t + CHUNK])),
                codec,
                num_tokens=codec.vocabulary,
                uniform_P=draw_uniform(key, np.arange(t, min(t + CHUNK, length))),
            )
            for t in range(0, length, CHUNK)
        ]
        selection = Selection.concatenate(pieces)
        return to_streams(selection, codec, order, next_ids=next_ids[i], key=key)

    records, packed = encode_streams([code(i) for i in range(num_train)], codec)
    tables = unpack_tables(packed, num_contexts=count_contexts(len(codec.temperatures)))
    lookup = build_lookup(tables)
    decoded = [
        decode_streams(record, codec, order, lookup, next_ids=ids)
        for record, ids in zip(records, next_ids, strict=True)
    ]
    size = sum(map(len, records)) + len(packed)
    return Targets(size / next_ids.size, SparseTargets.concatenate(decoded))


def drop_tail(stored: Stored) -> Targets:
    """Return what students of other caches get: kept tokens only; the loss scales each position's to sum to one."""
    is_kept_PK = stored.ids >= 0
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept_PK.sum(axis=1))])
    tails = np.full((len(stored.ids), 1), LOGPROB_FLOOR, np.float32)
    sparse = SparseTargets(offsets, stored.ids[is_kept_PK], stored.logprobs[is_kept_PK], tails)
    return Targets(stored.bytes_per_position, sparse)


def make_rs_kd(given: Distributions, num_train: int) -> Targets:
    """Return 50 draws a position."""
    return drop_tail(draw_rs_kd(given.logprobs[: num_train * given.tokens.shape[1]]))


def make_top_k(given: Distributions, num_train: int, k: int) -> Targets:
    """Return the k most probable tokens, scaled to sum to one."""
    return drop_tail(keep_top_k(given.logprobs[: num_train * given.tokens.shape[1]], k))


MAKERS: dict[str, Callable[[Distributions, int], Targets]] = {
    "Retort top_p 0.009": partial(code_ours, method="top_p", dial=0.009),
    "Retort top_p 0.0023": partial(code_ours, method="top_p", dial=0.0023),
    "Retort top_p 0.0007": partial(code_ours, method="top_p", dial=0.0007),
    "Retort sampled 0.032": partial(code_ours, method="sampled", dial=0.032),
    "Retort sampled 0.0093": partial(code_ours, method="sampled", dial=0.0093),
    "RS-KD, 50 draws": make_rs_kd,
    "top-12 renormalised": partial(make_top_k, k=12),
    "top-50 renormalised": partial(make_top_k, k=50),
    "top-64 renormalised": partial(make_top_k, k=64),
}


def load_targets(folder: Path, way: str, given: Distributions, num_train: int) -> Targets:
    """Return a way's targets for the first num_train sequences; make them first unless they are in `folder`."""
    path = folder / f"{way.replace(' ', '-')}.npz"
    if not path.exists():
        made = MAKERS[way](given, num_train)
        arrays = {name: getattr(made.sparse, name) for name in ("offsets", "ids", "logprobs")}
        unfinished = path.with_suffix(".part.npz")
        tails = made.sparse.tail_logprobs
        np.savez(unfinished, tail_logprobs=tails, size=made.bytes_per_position, **arrays)
        unfinished.rename(path)
        say(f"targets: {way}, {made.bytes_per_position:.1f} bytes a position")
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files}
    size = float(arrays.pop("size"))
    return Targets(size, SparseTargets(**arrays))
