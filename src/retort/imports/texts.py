"""The texts of a published dataset, as sequences: each file becomes a token shard."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retort.cache.entropy_codec import hash_to_uniform
from retort.corpus.documents import Counts
from retort.imports.source import SourceFile, SourceRows, count_rows, read_rows
from retort.io.fingerprints import TokenizerIdentity
from retort.tokens.index import TokenIndex
from retort.tokens.indexing import write_index
from retort.tokens.sequences import SPLITS, build_table
from retort.tokens.shards import read_shard_metadata, write_token_shard
from retort.tokens.tokenize import TokenCounts

_PART_TOKENS = 1 << 18
_MAX_PART_DOCUMENTS = 1000
_HELD_OUT_KEY = b"held out"  # which documents are held out depends on their numbers alone
_IGNORED = -100  # among labels


class Text(NamedTuple):
    """Tokens of a row that follow one another: its number in the corpus, the row in its batch, where it begins there,
    ids int32 [T], loss mask [T], and whether it is held out."""

    document: int
    row: int
    start: int
    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    is_held_out: bool


def list_texts(
    rows: SourceRows, *, first_document: int, validation_fraction: float
) -> Iterator[Text]:
    """Yield the texts of some rows of which a prediction counts; first_document: number of the file's first row.

    A packed row, whose attention_mask numbers its texts, is cut into them: its last positions predict other texts.
    """
    documents = first_document + rows.first + np.arange(len(rows.ids))
    held_out = hash_to_uniform(_HELD_OUT_KEY, documents) < validation_fraction
    for row, ids in enumerate(rows.ids):
        segments = np.ones(len(ids), np.int64) if rows.segments is None else rows.segments[row]
        cuts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(cuts):
            mask = np.arange(start, stop) < stop - 1
            if rows.labels is not None:
                mask[:-1] &= rows.labels[row][start + 1 : stop] != _IGNORED
            if start < stop and segments[start] > 0 and mask.any():
                own = ids[start:stop].astype(np.int32)
                yield Text(int(documents[row]), row, start, own, mask, bool(held_out[row]))


def write_tokens(
    folder: Path,
    files: list[SourceFile],
    identity: TokenizerIdentity,
    *,
    validation_fraction: float,
) -> tuple[TokenIndex, list[int]]:
    """Write a token shard for each file, unless it exists, and the index; return it, and each file's first document.

    Memory holds the tokens of one file. Raises ValueError when a file is damaged, has ids beyond the tokenizer, or
    nothing is held out.
    """
    firsts, paths = [0], []
    for number, file in enumerate(files):
        path = folder / f"shard_{number:05d}.h5"
        if not path.exists():
            _write_shard(
                path,
                file,
                identity,
                first_document=firsts[-1],
                validation_fraction=validation_fraction,
            )
        firsts.append(firsts[-1] + count_rows(file))
        paths.append(path)
    index = folder / "index.json"
    if not index.exists():
        counts = [read_shard_metadata(path)[1] for path in paths]
        stored = sum(found.tokens.stored for found in counts)
        mean = stored / max(1, sum(found.documents.used for found in counts))
        chunk = min(max(1, round(_PART_TOKENS / max(1, mean))), _MAX_PART_DOCUMENTS)
        try:
            write_index(index, paths, streaming_chunk_size=chunk)
        except ValueError as error:
            raise ValueError(
                f"{error} Here: --validation-fraction, and another --output."
            ) from None
    return TokenIndex.read(index), firsts


def _write_shard(
    path: Path,
    file: SourceFile,
    identity: TokenizerIdentity,
    *,
    first_document: int,
    validation_fraction: float,
) -> None:
    documents, tokens = Counts(), TokenCounts()
    found: dict[str, list[Text]] = {split: [] for split in SPLITS}
    for rows in read_rows(file):
        texts = list(
            list_texts(rows, first_document=first_document, validation_fraction=validation_fraction)
        )
        used = {text.row for text in texts}
        for row, ids in enumerate(rows.ids):
            if len(ids) and not 0 <= ids.min() <= ids.max() < identity.size:
                raise ValueError(
                    f"{file.name}, row {rows.first + row}: has id {ids.max()}, but the tokenizer only {identity.size}: "
                    "it is another one than the dataset was made with (--tokenizer)."
                )
            documents.read += 1
            if row not in used:
                documents.skip("without a position that counts", rows.first + row)
        documents.used += len(used)
        documents.held_out += len({text.row for text in texts if text.is_held_out})
        tokens.read += sum(map(len, rows.ids))
        tokens.stored += sum(len(text.ids) for text in texts)
        for text in texts:
            found["val" if text.is_held_out else "train"].append(text)
    tokens.documents, tokens.too_short = documents.used, tokens.read - tokens.stored
    tokens.reconcile()
    documents.reconcile()
    tables = {
        split: build_table([(t.ids, t.loss_mask, t.document, ("", "")) for t in texts])
        for split, texts in found.items()
    }
    counts = {"documents": documents.to_json(), "tokens": tokens.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_token_shard(path, tables, counts=counts, tokenizer=identity)
