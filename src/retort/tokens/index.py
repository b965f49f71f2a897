"""The index of all token shards: verified totals, and the parts of the teacher's work.

A *part* is the training sequences of `streaming_chunk_size` documents of one shard: the unit of resumable teacher work,
named by its content keys. Building the index reads every shard once, in blocks; reading through it reads only the
sequences that are returned, and, for a split, the content keys of all (16 bytes each).
"""

import io
import sys
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
from pydantic import Field

from retort.corpus.documents import Counts
from retort.corpus.sharding import check_assignments
from retort.io.digests import digest
from retort.io.files import write_atomically
from retort.io.fingerprints import TokenizerIdentity
from retort.io.records import Entry, Record
from retort.io.run_record import RUN_FILE, describe_run
from retort.tokens.chat import DEFAULT_DATE
from retort.tokens.sequences import SequenceTable, concatenate_tables
from retort.tokens.shards import (
    TOKENS_FORMAT,
    ShardCounts,
    iterate_keys,
    iterate_token_shard,
    read_shard_metadata,
    read_token_shard,
)
from retort.tokens.tokenize import TokenCounts

COUNTS_FILE = "token_counts.npy"


class SplitTotals(Entry):
    """Totals of a split; `longest`: tokens in its longest sequence; `sources`: tokens by source of a mixture."""

    documents: int
    sequences: int
    tokens: int
    positions: int
    longest: int
    sources: dict[str, int] = Field(default={}, exclude_if=lambda found: not found)


class Part(Entry):
    """A part: `sequences` training sequences of a shard, from number `first` on."""

    name: str
    shard: int
    first: int
    sequences: int
    tokens: int
    positions: int


class IndexCounts(Entry):
    """Sums of what the shards count."""

    documents: Counts
    tokens: TokenCounts


class IndexRecord(Record, format=TOKENS_FORMAT, version=3):
    """index.json. content: digest of the training sequences' content keys; token_counts: of token_counts.npy.

    chat_date: the date that the chat template printed, if it prints one.
    """

    tokenizer: TokenizerIdentity
    content: str
    counts: IndexCounts
    train: SplitTotals
    val: SplitTotals
    token_counts: str
    shards: tuple[str, ...]
    parts: tuple[Part, ...]
    chat_date: str | None = Field(default=None, exclude_if=lambda date: date is None)


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
        token_counts=_digest_counts(train.token_counts),
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


def _digest_counts(counts: NDArray[np.int64]) -> str:
    return xxhash.xxh3_128_hexdigest(counts.astype("<i8").tobytes())


def name_part(table: SequenceTable) -> str:
    """Return the name of the part with these sequences: a digest of their content keys and document indices.

    Without the indices, two equal parts of a corpus with repetitions would share one file, with the indices of one.
    """
    keys = xxhash.xxh3_128(np.ascontiguousarray(table.keys).tobytes())
    return _name_part(keys, [table.documents])


def _name_part(keys: xxhash.xxh3_128, documents: Iterable[NDArray[np.int64]]) -> str:
    """Return the name, from the hash state of all keys, which is updated with the document indices."""
    for indices in documents:
        keys.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
    return keys.hexdigest()


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
            name=_name_part(keys, documents),
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


