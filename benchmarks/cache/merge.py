"""Merging parts beside `cp` of the same bytes: how much longer it takes, checksums included.

    python -m benchmarks.cache.merge [--gigabytes 1] [--folder /a/disk/to/measure]

Parts of synthetic distributions, about 24 bytes a position, written as a worker writes them. The ways are timed in
turn, eleven times, with the files in the page cache and the results fsynced; the table gives medians and fastest.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import make_parser
from retort.cache.codec import TokenOrder
from retort.cache.entropy_codec import EntropyCodec, Selection
from retort.cache.merged import merge_parts
from retort.cache.parts import part_path, write_part
from retort.cache.reader import CacheHeader
from retort.cache.sparse_streams import TAIL_UNIT
from retort.io.fingerprints import TokenizerIdentity
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.shards import write_token_shard

VOCABULARY, LENGTH, SEQUENCES_PER_PART = 32_768, 512, 1000
ORDER = TokenOrder.from_ids(np.arange(VOCABULARY))
CODEC = EntropyCodec((1.0,), VOCABULARY, "top_p", 0.003, 60, ORDER.digest())
BYTES_PER_POSITION = 29  # with the part's tokens and tables
_REPEATS = 11


def make_selection(num_positions: int, rng: np.random.Generator) -> Selection:
    """Return 17 tokens a position, the frequent ones more often."""
    wanted = np.minimum(rng.geometric(1 / 17, num_positions), 100).tolist()
    rows = [np.unique((VOCABULARY ** rng.random(n)).astype(np.int64)) for n in wanted]
    ids, sizes = np.concatenate(rows), np.array([len(row) for row in rows])
    weights = rng.random(len(ids)) ** 4 + 0.01
    firsts = np.cumsum(sizes) - sizes
    probs = weights / np.repeat(np.add.reduceat(weights, firsts), sizes)
    tails = rng.integers(0, TAIL_UNIT // 8, (len(sizes), 1))
    none = np.zeros(0, np.int64)
    return Selection(sizes, ids, probs, np.zeros_like(sizes), none, tails)


def write_cache(folder: Path, *, num_parts: int) -> tuple[TokenIndex, CacheHeader]:
    """Write an index and all parts; every part has the same distributions and tokens of its own."""
    rng = np.random.default_rng(0)
    tables: list[SequenceTable] = []
    for part in range(num_parts):
        ids = rng.integers(0, VOCABULARY, (SEQUENCES_PER_PART, LENGTH + 1)).tolist()
        mask = [True] * LENGTH + [False]
        first = part * SEQUENCES_PER_PART
        tables.append(build_table([(row, mask, first + i, ("", "")) for i, row in enumerate(ids)]))
    held_out = tables[0].slice(0, 2)
    shards = []
    for place, table in enumerate(tables):
        shards.append(folder / f"shard_{place:05d}.h5")
        counts = {"documents": {"read": len(table)}}
        tokenizer = TokenizerIdentity(fingerprint="0" * 12, size=VOCABULARY)
        splits = {"train": table, "val": held_out}
        write_token_shard(shards[-1], splits, counts=counts, tokenizer=tokenizer)
    write_index(folder / "index.json", shards, streaming_chunk_size=SEQUENCES_PER_PART)
    index = TokenIndex.read(folder / "index.json")
    header = CacheHeader("0" * 12, "0" * 12, index.record.content, CODEC)
    selections = [make_selection(LENGTH, rng) for _ in range(SEQUENCES_PER_PART)]
    for entry, table in zip(index.parts, tables, strict=True):
        streams = []
        for i, selection in enumerate(selections):
            row = table[i]
            streams.append(CODEC.prepare(selection, ORDER, next_ids=row.ids[1:], key=row.key))
        write_part(part_path(folder / "parts", entry.name, header), table, streams, header, ORDER)
    return index, header


def measure(
    ways: dict[str, Callable[[], object]], clean: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the seconds of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, run in ways.items():
            clean()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(folder: Path, *, gigabytes: float) -> None:
    """Write parts of that size and print the table."""
    num_parts = max(2, round(gigabytes * 1e9 / (BYTES_PER_POSITION * SEQUENCES_PER_PART * LENGTH)))
    index, header = write_cache(folder, num_parts=num_parts)
    parts = folder / "parts"
    paths = sorted(parts.glob("*.h5"))
    size = sum(path.stat().st_size for path in paths)
    out, copy = folder / "teacher_logits.h5", folder / "copy"

    def run_cp() -> None:
        copy.mkdir()
        subprocess.run(["cp", *paths, copy], check=True)
        subprocess.run(["sync", *copy.iterdir()], check=True)

    def clean() -> None:
        out.unlink(missing_ok=True)
        shutil.rmtree(copy, ignore_errors=True)
        os.sync()  # else the next way's fsync pays for removing the last one's files

    ways: dict[str, Callable[[], object]] = {
        "cp, then sync": run_cp,
        "merge": lambda: merge_parts(index, parts, header, out),
        "merge, virtual": lambda: merge_parts(index, parts, header, out, mode="virtual"),
    }
    seconds = measure(ways, clean)
    print(f"{len(paths)} parts, {size / 1e6:,.0f} MB; seconds, and times cp")
    print(f"{'':16}{'median':>8}{'':9}{'fastest':>8}")
    for name, took in seconds.items():
        line = f"{name:16}"
        for summary in (statistics.median, min):
            found = summary(took)
            line += f"{found:8.2f} ({found / summary(seconds['cp, then sync']):.2f})  "
        print(line)


def main() -> None:
    """Write parts, and print the table."""
    parser = make_parser("benchmarks.cache.merge", __doc__)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of all parts; default: 0.5")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: the system's temporary folder"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        compare(Path(name), gigabytes=flags.gigabytes)


if __name__ == "__main__":
    main()
