"""Sequences on disk: the token shard file, and the index that lists all shards and the parts of teacher work.

A *shard* is a slice of the corpus for tokenizing. A *part* is a fixed group of training sequences, those of
`streaming_chunk_size` documents of one shard: the unit of resumable teacher work, named by its content keys.
"""

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from retort.commands import SYSTEM_ERRORS
from retort.config import Dataset
from retort.corpus import read_documents, unchanged
from retort.documents import Counts
from retort.drawing import read_drawn
from retort.provenance import (
    digest,
    read_json,
    replacing,
    write_atomically,
    write_json,
    write_pieces,
)
from retort.sharding import Dealt, reconcile
from retort.tokens import (
    SPLITS,
    SequenceTable,
    TokenCounts,
    concatenate_tables,
    tokenize_documents,
)

TOKENS_FORMAT = "retort-tokens"
TOKENS_VERSION = 1
INDEX_VERSION = 2
COUNTS_FILE = "token_counts.npy"


def write_h5(
    path: Path,
    fill: Callable[[h5py.File], None],
    *,
    verify: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write an HDF5 file atomically (in memory, then temporary name, fsync, rename); equal content gives equal bytes.

    `verify` is called with the temporary file.

    In memory because HDF5 takes a full disk badly: seen were a segmentation fault, and a torn file without an error.
    libver "earliest" because files of "latest" carry a consistency flag that a SIGKILL leaves set.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver="earliest") as file:
        fill(file)
    with replacing(path) as temporary:
        with temporary.open("wb") as written:
            write_pieces(written, image.getbuffer())
        verify(temporary)


def write_text(group: h5py.Group, name: str, text: str) -> None:
    """Store text as a dataset of its UTF-8 bytes.

    HDF5's own strings of any length lie in a heap on which one flipped bit can send its reader into an endless loop;
    short ones are limited to 64 KiB.
    """
    group.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8))


def read_text(group: h5py.Group, name: str) -> str:
    """Read what `write_text` wrote."""
    return bytes(group[name][()]).decode()


def write_table(group: h5py.Group, table: SequenceTable) -> None:
    """Write the table's columns as datasets of `group`."""
    for field in fields(table):
        value = getattr(table, field.name)
        if field.name == "label_names":
            write_text(group, "label_names", json.dumps(value))
        else:
            group.create_dataset(
                field.name, data=value.astype("u1") if value.dtype == np.bool_ else value
            )


def read_table(group: h5py.Group) -> SequenceTable:
    """Read a table written by `write_table`."""
    columns = {f.name: group[f.name][()] for f in fields(SequenceTable) if f.name != "label_names"}
    columns["loss_mask"] = columns["loss_mask"].astype(np.bool_)
    names = tuple((str(c), str(lang)) for c, lang in json.loads(read_text(group, "label_names")))
    return SequenceTable(**columns, label_names=names)


def write_token_shard(
    path: Path,
    tables: dict[str, SequenceTable],
    *,
    counts: dict[str, Any],
    tokenizer: dict[str, Any],
) -> None:
    """Write one shard: a group for each split, the counts, the tokenizer's fingerprint."""

    def fill(file: h5py.File) -> None:
        file.attrs["format"] = np.bytes_(TOKENS_FORMAT)
        file.attrs["version"] = TOKENS_VERSION
        write_text(file, "counts", json.dumps(counts, sort_keys=True))
        write_text(file, "tokenizer", json.dumps(tokenizer, sort_keys=True))
        for split in SPLITS:
            write_table(file.create_group(split), tables[split])

    write_h5(path, fill)


def read_token_shard(path: Path, split: str) -> SequenceTable:
    """Read one split of a shard and verify its content keys. Raises ValueError on any other file."""
    with open_h5(path, expected_format=TOKENS_FORMAT, version=TOKENS_VERSION) as file:
        table = read_table(file[split])
        table.verify_keys(source=str(path))
    return table


@contextmanager
def open_h5(path: Path, *, expected_format: str, version: int) -> Iterator[h5py.File]:
    """Open an HDF5 file of ours for reading; one sentence when it is missing, torn, damaged, foreign or newer.

    What h5py and numpy raise on damage (KeyError, RuntimeError, TypeError, ...) while the file is open becomes that
    ValueError too.
    """
    try:
        with h5py.File(path, "r") as file:
            _refuse_other_format(path, file, expected_format, version)
            yield file
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: run the same snakemake command again to make it."
        ) from None
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise ValueError(
            f"{path} cannot be read as HDF5 ({error}): it was cut short or damaged. Delete it and run the "
            "same command again."
        ) from None


