"""The index of all token shards: verified totals, and the parts of the teacher's work.

A *part* is the training sequences of `streaming_chunk_size` documents of one shard: the unit of resumable teacher work,
named by its content keys. Reading through the index reads only the sequences that are returned, and, for a split, the
content keys of all (16 bytes each). `indexing` makes it.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from retort.corpus.documents import Counts
from retort.io.digests import digest
from retort.io.fingerprints import TokenizerIdentity
from retort.io.records import Entry, Record
from retort.tokens.chat import DEFAULT_DATE
from retort.tokens.sequences import SequenceTable, concatenate_tables
from retort.tokens.shards import (
    TOKENS_FORMAT,
    iterate_keys,
    iterate_token_shard,
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


def digest_counts(counts: NDArray[np.int64]) -> str:
    """Return the digest of how often each token id occurs, int64 [V]."""
    return xxhash.xxh3_128_hexdigest(counts.astype("<i8").tobytes())


def name_part(table: SequenceTable) -> str:
    """Return the name of the part with these sequences: a digest of their content keys and document indices.

    Without the indices, two equal parts of a corpus with repetitions would share one file, with the indices of one.
    """
    keys = xxhash.xxh3_128(np.ascontiguousarray(table.keys).tobytes())
    return name_keys(keys, [table.documents])


def name_keys(keys: xxhash.xxh3_128, documents: Iterable[NDArray[np.int64]]) -> str:
    """Return the name of a part, from the hash state of all keys, which is updated with the document indices."""
    for indices in documents:
        keys.update(np.ascontiguousarray(indices, dtype="<i8").tobytes())
    return keys.hexdigest()


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
        if digest_counts(counts) != self.record.token_counts:
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
        return numbers, self.read_sequences(numbers)

    def read_sequences(self, numbers: NDArray[np.int64]) -> SequenceTable:
        """Return training sequences by their numbers int64 [S] (see `read_sample`); reads no others.

        Raises ValueError when a shard no longer has them.
        """
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
        return concatenate_tables(tables)

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
