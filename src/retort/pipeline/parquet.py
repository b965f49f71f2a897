"""`retort export-parquet`: a logit cache as parquet files that `datasets`, pandas and others read; a row a sequence.

Legend: S sequences, T tokens of one, P counted positions, N kept tokens of all these positions.
"""

import logging
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from retort.cache.codec import SparseTargets
from retort.cache.finished import find_cache
from retort.cache.reader import CACHE_FILE, LogitCache, cache_digest
from retort.io.files import file_lock, remove_stale_temporaries, replacing, require_writable
from retort.tokens.sequences import Labels, SequenceTable

logger = logging.getLogger(__name__)

_FILE_POSITIONS = 250_000
_READ_AHEAD = 256  # sequences of a cache in a store that are asked for at the same time
_GROUP_TOKENS = (
    4_000_000  # kept tokens of a row group, or one sequence's: what is in memory at once
)
_DIGEST = b"retort-cache"  # in a file's metadata: the cache that it is of


def export_parquet(path: Path, out: Path, *, file_positions: int = _FILE_POSITIONS) -> list[Path]:
    """Write a finished cache into the folder `out`, and return its files: each is complete, or not there.

    Files of the same cache that are there already are kept, so an interrupted export is resumed. Raises ValueError when
    there is no finished cache, it is damaged, or `out` has files that are not this cache's.
    """
    folder = find_cache(path)
    if folder is None:
        raise ValueError(
            f"{path} is not a logit cache: give results/logits/<id>, which has {CACHE_FILE}."
        )
    cache = LogitCache(folder / CACHE_FILE)
    digest = cache_digest(cache).encode()
    bounds = _cut(cache.table.position_offsets, file_positions)
    names = [f"train-{i:05d}-of-{len(bounds) - 1:05d}.parquet" for i in range(len(bounds) - 1)]
    require_writable(out)
    with file_lock(out / ".lock", busy=f"another process exports into {out}: waiting"):
        remove_stale_temporaries(out)
        _refuse_others(out, names, digest)
        for name, (first, stop) in zip(names, pairwise(bounds), strict=True):
            if not (out / name).exists():
                _write_file(out / name, cache, range(first, stop), digest)
                logger.info(f"{name}: {stop - first:,} sequences")
    (out / ".lock").unlink(missing_ok=True)
    return [out / name for name in names]


def _cut(offsets: NDArray[np.int64], num_positions: int) -> list[int]:
    """Return where pieces of some number of positions begin, and the end; offsets int64 [S + 1]: of positions."""
    goals = np.arange(0, int(offsets[-1]), num_positions)
    firsts = np.searchsorted(offsets[:-1], goals)
    return [*dict.fromkeys([0, *firsts.tolist()[1:]]), len(offsets) - 1]


def _refuse_others(out: Path, names: list[str], digest: bytes) -> None:
    """Raise ValueError when a folder has parquet files that are not of this export."""
    for file in sorted(out.glob("*.parquet")):
        try:
            found = (pq.read_schema(file).metadata or {}).get(_DIGEST)
        except (pa.ArrowInvalid, OSError):
            found = None
        if file.name not in names or found != digest:
            raise ValueError(
                f"{file} is not of this cache, or damaged: delete it, or give another folder. Nothing was written."
            )


def _write_file(path: Path, cache: LogitCache, sequences: range, digest: bytes) -> None:
    schema = _make_schema(cache).with_metadata({_DIGEST: digest})
    _require_space(path, cache, sequences)
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for group, targets in _read_groups(cache, sequences):
            columns = dict(_make_columns(cache, group, targets))
            writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))


def _read_groups(cache: LogitCache, sequences: range) -> Iterator[tuple[range, SparseTargets]]:
    """Yield the sequences of each row group, and the distributions at all their positions."""
    first, pieces = sequences.start, []
    for index in sequences:
        if (index - sequences.start) % _READ_AHEAD == 0:
            cache.prefetch(range(index, min(index + _READ_AHEAD, sequences.stop)))
        pieces.append(cache.read_targets(index))
        is_last = index + 1 == sequences.stop
        if is_last or sum(len(piece.ids) for piece in pieces) >= _GROUP_TOKENS:
            yield range(first, index + 1), SparseTargets.concatenate(pieces)
            first, pieces = index + 1, []


def _require_space(path: Path, cache: LogitCache, sequences: range) -> None:
    """Raise ValueError when the disk is too small: at most 8 bytes a kept token, of which records have 2 at least."""
    offsets = cache.columns["record_offsets"]
    needed = 4 * int(offsets[sequences.stop] - offsets[sequences.start])
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ValueError(
            f"{path} may take {needed / 1e6:,.0f} MB, but its disk has only {free / 1e6:,.0f} MB free: free space and "
            "rerun the same command; finished files are kept."
        )


def _make_schema(cache: LogitCache) -> Any:
    codec = cache.header.codec
    fields = {
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "top_ids": pa.list_(pa.list_(pa.int32())),
        "top_logprobs": pa.list_(pa.list_(pa.float32())),
        **{_name_tail(t): pa.list_(pa.float32()) for t in codec.temperatures},
        **({"num_exact": pa.list_(pa.int32())} if codec.method == "sampled" else {}),
        "document": pa.int64(),
        "segment_starts": pa.list_(pa.int32()),
        **{name: pa.string() for name in ("category", "language", "source")},
        "key": pa.string(),
    }
    return pa.schema(list(fields.items()))


def _name_tail(temperature: float) -> str:
    return "tail_logprobs" if temperature == 1.0 else f"tail_logprobs_at_{temperature}"


def _make_columns(
    cache: LogitCache, sequences: range, targets: SparseTargets
) -> Iterator[tuple[str, Any]]:
    """Yield the columns of some sequences, by name."""
    table = cache.table.slice(sequences.start, sequences.stop)
    positions = table.position_offsets
    yield "input_ids", _as_lists(table.offsets, table.ids)
    yield "loss_mask", _as_lists(table.offsets, table.loss_mask)
    yield "top_ids", _as_lists(positions, _as_lists(targets.offsets, targets.ids))
    yield "top_logprobs", _as_lists(positions, _as_lists(targets.offsets, targets.logprobs))
    for column, temperature in enumerate(cache.header.codec.temperatures):
        yield _name_tail(temperature), _as_lists(positions, targets.tail_logprobs[:, column])
    if targets.num_exact is not None:
        yield "num_exact", _as_lists(positions, targets.num_exact.astype(np.int32))
    yield "document", pa.array(table.documents)
    yield "segment_starts", _as_lists(table.segment_offsets, table.segment_starts)
    yield from _describe_sequences(table, cache.table.label_names)
    yield "key", pa.array([key.tobytes().hex() for key in table.keys])


def _describe_sequences(table: SequenceTable, names: Labels) -> Iterator[tuple[str, Any]]:
    for place, column in enumerate(("category", "language", "source")):
        yield column, pa.array([(*names[label], "")[place] for label in table.labels.tolist()])


def _as_lists(offsets: NDArray[np.int64], values: Any) -> Any:
    """Return lists of values, or of lists, from where each begins, and the end."""
    if isinstance(values, np.ndarray):
        values = pa.array(np.ascontiguousarray(values))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
