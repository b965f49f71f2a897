"""The coding of a part, from what was selected to a file that was read back: each stage, and several threads."""

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from retort.cache.codec import Codec, Selected, TokenOrder
from retort.cache.methods import build_codec
from retort.cache.parts import write_part
from retort.cache.pieces import cut_pieces
from retort.cache.reader import CacheHeader
from retort.config.sections import Cache
from retort.teacher.batches import Batch
from retort.teacher.scoring import PartTargets
from retort.teacher.selection import select
from retort.tokens.sequences import SequenceTable

_CACHES = {
    "top_p 0.001": Cache(method="top_p", min_probability=0.001, temperatures=(1.0,)),
    "top_k 64": Cache(method="top_k", top_k=64, temperatures=(1.0,)),
    "sampled 0.01": Cache(method="sampled", head_probability=0.01, temperatures=(1.0,)),
}


def _select(table: SequenceTable, codec: Codec) -> Selected:
    """Select from random logits of 2.1 nats, sequence by sequence."""
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    ranks_V = torch.arange(1, codec.vocabulary + 1).float()
    pieces: list[Selected] = []
    for index in range(len(table)):
        num_positions = table[index].num_positions
        logits_PV = torch.randn(num_positions, codec.vocabulary, generator=generator) * 1.9
        logits_PV -= 1.15 * ranks_V.log()
        uniform_P = rng.random(num_positions)
        pieces.append(select(logits_PV, codec, num_tokens=codec.vocabulary, uniform_P=uniform_P))
    return type(pieces[0]).concatenate(pieces)


def _time(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


class _Part:
    """A part's selected tokens; each stage is a method."""

    def __init__(self, table: SequenceTable, cache: Cache, vocabulary: int) -> None:
        counts = np.bincount(table.ids, minlength=vocabulary)
        self.codec = build_codec(cache, vocabulary=vocabulary, token_counts=counts)
        self.order: TokenOrder = self.codec.order_tokens(counts)
        self.table, self.selected = table, _select(table, self.codec)
        self.scored = self.prepare(None)

    def prepare(self, pool: Executor | None) -> PartTargets:
        scored = PartTargets(self.table, self.codec, self.order, pool)
        scored.add(Batch(self.table, np.arange(len(self.table))), self.selected)
        return scored

    def encode(self, pool: Executor | None) -> None:
        self.codec.encode(self.scored.sequences, pool)

    def write(self, pool: Executor | None, scored: PartTargets | None = None) -> None:
        header = CacheHeader("teacher", "tokenizer", "tokens", self.codec)
        with tempfile.TemporaryDirectory() as folder:
            path, scored = Path(folder) / "part.h5", scored or self.scored
            write_part(path, self.table, scored.sequences, header, self.order, pool=pool)

    def whole(self, pool: Executor | None) -> None:
        self.write(pool, self.prepare(pool))


def print_coding(table: SequenceTable, vocabulary: int, *, threads: list[int], turns: int) -> None:
    """Print microseconds of one thread for each stage and position, and how many times as fast threads are."""
    pieces = len(cut_pieces(np.diff(table.position_offsets)))
    print(
        f"\nCoding {table.num_positions:,} positions in {pieces} pieces, {vocabulary:,} ids: processor microseconds of "
        "one thread a position; by the clock, times as fast as one thread"
    )
    names = ["prepare", "encode", "whole"]
    heads = [*names, *(f"{n} threads" for n in threads)]
    print(f"{'':14s}" + "".join(f"{head:>12s}" for head in heads))
    for name, cache in _CACHES.items():
        part = _Part(table, cache, vocabulary)
        stages: list[Callable[[Executor | None], object]] = [part.prepare, part.encode]
        stages.append(part.whole)
        part.whole(None)
        seconds = [
            min(_time(partial(stage, None), time.process_time) for _ in range(turns))
            for stage in stages
        ]
        faster = [_compare(part, number, turns) for number in threads]
        micro = [1e6 * s / table.num_positions for s in seconds]
        print(
            f"{name:14s}"
            + "".join(f"{us:12.2f}" for us in micro)
            + "".join(f"{ratio:12.2f}" for ratio in faster),
            flush=True,
        )


def _compare(part: _Part, number: int, turns: int) -> float:
    """Return how many times as fast so many threads are as none but this, the median of turns."""
    with ThreadPoolExecutor(number) as pool:
        ratios = []
        for _ in range(turns):
            alone = _time(partial(part.whole, None), time.perf_counter)
            ratios.append(alone / _time(partial(part.whole, pool), time.perf_counter))
    return statistics.median(ratios)
