"""Make the index of all token shards: every shard is read once, in blocks."""

import io
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.corpus.documents import Counts
from retort.corpus.sharding import check_assignments
from retort.io.digests import digest
from retort.io.files import write_atomically
from retort.io.run_record import RUN_FILE, describe_run
from retort.tokens.index import (
    COUNTS_FILE,
    IndexCounts,
    IndexRecord,
    Part,
    SplitTotals,
    digest_counts,
    name_keys,
)
from retort.tokens.sequences import SequenceTable
from retort.tokens.shards import (
    ShardCounts,
    iterate_token_shard,
    read_shard_metadata,
)
from retort.tokens.tokenize import TokenCounts


@dataclass
class _Totals:
    """Totals of a split, added up while its shards are read."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    positions: int = 0
    longest: int = 0  # tokens in the longest sequence
    sources: Counter[str] = field(default_factory=Counter)  # tokens by source of a mixture
    token_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    shard_keys: list[str] = field(default_factory=list)  # digest of each shard's content keys

    def read(self, path: Path, split: str) -> Iterator[SequenceTable]:
        """Yield a shard's sequences of a split in blocks, and add them to the totals."""
        keys, document = xxhash.xxh3_128(), -1
        for table in iterate_token_shard(path, split):
            self.documents += int(np.count_nonzero(np.diff(table.documents, prepend=document)))
            document = int(table.documents[-1])
            self.sequences += len(table)
            self.tokens += len(table.ids)
            self.positions += table.num_positions
            self.longest = max(self.longest, int(table.lengths.max()))
            for label, (_, _, *source) in enumerate(table.label_names):
                if source:
                    self.sources[source[0]] += int(table.lengths[table.labels == label].sum())
            found = np.bincount(table.ids, minlength=len(self.token_counts))
            found[: len(self.token_counts)] += self.token_counts
            self.token_counts = found
            keys.update(np.ascontiguousarray(table.keys).data)
            yield table
        self.shard_keys.append(keys.hexdigest())

    def record(self) -> SplitTotals:
        """Return the totals that the index stores."""
        return SplitTotals(**{name: getattr(self, name) for name in SplitTotals.model_fields})


def build_index(
    shard_paths: list[Path], *, streaming_chunk_size: int
) -> tuple[IndexRecord, NDArray[np.int64]]:
    """Return the index, and how often each token id occurs in the training sequences, int64 [V].

    streaming_chunk_size: documents per part. Memory holds a block of sequences and the list of parts. Raises ValueError
    when no sequence is left for training, when shards have different tokenizers or the same documents, and when
    documents were lost or repeated.
    """
    metadata = [read_shard_metadata(path) for path in shard_paths]
    tokenizers = dict.fromkeys(tokenizer for tokenizer, _ in metadata)
    if len(tokenizers) > 1:
        raise ValueError(
            f"the token shards were made with {len(tokenizers)} different tokenizers "
            f"({', '.join(t.fingerprint for t in tokenizers)}): the tokenizer's files changed while "
            f"the shards were written. Delete {shard_paths[0].parent} and rerun the same command."
        )
    train, val = _Totals(), _Totals()
    parts: list[Part] = []
    for shard, path in enumerate(shard_paths):
        tables = train.read(path, "train")
        parts += _list_parts(tables, shard=shard, documents_per_part=streaming_chunk_size)
        for _ in val.read(path, "val"):
            pass
    _refuse_repeated(parts, shard_paths)
    counts = _sum_counts([counts for _, counts in metadata])
    if train.positions == 0:
        raise ValueError(
            f"no document of the corpus is left for training: {vars(counts.documents)}. Every document was empty, "
            "skipped or held out. Look at the column names, dataset.validation_fraction and the files."
        )
    index = IndexRecord(
        tokenizer=metadata[0][0],
        content=digest(train.shard_keys),
        counts=counts,
        train=train.record(),
        val=val.record(),
        token_counts=digest_counts(train.token_counts),
        shards=tuple(path.name for path in shard_paths),
        parts=tuple(parts),
        chat_date=metadata[0][1].chat_date,
    )
    return index, train.token_counts


