"""The size of a cache, estimated before the teacher's pass starts, and whether the disk can hold it."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from retort.cache.codec import Codec
from retort.cache.methods import build_codec
from retort.config.sections import Cache, Merge
from retort.io.records import Record
from retort.io.units import format_bytes
from retort.tokens.index import IndexRecord

# Bytes beside the records' values: ids and mask; key, offsets, checksum and zstd's frame; HDF5's own.
_BYTES_PER_TOKEN = 5
_BYTES_PER_SEQUENCE = 64 + 40
_BYTES_PER_PART = 32 << 10
# Disk space that is asked for, over what a usual teacher takes: one that is less certain keeps more tokens.
_SAFETY_FACTOR = 3

_BASES = {
    "codec": "at most, by the codec",
    "sample": "from this teacher's distributions at {} positions",
    "table": "for a usual teacher, as this one was not sampled",
}


@dataclass(frozen=True)
class SampledBytes:
    """The bytes of a teacher's own distributions, encoded at `positions` counted positions.

    per_position: of the records; per_part: of the tables that the records of a part share; relative_error: half the
    width of the 95 % interval of `per_position`, over it.
    """

    positions: int
    per_position: float
    per_part: int
    relative_error: float


class CacheCost(Record, format="retort-plan", version=3):
    """plan.json: the estimated size of one cache.

    basis: what `record_bytes` is from: the codec (an upper bound), a sample of the teacher's own distributions, or a
    table for a usual teacher. relative_error: half its 95 % interval, None where it is not known. total_bytes: the most
    that is needed while the parts are merged, parts included.
    """

    positions: int
    parts: int
    basis: Literal["codec", "sample", "table"]
    sampled_positions: int
    record_bytes: int
    relative_error: float | None
    file_bytes: int
    total_bytes: int
    disk_free_bytes: int


class Sizes(NamedTuple):
    """What is to be cached: counted positions, tokens, sequences and parts."""

    positions: int
    tokens: int
    sequences: int
    parts: int


def estimate_cost(
    index: IndexRecord,
    cache: Cache,
    merge: Merge,
    *,
    vocabulary: int,
    folder: Path,
    sample: SampledBytes | None = None,
    is_stored: bool = False,
) -> CacheCost:
    """Return the size of the cache of an index for a teacher whose output layer has `vocabulary` ids.

    is_stored: its parts are in an object store. Raises ValueError when the disk of `folder`, which need not exist, has
    too little space.
    """
    train = index.train
    sizes = Sizes(train.positions, train.tokens, train.sequences, len(index.parts))
    codec = build_codec(cache, vocabulary=vocabulary)
    copies = count_copies(merge, is_stored=is_stored)
    cost = size_cache(sizes, codec, copies, folder=folder, sample=sample)
    if fault := find_lack_of_space(cost, cache, copies, folder=folder):
        raise ValueError(fault)
    return cost


def count_copies(merge: Merge, *, is_stored: bool) -> int:
    """Return how often records are on the disk while parts are merged.

    The parts and the merged file exist side by side; a virtual cache stores its records once, a store holds them all.
    """
    return 0 if is_stored else 1 if merge.mode == "virtual" else 2


def size_cache(
    sizes: Sizes, codec: Codec, copies: int, *, folder: Path, sample: SampledBytes | None
) -> CacheCost:
    """Return the size of a cache in `folder`; copies: see `count_copies`."""
    basis, per_position, most = choose_bytes(codec, sample)
    tables = sample.per_part if sample else 0
    record_bytes = math.ceil(sizes.positions * per_position) + tables * sizes.parts
    other_bytes = (
        _BYTES_PER_TOKEN * sizes.tokens
        + _BYTES_PER_SEQUENCE * sizes.sequences
        + (_BYTES_PER_PART + codec.bytes_per_part) * sizes.parts
    )
    # A part is written here before it is stored.
    on_disk = copies or 1 / max(1, sizes.parts)
    return CacheCost(
        positions=sizes.positions,
        parts=sizes.parts,
        basis=basis,
        sampled_positions=sample.positions if sample else 0,
        record_bytes=record_bytes,
        relative_error=round(sample.relative_error, 4) if sample else None,
        file_bytes=record_bytes + other_bytes,
        total_bytes=2 * other_bytes + math.ceil(math.ceil(record_bytes * most) * on_disk),
        disk_free_bytes=shutil.disk_usage(find_existing(folder)).free,
    )


def choose_bytes(
    codec: Codec, sample: SampledBytes | None
) -> tuple[Literal["codec", "sample", "table"], float, float]:
    """Return the basis of an estimate, bytes of a position, and the factor by which there may be more."""
    if sample:
        return "sample", sample.per_position, 1 + sample.relative_error
    if codec.is_bound:
        return "codec", codec.bytes_per_position, 1.0
    return "table", codec.bytes_per_position, _SAFETY_FACTOR


def find_existing(folder: Path) -> Path:
    """Return a folder, or the nearest of those around it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def find_lack_of_space(cost: CacheCost, cache: Cache, copies: int, *, folder: Path) -> str | None:
    """Return what is wrong, with what would do, when the disk has too little space for a cache; else None."""
    total, free = cost.total_bytes, cost.disk_free_bytes
    if total <= free:
        return None
    changes = []
    records = total - 2 * (cost.file_bytes - cost.record_bytes)
    if copies == 2 and total - records / 2 <= free:
        changes.append("set merge.mode: virtual, which stores the records once")
    changes += [
        f"lower dataset.max_samples to {99 * free / total:.3g} % of the documents",
        f"keep less of each distribution (cache.method is {cache.method})",
        f"set output.{'cache_dir' if copies else 'results_dir'} to a larger disk",
    ]
    return (
        f"the cache of {cost.positions:,} positions needs up to {format_bytes(total)} while its parts are merged "
        f"({describe_basis(cost)}), but {find_existing(folder)} has {format_bytes(free)} free. To make it fit, "
        f"{', or '.join(changes)}."
    )


def describe_basis(cost: CacheCost) -> str:
    """Return what the bytes are estimated from, in words."""
    return _BASES[cost.basis].format(f"{cost.sampled_positions:,}")


def describe_cost(cost: CacheCost) -> str:
    """Return the cost in one line."""
    per_position = cost.record_bytes / max(1, cost.positions)
    error = f" +- {cost.relative_error:.1%}" if cost.relative_error is not None else ""
    return (
        f"cache: {cost.positions:,} positions in {cost.parts} parts, {per_position:.1f} bytes each{error} "
        f"({format_bytes(cost.record_bytes)}, {describe_basis(cost)}); disk space needed while merging "
        f"{format_bytes(cost.total_bytes)}, free {format_bytes(cost.disk_free_bytes)}"
    )
