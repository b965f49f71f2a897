"""Sequences, distributions and indices made of numbers, for tests that need no model: the same on every machine."""

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retort.cache.codec import LOGPROB_FLOOR, Codec, SparseTargets, TokenOrder
from retort.cache.entropy_codec import EntropyCodec, Selection
from retort.cache.parts import part_path, write_part
from retort.cache.reader import CacheHeader
from retort.cache.sparse_streams import TAIL_UNIT, Streams, count_sampled
from retort.cache.top_k_codec import TopKCodec
from retort.io.fingerprints import TokenizerIdentity
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.shards import write_token_shard

TOKENIZER = TokenizerIdentity(fingerprint="0123456789ab", size=290)
CODEC = TopKCodec(temperatures=(1.0, 2.0), vocabulary=300, top_k=4)
ORDER = TokenOrder.from_ids(np.arange(299, -1, -1))
CODED = {
    method: EntropyCodec((1.0, 2.0), 300, method, least, 80, ORDER.digest())
    for method, least in (("top_p", 0.01), ("sampled", 0.05))
}


def make_table(
    num_documents: int, *, seed: int, first_document: int = 0, max_length: int = 9
) -> SequenceTable:
    """Documents of one to three sequences with a prompt of up to two tokens, under three labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for document in range(first_document, first_document + num_documents):
        label = [("", ""), ("code", "c"), ("prose", "")][document % 3]
        for _ in range(rng.integers(1, 4)):
            length = int(rng.integers(2, max_length + 1))
            prompt = int(rng.integers(0, min(3, length)))
            ids = rng.integers(0, TOKENIZER.size, length).tolist()
            mask = [prompt <= t + 1 and t < length - 1 for t in range(length)]
            rows.append((ids, mask, document, label))
    return build_table(rows)


SIZES = (5, 0, 7, 1)  # documents per shard


def make_tables(seed: int) -> list[SequenceTable]:
    """Return one table per shard; the second is empty."""
    return [make_table(size, seed=seed + i, first_document=100 * i) for i, size in enumerate(SIZES)]


def as_rows(tables: list[SequenceTable]) -> list[tuple[Any, ...]]:
    """Return (ids, loss mask, key, document) of every sequence."""
    return [
        (t[i].ids.tolist(), t[i].loss_mask.tolist(), t[i].key, int(t.documents[i]))
        for t in tables
        for i in range(len(t))
    ]


def make_targets(num_positions: int, codec: TopKCodec, *, seed: int) -> SparseTargets:
    """Distributions as a teacher would give them, from exactly rounded arithmetic only."""
    rng = np.random.default_rng(seed)
    shape = (num_positions, codec.top_k)
    ids = np.zeros(shape, np.int32)
    for row in ids:
        row[:] = rng.permutation(codec.vocabulary)[: codec.top_k]
    steps = rng.integers(1, 4096, shape) / 1024
    logprobs = -np.cumsum(steps, axis=1).astype(np.float32)
    tails = -rng.integers(1, 1 << 16, (num_positions, len(codec.temperatures))) / 4096
    return SparseTargets.from_rows(ids, logprobs, tails.astype(np.float32))


def assert_close(found: SparseTargets, expected: SparseTargets) -> None:
    """Compare ids and tails exactly, logprobs within half a unit in the last place of float16."""
    assert found.ids.tolist() == expected.ids.tolist()
    assert (
        found.tail_logprobs.tolist() == np.maximum(expected.tail_logprobs, LOGPROB_FLOOR).tolist()
    )
    values = np.maximum(expected.logprobs, LOGPROB_FLOOR).astype(np.float64)
    allowed = np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)
    assert np.all(np.abs(found.logprobs - values) <= allowed)
    dtypes = [a.dtype for a in (found.ids, found.logprobs, found.tail_logprobs)]
    assert dtypes == [np.int32, np.float32, np.float32]


def targets_of(table: SequenceTable, codec: Codec = CODEC) -> list[SparseTargets]:
    """Every sequence's own distributions, of top_k: they follow from its content key alone."""
    assert isinstance(codec, TopKCodec)
    return [
        make_targets(table[i].num_positions, codec, seed=int.from_bytes(table[i].key[:7], "little"))
        for i in range(len(table))
    ]


def split_targets(targets: SparseTargets, table: SequenceTable) -> list[SparseTargets]:
    """Return the targets of each sequence, from those of all positions in order."""
    bounds = table.position_offsets.tolist()
    return [targets[first:stop] for first, stop in pairwise(bounds)]


