"""The size of a cache, estimated before the first GPU job starts, and whether the disk can hold it."""

import math
import shutil
from pathlib import Path

from retort.cache.methods import build_codec
from retort.config.sections import Cache, Merge
from retort.io.records import Record
from retort.tokens.index import IndexRecord

# Bytes beside the records' values: ids and mask; key, offsets, checksum and zstd's frame; HDF5's own.
_BYTES_PER_TOKEN = 5
_BYTES_PER_SEQUENCE = 64 + 40
_BYTES_PER_PART = 32 << 10


class CacheCost(Record, format="retort-plan", version=2):
    """plan.json: the estimated size of one cache.

    record_bytes: an upper bound if `is_bound`, else three times the bytes of a usual teacher's records. total_bytes:
    while its parts are merged, parts included.
    """

    positions: int
    parts: int
    record_bytes: int
    is_bound: bool
    total_bytes: int
    disk_free_bytes: int


def estimate_cost(
    index: IndexRecord, cache: Cache, merge: Merge, *, vocabulary: int, folder: Path
) -> CacheCost:
    """Return the size of the cache of an index for a teacher whose output layer has `vocabulary` ids.

    While parts are merged, they and the merged file exist side by side; a virtual cache stores its records once.
    Raises ValueError when the disk of `folder`, which need not exist, has too little space.
    """
    train = index.train
    codec = build_codec(cache, vocabulary=vocabulary)
    record_bytes = math.ceil(train.positions * codec.bytes_per_position)
    other_bytes = (
        _BYTES_PER_TOKEN * train.tokens
        + _BYTES_PER_SEQUENCE * train.sequences
        + (_BYTES_PER_PART + codec.bytes_per_part) * len(index.parts)
    )
    total = 2 * other_bytes + record_bytes * (1 if merge.mode == "virtual" else 2)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        raise ValueError(
            f"the cache of {train.positions:,} positions needs up to {format_bytes(total)} while its parts are "
            f"merged, but {existing} has {format_bytes(free)} free. Keep less of each distribution "
            f"(cache.method is {cache.method}), lower dataset.max_samples, set merge.mode: virtual, or set "
            "output.cache_dir to a larger disk."
        )
    return CacheCost(
        positions=train.positions,
        parts=len(index.parts),
        record_bytes=record_bytes,
        is_bound=codec.is_bound,
        total_bytes=total,
        disk_free_bytes=free,
    )


def format_bytes(number: int) -> str:
    """Return a number of bytes in decimal units: 812 bytes, 3.4 MB, 1.2 TB."""
    value = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def describe_cost(cost: CacheCost) -> str:
    """Return the cost in one line."""
    per_position = cost.record_bytes / max(1, cost.positions)
    bound = "at most" if cost.is_bound else "probably less than"
    return (
        f"cache: {cost.positions:,} positions in {cost.parts} parts, {bound} {per_position:.0f} bytes each "
        f"({format_bytes(cost.record_bytes)}); disk space needed while merging {format_bytes(cost.total_bytes)}, "
        f"free {format_bytes(cost.disk_free_bytes)}"
    )
