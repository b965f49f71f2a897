"""The index of all token shards: totals that reconcile, and the parts of teacher work.

A *part* is a fixed group of training sequences, those of `streaming_chunk_size` documents of one shard: the unit of
resumable teacher work, named by its content keys. Making the index reads every shard once, in blocks; reading by it
costs what is asked for.
"""

import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.corpus.sharding import reconcile
from retort.io.digests import digest
from retort.io.files import read_json, write_atomically, write_json
from retort.tokens.sequences import SPLITS, SequenceTable, concatenate_tables
from retort.tokens.shards import (
    TOKENS_FORMAT,
    iterate_keys,
    iterate_token_shard,
    read_about,
    read_token_shard,
)

INDEX_VERSION = 3
COUNTS_FILE = "token_counts.npy"


@dataclass
class _Totals:
    """What a split holds, and of all its sequences what only reading them tells."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    positions: int = 0
    longest: int = 0  # tokens of the longest sequence
    token_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    shard_keys: list[str] = field(default_factory=list)  # a digest of each shard's content keys

    def read(self, path: Path, split: str) -> Iterator[SequenceTable]:
        """Yield a shard's sequences of a split, block by block, and add them up."""
        keys, document = xxhash.xxh3_128(), -1
        for table in iterate_token_shard(path, split):
            self.documents += int(np.count_nonzero(np.diff(table.documents, prepend=document)))
            document = int(table.documents[-1])
            self.sequences += len(table)
            self.tokens += len(table.ids)
            self.positions += table.num_positions
            self.longest = max(self.longest, int(table.lengths.max()))
            found = np.bincount(table.ids, minlength=len(self.token_counts))
            found[: len(self.token_counts)] += self.token_counts
            self.token_counts = found
            keys.update(np.ascontiguousarray(table.keys).data)
            yield table
        self.shard_keys.append(keys.hexdigest())

    def to_json(self) -> dict[str, int]:
        """Return the numbers that stand in the index."""
        names = ("documents", "sequences", "tokens", "positions", "longest")
        return {name: getattr(self, name) for name in names}


