"""Documents from any source, dealt to shards, cleaned, split into train and held-out, and counted.

A document's *index* is its place in the corpus: the order of the source's files and rows (or of its
seeded shuffle), counted before anything is skipped. Which shard a document goes to depends on its
index alone; which side of the held-out split, on its text and the seed alone, so exact copies lie
on one side.

A stream and the demo's text are *drawn* once (`draw_corpus`): read in their order and written to
one file per shard, from which `read_drawn` yields what `read_documents` yields of a source that can
be read again.
"""

import gzip
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from retort.config import Dataset
from retort.demo_text import describe_demo
from retort.documents import Counts, Document, make_document
from retort.provenance import (
    read_json,
    remove_stale_temporaries,
    stamp_files,
    temporary_name,
    write_json,
)
from retort.readers import Row, naming, open_bytes, read_file
from retort.sources import choose_columns, is_hub, list_files, read_rows

__all__ = [
    "Counts",
    "Document",
    "check_corpus",
    "corpus_files",
    "draw_corpus",
    "is_drawn",
    "read_documents",
    "read_drawn",
    "unchanged",
]

_DRAWN_FORMAT = {"format": "retort corpus", "version": 1}
_SCANNED_DOCUMENTS = 1000
_SECONDS_BETWEEN_LINES = 10.0


def corpus_files(dataset: Dataset) -> list[Path]:
    """Return a local corpus's files in reading order; none for the demo and for the Hub.

    Raises ValueError, naming path or glob, when there are none.
    """
    return list_files(dataset)


def is_drawn(dataset: Dataset) -> bool:
    """Say whether the corpus is drawn into a folder before it is tokenized."""
    return dataset.streaming or dataset.name == "demo"


def read_documents(
    dataset: Dataset, *, shard: int, num_shards: int, counts: Counts
) -> Iterator[Document]:
    """Yield one shard's usable documents by rising index; add what was read to `counts`.

    `max_samples` takes the first so many documents of the corpus (and of `validation_split`, where
    set). A `shuffle` of a source that is no stream holds one shard's raw rows in memory. Raises
    ValueError for what cannot be read.
    """
    assert 0 <= shard < num_shards, (shard, num_shards)
    shard_of = _choose_sharding(dataset, num_shards)
    for index, split, row in _number_rows(dataset, lambda index: shard_of(index) == shard):
        document = make_document(row(), dataset, index=index, split=split, counts=counts)
        if document is not None:
            yield document


def check_corpus(dataset: Dataset) -> dict[str, Any]:
    """Look at a corpus before anything expensive starts; return what was found, as a JSON object.

    Every file is opened and its columns looked for; documents are read until 1,000 were and one of
    them is usable. Raises ValueError in one sentence for anything missing, unreadable or empty.
    """
    files = list_files(dataset)
    if not is_hub(dataset):
        for path in files:
            next(read_file(path, dataset.name, choose_columns(dataset)), None)
    probe = replace(dataset, shuffle=False, streaming=dataset.streaming or is_hub(dataset))
    try:
        counts, columns = _scan(probe)
    except ValueError as error:
        is_offline = isinstance(error.__cause__, ConnectionError | TimeoutError)
        if dataset.streaming or not is_offline:
            raise
        counts, columns = _scan(dataset)  # a copy may lie in the cache of a machine without network
    _refuse_empty(dataset, counts)
    return {
        "name": dataset.name,
        "files": [str(path) for path in files],
        "bytes": sum(path.stat().st_size for path in files),
        "columns": columns,
        "scanned": counts.to_json(),
        "packages": describe_demo() if dataset.name == "demo" else {},
    }


@contextmanager
def unchanged(dataset: Dataset, stamp: str | None) -> Iterator[None]:
    """Raise ValueError where the local files are not, or at the end no longer, those that `stamp` was taken of.

    What is made from a corpus is named by its content as it was when the command began; text that was edited
    since would lie under the old text's name. None: whoever runs a script by hand names no content.
    """

    def compare() -> None:
        if stamp not in (None, stamp_files(list_files(dataset))):
            raise ValueError(
                f"the files of dataset.data_files {dataset.data_files or dataset.name!r} changed while Retort read "
                "them; nothing was kept of what was read. Run the same command again: it goes on with the files as "
                "they are now."
            )

    compare()
    yield
    compare()