def _refuse_other_format(path: Path, file: h5py.File, expected_format: str, version: int) -> None:
    name = file.attrs.get("format")
    name = name.decode() if isinstance(name, bytes) else name
    if name != expected_format:
        raise ValueError(f"{path} is no {expected_format} file: its format attribute is {name!r}.")
    found = int(file.attrs.get("version", 0))
    if found != version:
        raise ValueError(
            f"{path} has format version {found}, this Retort reads {version}: use the Retort that wrote it, "
            "or make the file again with this one."
        )


def build_index(
    shard_paths: list[Path], *, streaming_chunk_size: int
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """Return the content of index.json, and how often each token id is to be predicted in the training sequences.

    In the index: totals, counts that reconcile, and the parts of teacher work.
    A part is `streaming_chunk_size` documents of one shard, named by a digest of its content keys.
    Raises ValueError when no sequence is left for training, or shards were made with different tokenizers.
    """
    shards, parts, all_keys = [], [], []
    token_counts = np.zeros(0, np.int64)
    totals = {
        split: {"documents": 0, "sequences": 0, "tokens": 0, "positions": 0} for split in SPLITS
    }
    tokenizers: dict[str, Any] = {}
    counts: list[dict[str, Any]] = []
    for place, path in enumerate(shard_paths):
        with open_h5(path, expected_format=TOKENS_FORMAT, version=TOKENS_VERSION) as file:
            text = read_text(file, "tokenizer")
            tokenizers[text] = json.loads(text)
            counts.append(json.loads(read_text(file, "counts")))
        for split in SPLITS:
            table = read_token_shard(path, split)
            totals[split]["documents"] += len(np.unique(table.documents))
            totals[split]["sequences"] += len(table)
            totals[split]["tokens"] += len(table.ids)
            totals[split]["positions"] += table.num_positions
            if split == "train":
                parts += _list_parts(table, shard=place, documents_per_part=streaming_chunk_size)
                all_keys.append(table.keys.tobytes())
                found = np.bincount(table.ids, minlength=len(token_counts))
                found[: len(token_counts)] += token_counts
                token_counts = found
        shards.append(path.name)
    if len(tokenizers) > 1:
        raise ValueError(
            f"the token shards were made with {len(tokenizers)} different tokenizers "
            f"({', '.join(t['fingerprint'] for t in tokenizers.values())}): the tokenizer's files changed while "
            f"the shards were written. Delete {shard_paths[0].parent} and run the same command again."
        )
    _reconcile_shards(counts)
    summary = _sum_counts(counts)
    if totals["train"]["positions"] == 0:
        raise ValueError(
            f"no document of the corpus is left for training: {summary['documents']}. Every document was empty, "
            "skipped or held out. Look at the column names, dataset.validation_fraction and the files."
        )
    index = {
        "format": TOKENS_FORMAT,
        "version": INDEX_VERSION,
        "tokenizer": next(iter(tokenizers.values())),
        "content": digest([xxhash.xxh3_128_hexdigest(keys) for keys in all_keys]),
        "counts": summary,
        **totals,
        "token_counts": _digest_counts(token_counts),
        "shards": shards,
        "parts": parts,
    }
    return index, token_counts


def _reconcile_shards(counts: list[dict[str, Any]]) -> None:
    """Take what each shard was dealt out of its counts; raise ValueError where it is not everything, exactly once."""
    dealt = [shard.pop("dealt", None) for shard in counts]
    shardings = [shard.pop("sharding", None) for shard in counts]
    if None not in dealt:  # shards of an earlier Retort do not say
        reconcile(dealt, sharding=shardings[0])


def _digest_counts(counts: NDArray[np.int64]) -> str:
    return xxhash.xxh3_128_hexdigest(counts.astype("<i8").tobytes())


def name_part(table: SequenceTable) -> str:
    """Return the name of the part that holds these sequences: a digest of their content keys and documents.

    Without the documents, two equal parts of a corpus with repetitions would be one file, which says of both that
    they come from the documents of whichever was made first.
    """
    state = xxhash.xxh3_128(np.ascontiguousarray(table.keys).tobytes())
    state.update(np.ascontiguousarray(table.documents, dtype="<i8").tobytes())
    return state.hexdigest()


def _list_parts(
    table: SequenceTable, *, shard: int, documents_per_part: int
) -> list[dict[str, Any]]:
    """Cut one shard's training sequences at every `documents_per_part` documents."""
    if len(table) == 0:
        return []
    is_new = np.concatenate([[True], np.diff(table.documents) != 0])
    part_of_sequence = (np.cumsum(is_new) - 1) // documents_per_part
    starts = np.flatnonzero(np.concatenate([[True], np.diff(part_of_sequence) != 0])).tolist()
    parts = []
    for first, stop in zip(starts, [*starts[1:], len(table)], strict=True):
        piece = table.slice(first, stop)
        parts.append(
            {
                "name": name_part(piece),
                "shard": shard,
                "first": first,
                "sequences": len(piece),
                "tokens": len(piece.ids),
                "positions": piece.num_positions,
            }
        )
    return parts


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
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}): delete it and run the same command again."
            ) from None
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
        """Read the sequences of one part, and verify that they are those that its name says."""
        path = self.path.parent / self.content["shards"][part["shard"]]
        table = read_token_shard(path, "train")
        bounds = (part["first"], part["first"] + part["sequences"])
        table = table.slice(*(min(bound, len(table)) for bound in bounds))
        if name_part(table) != part["name"]:
            raise ValueError(
                f"{path} no longer holds the sequences that {self.path} lists (part {part['name']}): the shard "
                "was made again from other text. Delete index.json and run the same command again."
            )
        return table

    def read_split(self, split: str, *, max_positions: int | None = None) -> SequenceTable:
        """Read all sequences of a split in index order; stop after the sequence that reaches max_positions."""
        tables: list[SequenceTable] = []
        positions = 0
        for name in self.content["shards"]:
            table = read_token_shard(self.path.parent / name, split)
            if max_positions is not None:
                room = max(0, max_positions - positions)
                keep = int(np.searchsorted(table.position_offsets[:-1], room, side="left"))
                table = table.slice(0, keep)
            positions += table.num_positions
            tables.append(table)
        return concatenate_tables(tables)

    def read_sample(self, *, num_positions: int) -> tuple[NDArray[np.int64], SequenceTable]:
        """Return evenly spaced training sequences with about `num_positions` counted positions.

        Their places are counted over all training sequences in index order, which is a merged cache's order.
        """
        train = self.content["train"]
        total = train["sequences"]
        count = min(total, max(1, round(num_positions * total / max(1, train["positions"]))))
        places = np.unique(np.linspace(0, total - 1, count).astype(np.int64))
        tables, first = [], 0
        for name in self.content["shards"]:
            table = read_token_shard(self.path.parent / name, "train")
            inside = places[(places >= first) & (places < first + len(table))] - first
            tables += [table.slice(int(i), int(i) + 1) for i in inside]
            first += len(table)
        return places, concatenate_tables(tables)