def decode(record: bytes, codec: TopKCodec, *, num_positions: int) -> SparseTargets:
    """Decode a record of top_k, which needs nothing of the text but its length."""
    return codec.decode(record, None, next_ids=np.zeros(num_positions, np.int32))


def make_selection(num_positions: int, codec: EntropyCodec, *, seed: int) -> Selection:
    """What a coded method would keep of some distributions, from exactly rounded arithmetic only."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, num_positions)
    tails = rng.integers(0, TAIL_UNIT // 2, (num_positions, len(codec.temperatures)))
    sampled_sizes = [count_sampled(tail, codec.sample_step) for tail in tails[:, 0].tolist()]
    ids, probs, sampled_ids = [], [], []
    for size, sampled, tail in zip(sizes.tolist(), sampled_sizes, tails[:, 0], strict=True):
        kept = rng.permutation(codec.vocabulary)[: size + sampled]
        weights = rng.integers(1, 1000, size)
        ids.append(kept[:size])
        probs.append(weights * (TAIL_UNIT - tail) / (weights.sum() * TAIL_UNIT))
        sampled_ids.append(kept[size:])
    joined = [np.concatenate(pieces) for pieces in (ids, probs, sampled_ids)]
    return Selection(sizes, joined[0], joined[1], np.array(sampled_sizes), joined[2], tails)


def streams_of(table: SequenceTable, codec: EntropyCodec) -> list[Streams]:
    """Every sequence's own streams: they follow from its content key alone."""
    found = []
    for i in range(len(table)):
        row = table[i]
        seed = int.from_bytes(row.key[:7], "little")
        selection = make_selection(row.num_positions, codec, seed=seed)
        found.append(codec.prepare(selection, ORDER, next_ids=row.next_ids, key=row.key))
    return found


def kill_writers(folder: Path, write: Callable[[Path], None], *, times: int) -> Iterator[bool]:
    """Kill a process that writes files into the folder again and again; yields whether one was torn, each time.

    It is killed just after a file was begun, or some time after the first was finished: waited for, since a busy
    machine is slow. The folder is emptied when the caller has looked at it.
    """
    rng, forking = random.Random(0), multiprocessing.get_context("fork")
    for number in range(times):
        writer = forking.Process(target=_write_on, args=(folder, write))
        writer.start()
        awaited = (".*.tmp", "*.h5")[number % 2]
        while writer.is_alive() and not any(folder.glob(awaited)):
            pass
        time.sleep(rng.uniform(0, 0.03) if number % 2 else 0)
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        yield any(folder.glob(".*.tmp"))
        assert {path.suffix for path in folder.iterdir()} <= {".h5", ".tmp"}
        for path in folder.iterdir():
            path.unlink()


def _write_on(folder: Path, write: Callable[[Path], None]) -> None:
    for number in range(10**6):
        write(folder / f"{number % 3}.h5")


def write_shards(folder: Path, tables: list[SequenceTable], *, num_held_out: int = 2) -> list[Path]:
    """Write one token shard per table, with a few other documents held out in each."""
    paths = []
    for place, table in enumerate(tables):
        held_out = make_table(num_held_out, seed=1000 + place, first_document=10**6)
        counts = {"documents": {"read": len(np.unique(table.documents)) + num_held_out}}
        path = folder / f"shard_{place:05d}.h5"
        write_token_shard(
            path, {"train": table, "val": held_out}, counts=counts, tokenizer=TOKENIZER
        )
        paths.append(path)
    return paths


def write_tokens(folder: Path, tables: list[SequenceTable], *, chunk_size: int = 4) -> TokenIndex:
    """Write shards and their index; return the index."""
    paths = write_shards(folder, tables)
    write_index(folder / "index.json", paths, streaming_chunk_size=chunk_size)
    return TokenIndex.read(folder / "index.json")


def make_header(index: TokenIndex, codec: Codec = CODEC) -> CacheHeader:
    """The header of a cache over the index's sequences."""
    return CacheHeader("feedc0ffee00", TOKENIZER.fingerprint, index.record.content, codec)


def write_parts(index: TokenIndex, folder: Path, header: CacheHeader) -> None:
    """Write every part of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in index.parts:
        table = index.read_part(part)
        path = part_path(folder, part.name, header)
        write_part(path, table, targets_of(table, header.codec), header)