def draw_corpus(dataset: Dataset, out_dir: Path, *, stamp: str | None = None) -> dict[str, Any]:
    """Read a corpus once, in its order, into a file per shard and corpus.json, which is returned.

    Files appear under their names when all are complete; memory holds one document (and the
    shuffle's buffer). The content of the files depends on the source and the dataset section alone.
    Raises ValueError when nothing is usable, or the source is no longer what `stamp` was taken of.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(out_dir)
    paths = [_drawn_path(out_dir, shard) for shard in range(dataset.num_shards)]
    temporaries = [temporary_name(path) for path in paths]
    try:
        with unchanged(dataset, stamp):
            summary = _write_drawn(dataset, temporaries)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    write_json(out_dir / "corpus.json", summary)
    return summary


def read_drawn(out_dir: Path, *, shard: int, counts: Counts) -> Iterator[Document]:
    """Yield one shard's documents as `draw_corpus` wrote them; add their counts to `counts`.

    Raises ValueError when the files are not what corpus.json says.
    """
    summary = read_json(out_dir / "corpus.json")
    is_known = {key: summary.get(key) for key in _DRAWN_FORMAT} == _DRAWN_FORMAT
    if not is_known or shard >= len(summary["shards"]):
        raise ValueError(
            f"{out_dir / 'corpus.json'} does not describe shard {shard} of a corpus in format "
            f"{_DRAWN_FORMAT}: remove the folder and draw the corpus again."
        )
    expected = Counts.from_json(summary["shards"][shard])
    path = _drawn_path(out_dir, shard)
    num_read = 0
    with naming(path), open_bytes(path) as file:
        for line in file:
            yield Document(**json.loads(line))
            num_read += 1
    if num_read != expected.used:
        raise ValueError(
            f"{path} holds {num_read} documents, but corpus.json says {expected.used}: remove the "
            "folder and draw the corpus again."
        )
    counts.merge(expected)


def _choose_sharding(dataset: Dataset, num_shards: int) -> Callable[[int], int]:
    """Return the function from a document's index to its shard."""
    if dataset.sharding == "interleaved":
        return lambda index: index % num_shards
    if dataset.sharding == "contiguous" and not dataset.streaming:
        sizes = [_count_rows(dataset, name) for name, _ in _list_splits(dataset)]
        size = sum(min(size, _limit(dataset)) for size in sizes)
        return lambda index: ((index + 1) * num_shards - 1) // size
    raise ValueError(
        f"dataset.sharding is {dataset.sharding!r}: expected 'interleaved', or 'contiguous' for a "
        "corpus that is no stream (its size must be known)."
    )


def _list_splits(dataset: Dataset) -> list[tuple[str, str | None]]:
    """Return (split, side that its documents are on; None where their text decides) in order."""
    if dataset.validation_split is None:
        return [(dataset.split, None)]
    return [(dataset.split, "train"), (dataset.validation_split, "val")]


def _limit(dataset: Dataset) -> int:
    return sys.maxsize if dataset.max_samples is None else dataset.max_samples


def _count_rows(dataset: Dataset, split: str) -> int:
    return sum(1 for _ in read_rows(dataset, split))


def _number_rows(
    dataset: Dataset, is_wanted: Callable[[int], bool]
) -> Iterator[tuple[int, str | None, Row]]:
    """Yield (index, side, row) of the wanted rows of the corpus, by rising index."""
    start = 0
    for name, side in _list_splits(dataset):
        if dataset.shuffle and not dataset.streaming:
            places = _shuffle_places(_count_rows(dataset, name), dataset)
            picked = [
                (place, row)
                for place, row in zip(places, read_rows(dataset, name), strict=True)
                if place < _limit(dataset) and is_wanted(start + place)
            ]
            yield from (
                (start + place, side, row) for place, row in sorted(picked, key=itemgetter(0))
            )
            start += min(len(places), _limit(dataset))
            continue
        place = -1
        for place, row in enumerate(read_rows(dataset, name)):
            if is_wanted(start + place):
                yield start + place, side, row
            if place + 1 == _limit(dataset):
                break
        start += place + 1