# ---------------------------------------------------------------------------------------------------------
# The rules' work


def tokenize_shard(
    out: Path,
    dataset: Dataset,
    tokenizer: Any,
    *,
    fingerprint: dict[str, Any],
    shard: int,
    drawn: Path | None,
    stamp: str | None = None,
) -> str:
    """Tokenize one shard of the corpus (of a drawn one where `drawn` names its folder); return what was counted.

    Raises ValueError when the corpus is no longer what `stamp` (see `stamp_files`) was taken of.
    """
    started = time.monotonic()
    documents, counts, dealt = Counts(), TokenCounts(), Dealt()
    source = (
        read_drawn(drawn, shard=shard, counts=documents, dealt=dealt)
        if drawn
        else read_documents(
            dataset, shard=shard, num_shards=dataset.num_shards, counts=documents, dealt=dealt
        )
    )
    by_split: dict[str, list[Any]] = {split: [] for split in SPLITS}
    with unchanged(dataset, None if drawn else stamp):
        for document in source:
            by_split[document.split].append(document)
    tables = {s: tokenize_documents(by_split[s], tokenizer, dataset, counts=counts) for s in SPLITS}
    documents.reconcile()
    counted: dict[str, Any] = {"documents": documents.to_json(), "tokens": asdict(counts)}
    if dealt.number_of_all:  # one reader that draws for all shards deals once, and cannot err
        counted |= {"dealt": dealt.to_json(), "sharding": dataset.sharding}
    write_token_shard(out, tables, counts=counted, tokenizer=fingerprint)
    seconds = time.monotonic() - started
    return (
        f"shard {shard}: {documents.read:,} documents, {counts.stored:,} tokens in "
        f"{sum(len(t) for t in tables.values()):,} sequences, {counts.read / max(seconds, 1e-9):,.0f} tokens/s"
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