def build_index(
    shard_paths: list[Path], *, streaming_chunk_size: int
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Return the content of index.json, and how often each token id is to be predicted in the training sequences.

    In the index: totals, counts that reconcile, and the parts of teacher work.
    A part is `streaming_chunk_size` documents of one shard, named by a digest of its content keys. Memory holds a block
    of sequences, the list of parts, and of the part in hand the places of its documents.
    Raises ValueError when no sequence is left for training, or shards were made with different tokenizers.
    """
    about = [read_about(path) for path in shard_paths]
    tokenizers = {digest(tokenizer): tokenizer for tokenizer, _ in about}
    if len(tokenizers) > 1:
        raise ValueError(
            f"the token shards were made with {len(tokenizers)} different tokenizers "
            f"({', '.join(t['fingerprint'] for t in tokenizers.values())}): the tokenizer's files changed while "
            f"the shards were written. Delete {shard_paths[0].parent} and run the same command again."
        )
    train, val = _Totals(), _Totals()
    parts: list[dict[str, Any]] = []
    for place, path in enumerate(shard_paths):
        tables = train.read(path, "train")
        parts += _list_parts(tables, shard=place, documents_per_part=streaming_chunk_size)
        for _ in val.read(path, "val"):
            pass
    _refuse_repeated(parts, shard_paths)
    all_counts = [counts for _, counts in about]
    _reconcile_shards(all_counts)
    summary = _sum_counts(all_counts)
    if train.positions == 0:
        raise ValueError(
            f"no document of the corpus is left for training: {summary['documents']}. Every document was empty, "
            "skipped or held out. Look at the column names, dataset.validation_fraction and the files."
        )
    index = {
        "format": TOKENS_FORMAT,
        "version": INDEX_VERSION,
        "tokenizer": about[0][0],
        "content": digest(train.shard_keys),
        "counts": summary,
        **{split: totals.to_json() for split, totals in zip(SPLITS, (train, val), strict=True)},
        "token_counts": _digest_counts(train.token_counts),
        "shards": [path.name for path in shard_paths],
        "parts": parts,
    }
    return index, train.token_counts


def write_index(
    path: Path, shard_paths: list[Path], *, streaming_chunk_size: int
) -> dict[str, Any]:
    """Build and write index.json beside the shards. Raises ValueError when nothing is held out."""
    index, token_counts = build_index(shard_paths, streaming_chunk_size=streaming_chunk_size)
    if index["val"]["positions"] == 0:
        raise ValueError(
            f"none of the {index['train']['documents']} usable documents is held out, so no student could be measured: "
            "raise dataset.validation_fraction, or give more documents."
        )
    content = io.BytesIO()
    np.save(content, token_counts.astype("<i8"), allow_pickle=False)
    write_atomically(path.with_name(COUNTS_FILE), content.getvalue())
    write_json(path, index)
    return index


def _refuse_repeated(parts: list[dict[str, Any]], shard_paths: list[Path]) -> None:
    """Raise ValueError where two shards hold the same documents: one was copied over the other."""
    shard_of: dict[str, int] = {}
    for part in parts:
        if (other := shard_of.setdefault(part["name"], part["shard"])) != part["shard"]:
            raise ValueError(
                f"{shard_paths[part['shard']]} holds the documents of {shard_paths[other]}: one of the two is a copy, "
                "so others are missing. Delete both and run the same command again."
            )


def _reconcile_shards(counts: list[dict[str, Any]]) -> None:
    """Take what each shard was dealt out of its counts; raise ValueError where it is not everything, exactly once."""
    dealt = [shard.pop("dealt", None) for shard in counts]
    shardings = [shard.pop("sharding", None) for shard in counts]
    if None not in dealt:  # one reader drew for all shards
        reconcile(dealt, sharding=shardings[0])


def _digest_counts(counts: NDArray[np.int64]) -> str:
    return xxhash.xxh3_128_hexdigest(counts.astype("<i8").tobytes())


def name_part(table: SequenceTable) -> str:
    """Return the name of the part that holds these sequences: a digest of their content keys and documents.

    Without the documents, two equal parts of a corpus with repetitions would be one file, which says of both that
    they come from the documents of whichever was made first.
    """
    keys = xxhash.xxh3_128(np.ascontiguousarray(table.keys).tobytes())
    return _name_part(keys, [table.documents])


def _name_part(keys: xxhash.xxh3_128, documents: Iterable[NDArray[np.int64]]) -> str:
    """Return the name, from a digest of all keys that is gone on with."""
    for places in documents:
        keys.update(np.ascontiguousarray(places, dtype="<i8").tobytes())
    return keys.hexdigest()


def _list_parts(
    tables: Iterable[SequenceTable], *, shard: int, documents_per_part: int
) -> Iterator[dict[str, Any]]:
    """Yield the parts of one shard, whose training sequences come in `tables`, in order."""
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
        yield {
            "name": _name_part(keys, documents),
            "shard": shard,
            "first": first,
            "sequences": sequences,
            "tokens": tokens,
            "positions": positions,
        }
        first += sequences


def _cut_at_parts(
    tables: Iterable[SequenceTable], documents_per_part: int
) -> Iterator[tuple[int, SequenceTable]]:
    """Yield (number of the part, sequences of it): tables cut where a part ends, which may go on in the next table."""
    num_documents, last = 0, -1
    for table in tables:
        is_new = np.diff(table.documents, prepend=last) != 0
        part_of_sequence = (num_documents + np.cumsum(is_new) - 1) // documents_per_part
        cuts = (np.flatnonzero(np.diff(part_of_sequence)) + 1).tolist()
        for first, stop in pairwise([0, *cuts, len(table)]):
            yield int(part_of_sequence[first]), table.slice(first, stop)
        num_documents, last = num_documents + int(is_new.sum()), int(table.documents[-1])


def _sum_counts(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up nested dictionaries of numbers."""
    total: dict[str, Any] = {}
    for shard in counts:
        for key, value in shard.items():
            if isinstance(value, dict):
                total[key] = _sum_counts([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total


@dataclass(frozen=True)
class TokenIndex:
    """index.json and the folder that it lies in."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "TokenIndex":
        """Read index.json. Raises ValueError when it is missing or of another version."""
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: run the same snakemake command again to make it."
            )
        content = read_json(path)
        content = content if isinstance(content, dict) else {}
        if (content.get("format"), content.get("version")) != (TOKENS_FORMAT, INDEX_VERSION):
            raise ValueError(
                f"{path} is {content.get('format')!r} version {content.get('version')!r}; this Retort reads "
                f"{TOKENS_FORMAT!r} version {INDEX_VERSION}."
            )
        return cls(path, content)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The parts of teacher work, in their canonical order."""
        parts: list[dict[str, Any]] = self.content["parts"]
        return parts

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, held out or not: whoever reads sequences needs a context of that length."""
        return max(int(self.content[split]["longest"]) for split in SPLITS)

    def read_token_counts(self) -> NDArray[np.int64]:
        """Return how often each token id comes in the training sequences.

        Raises ValueError when the file is not the one that index.json was written with.
        """
        path = self.path.with_name(COUNTS_FILE)
        try:
            counts: NDArray[np.int64] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): delete {self.path} and run the same command again."
            ) from None
        if _digest_counts(counts) != self.content["token_counts"]:
            raise ValueError(
                f"{path} does not hold the counts that {self.path} was written with: delete {self.path} and run the "
                "same command again."
            )
        return counts

    def read_part(self, part: dict[str, Any]) -> SequenceTable:
        """Read the sequences of one part alone, and verify that they are those that its name says."""
        table = self._read_train(part["shard"], part["first"], part["first"] + part["sequences"])
        if name_part(table) != part["name"]:
            raise self._not_listed(part["shard"], f"part {part['name']}")
        return table

    def read_split(self, split: str, *, max_positions: int | None = None) -> SequenceTable:
        """Read all sequences of a split in index order; stop after the sequence that reaches max_positions."""
        return concatenate_tables(self._iterate_split(split, max_positions=max_positions))

    def _iterate_split(self, split: str, *, max_positions: int | None) -> Iterator[SequenceTable]:
        limit = sys.maxsize if max_positions is None else max_positions
        positions = 0
        for name in self.content["shards"]:
            for table in iterate_token_shard(self.path.parent / name, split):
                starts = positions + table.position_offsets[:-1]
                kept = table.slice(0, int(np.searchsorted(starts, limit, side="left")))
                positions += kept.num_positions
                yield kept
                if positions >= limit:
                    return

    def count_leaked(self, held_out: SequenceTable) -> int:
        """Return how many of the held-out sequences are, to the last token, among the training sequences too."""
        wanted = {key.tobytes() for key in held_out.keys}
        found: set[bytes] = set()
        for name in self.content["shards"]:
            for keys in iterate_keys(self.path.parent / name, "train"):
                found |= wanted.intersection(row.tobytes() for row in keys)
        return sum(key.tobytes() in found for key in held_out.keys)

    def read_sample(self, *, num_positions: int) -> tuple[NDArray[np.int64], SequenceTable]:
        """Return evenly spaced training sequences with about `num_positions` counted positions; reads no others.

        Their places are counted over all training sequences in index order, which is a merged cache's order.
        """
        train = self.content["train"]
        total = train["sequences"]
        count = min(total, max(1, round(num_positions * total / max(1, train["positions"]))))
        places = np.unique(np.linspace(0, total - 1, count).astype(np.int64))
        sizes = [0] * len(self.content["shards"])
        for part in self.parts:
            sizes[part["shard"]] += part["sequences"]
        stops = np.cumsum(sizes, dtype=np.int64)
        tables = []
        for place in places.tolist():
            shard = int(np.searchsorted(stops, place, side="right"))
            first = place - int(stops[shard]) + sizes[shard]
            tables.append(self._read_train(shard, first, first + 1))
            if len(tables[-1]) == 0:
                raise self._not_listed(shard, f"sequence {first}")
        return places, concatenate_tables(tables)

    def _read_train(self, shard: int, first: int, stop: int) -> SequenceTable:
        path = self.path.parent / self.content["shards"][shard]
        return read_token_shard(path, "train", first=first, stop=stop)

    def _not_listed(self, shard: int, what: str) -> ValueError:
        path = self.path.parent / self.content["shards"][shard]
        return ValueError(
            f"{path} no longer holds the sequences that {self.path} lists ({what}): the shard was made again from "
            "other text. Delete index.json and run the same command again."
        )


def describe_index(index: dict[str, Any]) -> str:
    """Return in a few lines what became of the corpus: every document and every token."""
    documents, tokens = index["counts"]["documents"], index["counts"]["tokens"]
    lines = []
    for split, words in (("train", "to train on"), ("val", "held out")):
        found = index[split]
        lines.append(
            f"{words}: {found['documents']:,} documents, {found['sequences']:,} sequences, "
            f"{found['positions']:,} positions"
        )
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in documents["skipped"].items()) or "none"
    cleaned = ", ".join(f"{n:,} {reason}" for reason, n in documents["cleaned"].items()) or "none"
    lines.append(
        f"documents: {documents['read']:,} read = {documents['used']:,} used + skipped ({skipped}); "
        f"cleaned: {cleaned}"
    )
    lines.append(
        f"tokens: {tokens['read']:,} read = {tokens['stored']:,} stored + {tokens['truncated']:,} truncated + "
        f"{tokens['without_loss']:,} of prompts alone + {tokens['too_short']:,} in documents of one token; "
        f"{tokens['documents_split']:,} long documents split"
    )
    return "\n".join(lines)
