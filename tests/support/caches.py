"""The content of a cache file as plain values, and where its bytes are."""

from pathlib import Path
from typing import Any

import h5py

from retort.cache.reader import CacheHeader, LogitCache
from retort.cache.top_k_codec import TopKCodec
from retort.tokens.sequences import SequenceTable
from support.synthetic import decode, targets_of


def read_everything(path: Path) -> list[Any]:
    """Return everything that a file holds. Raises ValueError when it is refused."""
    cache = LogitCache(path)
    found: list[Any] = [cache.header.to_json()]
    for i in range(len(cache)):
        row, targets = cache.table[i], cache.read_targets(i)
        label = cache.table.label_names[cache.table.labels[i]]
        found.append([row.ids.tolist(), row.loss_mask.tolist(), row.segment_starts.tolist()])
        found.append([row.key, int(cache.table.documents[i]), label])
        found += [targets.ids.tolist(), targets.logprobs.tolist()]
        found.append(targets.tail_logprobs.tolist())
    return found


def expected_of(table: SequenceTable, header: CacheHeader) -> list[Any]:
    """Return what `read_everything` must return for a part of these sequences."""
    assert isinstance(header.codec, TopKCodec)
    found: list[Any] = [header.to_json()]
    for i, expected in enumerate(targets_of(table, header.codec)):
        row, payload = table[i], header.codec.encode_record(expected)
        targets = decode(payload, header.codec, num_positions=row.num_positions)
        found.append([row.ids.tolist(), row.loss_mask.tolist(), row.segment_starts.tolist()])
        found.append([row.key, int(table.documents[i]), table.label_names[table.labels[i]]])
        found += [targets.ids.tolist(), targets.logprobs.tolist()]
        found.append(targets.tail_logprobs.tolist())
    return found


def column_bytes(path: Path, name: str) -> range:
    """Return the byte range of a column in the file."""
    with h5py.File(path) as file:
        start = file[name].id.get_offset()
        return range(start, start + file[name].nbytes)
