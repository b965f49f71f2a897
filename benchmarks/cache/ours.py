"""Retort's rows of the cache benchmark: what its codec stores of the distributions, and how fast.

Legend: P positions, T those of a sequence, V vocabulary.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cache.stored import Stored
from benchmarks.distributions.build import Distributions
from retort.cache.codec import SparseTargets, TokenOrder
from retort.cache.entropy_codec import EntropyCodec, Selection, hash_to_uniform
from retort.cache.methods import build_codec
from retort.cache.parts import write_part
from retort.cache.reader import CacheHeader, LogitCache
from retort.cache.sparse_streams import Streams
from retort.config.sections import Cache
from retort.teacher.selection import select_probable
from retort.tokens.sequences import SequenceTable, build_table

_REPEATS = 40
_SELECTED = 16  # positions selected at once: three times as fast as all 512
_NO_HASH = "0" * 12  # nothing here has a teacher, a tokenizer or tokens to be compared with


@dataclass(frozen=True)
class Ours:
    """One of Retort's rows: what was stored, and positions per second of processor time."""

    stored: Stored
    encoded_per_second: float
    decoded_per_second: float
    read_per_second: float


def make_codec(
    method: str,
    threshold: float,
    data: Distributions,
    temperatures: tuple[float, ...] = (1.0,),
) -> EntropyCodec:
    """Return the codec of a config's `cache` section; the threshold is that of `method`, a probability."""
    key = "min_probability" if method == "top_p" else "head_probability"
    values = {"method": method, key: threshold, "temperatures": list(temperatures)}
    cache = Cache.model_validate(values)
    vocabulary = data.logprobs.shape[1]
    codec = build_codec(cache, vocabulary=vocabulary, token_counts=data.unigram_counts)
    assert isinstance(codec, EntropyCodec)
    return codec


@dataclass(frozen=True)
class Selected:
    """What a codec keeps of some sequences, ready to be encoded."""

    codec: EntropyCodec
    order: TokenOrder
    next_ids: NDArray[np.int64]  # [sequences, T]
    keys: list[bytes]
    selections: list[Selection]

    @classmethod
    def select(cls, data: Distributions, codec: EntropyCodec, keys: list[bytes]) -> "Selected":
        """Select from the first sequences, as many as there are keys."""
        order = TokenOrder.from_counts(data.unigram_counts, vocabulary=codec.vocabulary)
        next_ids = data.next_tokens.astype(np.int64).reshape(data.tokens.shape)[: len(keys)]
        selections = [_select_sequence(data, i, codec, key) for i, key in enumerate(keys)]
        return cls(codec, order, next_ids, keys, selections)

    def to_streams(self) -> list[Streams]:
        """Return every sequence's streams of symbols."""
        return [
            self.codec.prepare(selection, self.order, next_ids=ids, key=key)
            for selection, ids, key in zip(self.selections, self.next_ids, self.keys, strict=True)
        ]

    def encode(self) -> tuple[list[bytes], bytes]:
        """Return a record for each sequence, and the tables of all."""
        return self.codec.encode(self.to_streams())

    def decoder(self, records: list[bytes], packed: bytes) -> Callable[[], Iterator[SparseTargets]]:
        """Return a function that decodes the records one by one; the tables are unpacked once."""
        tables = self.codec.open_tables(packed, self.order)

        def decode() -> Iterator[SparseTargets]:
            for record, ids in zip(records, self.next_ids, strict=True):
                yield self.codec.decode(record, tables, next_ids=ids)

        return decode


def _select_sequence(data: Distributions, i: int, codec: EntropyCodec, key: bytes) -> Selection:
    length = data.tokens.shape[1]
    first = i * length
    pieces = [
        select_probable(
            torch.from_numpy(
                np.array(data.logprobs[first + t : first + min(t + _SELECTED, length)])
            ),
            codec,
            num_tokens=codec.vocabulary,
            uniform_P=hash_to_uniform(key, np.arange(t, min(t + _SELECTED, length))),
        )
        for t in range(0, length, _SELECTED)
    ]
    return Selection.concatenate(pieces)


def make_sequence_table(data: Distributions) -> SequenceTable:
    """Return the sequences as a cache's file holds them."""
    length = data.tokens.shape[1]
    next_ids = data.next_tokens.reshape(-1, length)
    mask = [True] * length + [False]
    rows = zip(data.tokens.tolist(), next_ids[:, -1].tolist(), strict=True)
    return build_table([([*ids, last], mask, i, ("", "")) for i, (ids, last) in enumerate(rows)])


def write_cache(
    path: Path, data: Distributions, codec: EntropyCodec
) -> tuple[Selected, LogitCache]:
    """Select from all sequences and write them as one part, which is a cache."""
    table = make_sequence_table(data)
    selected = Selected.select(data, codec, [table[i].key for i in range(len(table))])
    header = CacheHeader(_NO_HASH, _NO_HASH, _NO_HASH, codec)
    write_part(path, table, selected.to_streams(), header, selected.order)
    return selected, LogitCache(path)


def measure_ours(data: Distributions, codec: EntropyCodec) -> Ours:
    """Encode, decode and read all positions."""
    with tempfile.TemporaryDirectory() as folder:
        selected, cache = write_cache(Path(folder) / "part.h5", data, codec)
        reading = _time_reading(cache)
    (records, tables), encoding = _fastest(selected.encode)
    decode = selected.decoder(records, tables)
    decoded = list(decode())
    _, decoding = _fastest(lambda: sum(map(len, decode())))  # each is dropped, as a trainer does
    num_positions = len(data.logprobs)
    size = sum(map(len, records)) + len(tables)
    return Ours(
        _to_stored(decoded, codec, size / num_positions),
        num_positions / encoding,
        num_positions / decoding,
        num_positions / reading,
    )


def _fastest(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns, and the fewest seconds of processor time that it took."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.process_time()
        found = work()
        seconds.append(time.process_time() - started)
    return found, min(seconds)


def _time_reading(cache: LogitCache) -> float:
    """Return the seconds that it takes to read every sequence in random order, all checks included."""
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    return _fastest(lambda: [len(cache.read_targets(i)) for i in order])[1]


def _to_stored(
    decoded: list[SparseTargets], codec: EntropyCodec, bytes_per_position: float
) -> Stored:
    """Return decoded sequences as the metrics take them: -1 where a position keeps fewer."""
    joined = SparseTargets.concatenate(decoded)
    ids, logprobs = joined.to_rows()
    ids[np.isneginf(logprobs)] = -1
    is_sampled = codec.method == "sampled"
    tails = None if is_sampled else joined.tail_logprobs[:, 0]
    name = f"Retort {codec.method} {codec.min_probability:g}"
    return Stored(name, bytes_per_position, ids, logprobs, tails, unbiased=is_sampled)
