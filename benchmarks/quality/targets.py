"""What each way of the quality benchmark gives a student to learn from, and in how many bytes.

Legend: P training positions, T those of a sequence, V vocabulary, K most ids kept at any position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash

from benchmarks.cache.opponents import keep_top_k, sample_rs_kd
from benchmarks.cache.ours import Selected, make_codec
from benchmarks.cache.stored import Stored
from benchmarks.common import log
from benchmarks.distributions.build import Distributions
from retort.cache.codec import LOGPROB_FLOOR, SparseTargets
from retort.losses.teacher_rows import TeacherRows


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


def make_ours(data: Distributions, num_train: int, method: str, threshold: float) -> Targets:
    """Return what a cache of the first num_train sequences gives back; its tables count among its bytes."""
    keys = [xxhash.xxh3_128_digest(tokens_T.tobytes()) for tokens_T in data.tokens[:num_train]]
    selected = Selected.select(data, make_codec(method, threshold, data), keys)
    records, tables = selected.encode()
    decoded = list(selected.decoder(records, tables)())
    size = sum(map(len, records)) + len(tables)
    return Targets(size / selected.next_ids.size, SparseTargets.concatenate(decoded))


def drop_tail(stored: Stored) -> Targets:
    """Return what students of other caches get: kept tokens alone, which the loss scales to sum to one."""
    is_kept_PK = stored.ids >= 0
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept_PK.sum(axis=1))])
    tails = np.full((len(stored.ids), 1), LOGPROB_FLOOR, np.float32)
    sparse = SparseTargets(offsets, stored.ids[is_kept_PK], stored.logprobs[is_kept_PK], tails)
    return Targets(stored.bytes_per_position, sparse)


def make_rs_kd(data: Distributions, num_train: int) -> Targets:
    """Return 50 samples a position."""
    return drop_tail(sample_rs_kd(data.logprobs[: num_train * data.tokens.shape[1]]))


def make_top_k(data: Distributions, num_train: int, k: int) -> Targets:
    """Return the k most probable tokens, scaled to sum to one."""
    return drop_tail(keep_top_k(data.logprobs[: num_train * data.tokens.shape[1]], k))


MAKERS: dict[str, Callable[[Distributions, int], Targets]] = {
    "Retort top_p 0.009": partial(make_ours, method="top_p", threshold=0.009),
    "Retort top_p 0.0023": partial(make_ours, method="top_p", threshold=0.0023),
    "Retort top_p 0.0007": partial(make_ours, method="top_p", threshold=0.0007),
    "Retort sampled 0.032": partial(make_ours, method="sampled", threshold=0.032),
    "Retort sampled 0.0093": partial(make_ours, method="sampled", threshold=0.0093),
    "RS-KD, 50 draws": make_rs_kd,
    "top-12 renormalised": partial(make_top_k, k=12),
    "top-50 renormalised": partial(make_top_k, k=50),
    "top-64 renormalised": partial(make_top_k, k=64),
}


def load_targets(folder: Path, way: str, data: Distributions, num_train: int) -> Targets:
    """Return a way's targets for the first num_train sequences from `folder`; make them if they are not there."""
    path = folder / f"{way.replace(' ', '-')}.npz"
    if not path.exists():
        made = MAKERS[way](data, num_train)
        arrays = {name: getattr(made.sparse, name) for name in ("offsets", "ids", "logprobs")}
        temporary = path.with_suffix(".part.npz")
        tails = made.sparse.tail_logprobs
        np.savez(temporary, tail_logprobs=tails, size=made.bytes_per_position, **arrays)
        temporary.rename(path)
        log(f"targets: {way}, {made.bytes_per_position:.1f} bytes a position")
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files}
    size = float(arrays.pop("size"))
    return Targets(size, SparseTargets(**arrays))