@dataclass(frozen=True)
class TokenIndex:
    """The index, and access to the shards next to it."""

    path: Path
    record: IndexRecord

    @classmethod
    def read(cls, path: Path) -> "TokenIndex":
        """Read index.json. Raises ValueError as `Record.read` does."""
        return cls(path, IndexRecord.read(path))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts by shard and document."""
        return self.record.parts

    @property
    def chat_date(self) -> str:
        """The date that the chat template was given, if it prints one."""
        return self.record.chat_date or DEFAULT_DATE

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence of both splits: the context length that a model needs."""
        return max(self.record.train.longest, self.record.val.longest)

    @property
    def held_out_normalized(self) -> int:
        """Number of held-out documents whose length in bytes the tokenizer changed (see `TokenCounts`)."""
        return self.record.counts.tokens.held_out_normalized

    def read_token_counts(self) -> NDArray[np.int64]:
        """Return how often each token id occurs in the training sequences, int64 [V].

        Raises ValueError when the file is missing or does not match index.json.
        """
        path = self.path.with_name(COUNTS_FILE)
        try:
            counts: NDArray[np.int64] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): delete {self.path} and rerun the same command."
            ) from None
        if _digest_counts(counts) != self.record.token_counts:
            raise ValueError(
                f"{path} does not match {self.path}: delete {self.path} and rerun the same command."
            )
        return counts

    def read_part(self, part: Part) -> SequenceTable:
        """Return the sequences of one part; reads no others. Raises ValueError when they do not match its name."""
        table = self._read_train(part.shard, part.first, part.first + part.sequences)
        if name_part(table) != part.name:
            raise self._not_listed(part.shard, f"part {part.name}")
        return table

    def read_split(self, split: str, *, max_positions: int | None = None) -> SequenceTable:
        """Return a split's sequences in index order, up to and including the one that reaches max_positions.

        Raises ValueError when the shards are not those that the index lists, by all content keys and by size.
        """
        self._require_shards()
        table = concatenate_tables(self._iterate_split(split, max_positions=max_positions))
        totals: SplitTotals = getattr(self.record, split)
        found, listed = (len(table), table.num_positions), (totals.sequences, totals.positions)
        if found != listed and (max_positions is None or found[1] < min(max_positions, listed[1])):
            raise self._other_shards(
                f"{split} has {found[0]:,} sequences, {found[1]:,} positions, not {listed[0]:,}, {listed[1]:,}"
            )
        return table

    def _require_shards(self) -> None:
        """Compare the content keys of all training sequences, 16 bytes each, with the index; reads nothing else."""
        shard_keys = []
        for name in self.record.shards:
            keys = xxhash.xxh3_128()
            for block in iterate_keys(self.path.parent / name, "train"):
                keys.update(np.ascontiguousarray(block).data)
            shard_keys.append(keys.hexdigest())
        if (found := digest(shard_keys)) != self.record.content:
            raise self._other_shards(f"content {found}, not {self.record.content}")

    def _iterate_split(self, split: str, *, max_positions: int | None) -> Iterator[SequenceTable]:
        limit = sys.maxsize if max_positions is None else max_positions
        positions = 0
        for name in self.record.shards:
            for table in iterate_token_shard(self.path.parent / name, split):
                starts = positions + table.position_offsets[:-1]
                kept = table.slice(0, int(np.searchsorted(starts, limit, side="left")))
                positions += kept.num_positions
                yield kept
                if positions >= limit:
                    return

    def count_leaked(self, held_out: SequenceTable) -> int:
        """Return how many of the held-out sequences are also training sequences, by content key."""
        wanted = {key.tobytes() for key in held_out.keys}
        found: set[bytes] = set()
        for name in self.record.shards:
            for keys in iterate_keys(self.path.parent / name, "train"):
                found |= wanted.intersection(row.tobytes() for row in keys)
        return sum(key.tobytes() in found for key in held_out.keys)

    def read_sample(self, *, num_positions: int) -> tuple[NDArray[np.int64], SequenceTable]:
        """Return (numbers int64 [S], sequences) of evenly spaced training sequences; reads no others.

        The sample has about `num_positions` counted positions. Sequences are numbered over all training sequences in
        index order, which is also the order of a merged cache. Raises ValueError when a shard no longer has them.
        """
        train = self.record.train
        total = train.sequences
        count = min(total, max(1, round(num_positions * total / max(1, train.positions))))
        numbers = np.unique(np.linspace(0, total - 1, count).astype(np.int64))
        sizes = [0] * len(self.record.shards)
        for part in self.parts:
            sizes[part.shard] += part.sequences
        stops = np.cumsum(sizes, dtype=np.int64)
        tables = []
        for number in numbers.tolist():
            shard = int(np.searchsorted(stops, number, side="right"))
            first = number - int(stops[shard]) + sizes[shard]
            tables.append(self._read_train(shard, first, first + 1))
            if len(tables[-1]) == 0:
                raise self._not_listed(shard, f"sequence {first}")
        return numbers, concatenate_tables(tables)

    def _read_train(self, shard: int, first: int, stop: int) -> SequenceTable:
        path = self.path.parent / self.record.shards[shard]
        return read_token_shard(path, "train", first=first, stop=stop)

    def _other_shards(self, fault: str) -> ValueError:
        return ValueError(
            f"the token shards beside {self.path} are not those that it lists ({fault}): at least one was replaced. "
            f"Delete {self.path.parent} and rerun the same command."
        )

    def _not_listed(self, shard: int, what: str) -> ValueError:
        path = self.path.parent / self.record.shards[shard]
        return ValueError(
            f"{path} no longer contains the sequences that {self.path} lists ({what}): the shard was rewritten from "
            "other text. Delete index.json and rerun the same command."
        )


def describe_index(index: IndexRecord) -> str:
    """Return a summary of a few lines: documents and tokens, used and left out."""
    documents, tokens = index.counts.documents, index.counts.tokens
    lines = [
        f"{words}: {found.documents:,} documents, {found.sequences:,} sequences, {found.positions:,} positions"
        for words, found in (("to train on", index.train), ("held out", index.val))
    ]
    skipped = documents.describe_skipped() or "none"
    cleaned = ", ".join(f"{n:,} {reason}" for reason, n in documents.cleaned.items()) or "none"
    lines.append(
        f"documents: {documents.read:,} read = {documents.used:,} used + skipped ({skipped}); cleaned: {cleaned}"
    )
    lines.append(
        f"tokens: {tokens.read:,} read = {tokens.stored:,} stored + {tokens.truncated:,} truncated + "
        f"{tokens.without_loss:,} of prompts alone + {tokens.too_short:,} in documents of one token; "
        f"{tokens.documents_split:,} long documents split"
    )
    lines += describe_sources(documents, index.train)
    if tokens.with_control_tokens:
        lines.append(
            f"control tokens: written out in {tokens.with_control_tokens:,} documents (see dataset.control_tokens)"
        )
    return "\n".join(lines)


def describe_sources(documents: Counts, train: SplitTotals) -> list[str]:
    """Return a line for each source of a mixture: its shares of what is trained on, and what is left out."""
    lines = []
    for label, found in sorted(documents.sources.items()):
        number, skipped = found.used - found.held_out, found.describe_skipped()
        lines.append(
            f"source {label}: {number:,} documents to train on ({number / train.documents:.1%}), "
            f"{train.sources.get(label, 0) / train.tokens:.1%} of the tokens; {found.held_out:,} held out"
            f"{f'; skipped: {skipped}' if skipped else ''}"
        )
    return lines