def write_index(path: Path, shard_paths: list[Path], *, streaming_chunk_size: int) -> IndexRecord:
    """Write index.json, token_counts.npy and run.json next to the shards; return the index.

    Raises ValueError when no document is held out, and as `build_index` does.
    """
    started = time.monotonic()
    index, token_counts = build_index(shard_paths, streaming_chunk_size=streaming_chunk_size)
    if index.val.positions == 0:
        raise ValueError(
            f"none of the {index.train.documents} usable documents is held out, so no student could be "
            "evaluated: raise dataset.validation_fraction, or give more documents."
        )
    content = io.BytesIO()
    np.save(content, token_counts.astype("<i8"), allow_pickle=False)
    write_atomically(path.with_name(COUNTS_FILE), content.getvalue())
    section = {"dataset": {"streaming_chunk_size": streaming_chunk_size}}
    made = describe_run(section=section, seconds=time.monotonic() - started)
    made.write(path.with_name(RUN_FILE))
    index.write(path)
    return index


def _refuse_repeated(parts: list[Part], shard_paths: list[Path]) -> None:
    """Raise ValueError when two shards contain the same documents: one was copied over the other."""
    shard_of: dict[str, int] = {}
    for part in parts:
        if (other := shard_of.setdefault(part.name, part.shard)) != part.shard:
            raise ValueError(
                f"{shard_paths[part.shard]} contains the documents of {shard_paths[other]}: one of the two is a "
                "copy, so other documents are missing. Delete both and rerun the same command."
            )


def _sum_counts(shards: list[ShardCounts]) -> IndexCounts:
    """Return the sums; raises ValueError unless each document is in exactly one shard."""
    assignments = [shard.dealt for shard in shards if shard.dealt is not None]
    if len(assignments) == len(shards):  # else one reader wrote all shards of a snapshot
        check_assignments(assignments, sharding=str(shards[0].sharding))
    documents = Counts()
    for shard in shards:
        documents.merge(shard.documents)
    tokens = sum((shard.tokens for shard in shards), TokenCounts())
    return IndexCounts(documents=documents, tokens=tokens)


def _list_parts(
    tables: Iterable[SequenceTable], *, shard: int, documents_per_part: int
) -> Iterator[Part]:
    """Yield the parts of one shard, from its training sequences in order."""
    first = 0
    pieces = _cut_at_parts(tables, documents_per_part)
    for _, of_part in groupby(pieces, key=itemgetter(0)):
        keys, documents = xxhash.xxh3_128(), []
        sequences = tokens = positions = 0
        for _, piece in of_part:
            keys.update(np.ascontiguousarray(piece.keys).tobytes())
            documents.append(piece.documents)
            sequences += len(piece)
            tokens += len(piece.ids)
            positions += piece.num_positions
        yield Part(
            name=name_keys(keys, documents),
            shard=shard,
            first=first,
            sequences=sequences,
            tokens=tokens,
            positions=positions,
        )
        first += sequences


def _cut_at_parts(
    tables: Iterable[SequenceTable], documents_per_part: int
) -> Iterator[tuple[int, SequenceTable]]:
    """Yield (number of the part, sequences): tables cut at the ends of parts; a part may span several tables."""
    num_documents, last = 0, -1
    for table in tables:
        is_new = np.diff(table.documents, prepend=last) != 0
        part_of_sequence = (num_documents + np.cumsum(is_new) - 1) // documents_per_part
        cuts = (np.flatnonzero(np.diff(part_of_sequence)) + 1).tolist()
        for first, stop in pairwise([0, *cuts, len(table)]):
            yield int(part_of_sequence[first]), table.slice(first, stop)
        num_documents, last = num_documents + int(is_new.sum()), int(table.documents[-1])