def _shuffle_places(size: int, dataset: Dataset) -> list[int]:
    """Return each row's place in the shuffled order: by a hash of its number, so one everywhere."""
    seed = dataset.seed
    keys = [xxhash.xxh3_64_intdigest(i.to_bytes(8, "little"), seed) for i in range(size)]
    places = [0] * size
    for place, number in enumerate(sorted(range(size), key=keys.__getitem__)):
        places[number] = place
    return places


def _scan(dataset: Dataset) -> tuple[Counts, list[str]]:
    """Read the corpus's first documents, until one is usable; return counts and columns found."""
    counts, columns = Counts(), list[str]()
    for name, side in _list_splits(dataset):
        seen = Counts()
        for place, row in enumerate(read_rows(dataset, name)):
            values = row()
            columns = columns or list(values)
            make_document(values, dataset, index=place, split=side, counts=seen)
            is_enough = seen.read >= _SCANNED_DOCUMENTS and (seen.used or is_hub(dataset))
            if is_enough or seen.read == _limit(dataset):
                break
        counts.merge(seen)
    return counts, columns


def _refuse_empty(dataset: Dataset, counts: Counts) -> None:
    counts.reconcile()
    if counts.used == 0:
        reasons = [f"{number} {reason}" for reason, number in sorted(counts.skipped.items())]
        files = "" if dataset.data_files is None else f" ({dataset.data_files})"
        raise ValueError(
            f"the corpus {dataset.name!r}{files} has no usable document: {counts.read} read, "
            f"{', '.join(reasons) or 'none'} skipped. Expected at least one with text: check the "
            "files, and dataset.text_column (or prompt_column and response_column)."
        )


def _drawn_path(out_dir: Path, shard: int) -> Path:
    return out_dir / f"documents_{shard:05d}.jsonl.gz"


def _write_drawn(dataset: Dataset, paths: list[Path]) -> dict[str, Any]:
    """Write each shard's documents under the given names, down to the disk; return the summary."""
    shard_of = _choose_sharding(dataset, len(paths))
    shards = [Counts() for _ in paths]
    content = hashlib.sha256()
    num_bytes = 0
    progress = _Progress()
    with ExitStack() as stack:
        files = [_open_for_writing(path, stack) for path in paths]
        for index, split, row in _number_rows(dataset, lambda _: True):
            shard = shard_of(index)
            document = make_document(row(), dataset, index=index, split=split, counts=shards[shard])
            if document is not None:
                line = _to_line(document)
                files[shard].write(line)
                content.update(line)
                num_bytes += len(document.text.encode()) + len((document.prompt or "").encode())
            progress.tick(index + 1, num_bytes)
    total = Counts()
    for counts in shards:
        total.merge(counts)
    _refuse_empty(dataset, total)
    return {
        **_DRAWN_FORMAT,
        "name": dataset.name,
        "packages": describe_demo() if dataset.name == "demo" else {},
        "bytes": num_bytes,
        "sha256": content.hexdigest(),
        "counts": total.to_json(),
        "shards": [counts.to_json() for counts in shards],
    }


def _to_line(document: Document) -> bytes:
    values = asdict(document)
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _open_for_writing(path: Path, stack: ExitStack) -> BinaryIO:
    """Open a gzip file whose bytes hold neither its name nor the time."""
    raw = stack.enter_context(path.open("wb"))
    stack.callback(_flush_to_disk, raw)
    # Level 1: 3x as fast as the default, for files a tenth larger.
    packed = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0)
    return cast(BinaryIO, stack.enter_context(packed))


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Progress:
    """A line on stderr every ten seconds of long work."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def tick(self, documents: int, num_bytes: int) -> None:
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            rate = documents / (now - self.start)
            size = f"{num_bytes / 1e6:,.1f} MB of text"
            line = f"{documents:,} documents read, {size}, {rate:,.0f}/s"
            print(line, file=sys.stderr, flush=True)
