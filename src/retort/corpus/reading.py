"""Documents from any source, in one order, dealt to shards, cleaned, split into train and held-out, and counted.

A document's *index* is its place in the corpus: the order of the source's files and rows (or of its
seeded shuffle), counted before anything is skipped. Which shard a document goes to depends on its
index alone (with `sharding: files`, on its file); which side of the held-out split, on its text and the
seed alone, so exact copies lie on one side.

A stream is shuffled in *windows*: the files are put in an order of the seed, and each run of
`streaming_buffer_size` documents is permuted by itself. At the end of a window nothing waits in memory,
so a reading may stop there, and another go on from `Reading.place`, with the same documents in the same order.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from retort.config.load import identity
from retort.config.sections import Dataset
from retort.corpus.demo_text import describe_demo
from retort.corpus.documents import Counts, Document, make_document
from retort.corpus.hub import impatiently
from retort.corpus.readers import Row, choose_columns, read_file
from retort.corpus.sharding import (
    Dealt,
    check_function,
    choose_files,
    choose_quota,
    choose_sharding,
    find_module,
    is_custom,
    require_files,
)
from retort.corpus.sources import Source, is_hub, list_files, open_source
from retort.io.digests import digest_file_states

T = TypeVar("T")

_SCANNED_DOCUMENTS = 1000
# Keys of `dataset` that say how documents become sequences; the others say which documents there are.
TOKENIZING_KEYS = (
    "tokenizer",
    "append_eos",
    "max_length",
    "long_documents",
    "streaming_chunk_size",
)


def corpus_files(dataset: Dataset) -> list[Path]:
    """Return the local files that a corpus is made of, in reading order; none for the demo and for the Hub.

    The file of a sharding function of one's own comes last. Raises ValueError, naming path, glob or module, when
    there are none, or fewer than shards where files are dealt.
    """
    files = list_files(dataset)
    if files and not is_hub(dataset):
        require_files(dataset, len(files))
    code = [find_module(dataset.sharding.partition(":")[0])] if is_custom(dataset) else []
    return files + code


def corpus_keys(dataset: Dataset) -> dict[str, Any]:
    """Return the keys of the section that say which documents there are, where they differ from their default."""
    return {k: v for k, v in identity(dataset).items() if k not in TOKENIZING_KEYS}


def is_drawn(dataset: Dataset) -> bool:
    """Say whether the corpus is drawn into a folder before it is tokenized."""
    return dataset.streaming or dataset.name == "demo"


def count_readers(dataset: Dataset) -> int:
    """Return how many jobs draw a corpus side by side: one per shard where shards have files of their own, else 1."""
    return dataset.num_shards if dataset.sharding == "files" else 1


def record_path(out_dir: Path, dataset: Dataset, reader: int) -> Path:
    """Return the record that says that a reader has drawn all that is its own: corpus.json, where there is one."""
    return out_dir / ("corpus.json" if count_readers(dataset) == 1 else f"corpus_{reader:05d}.json")


def read_documents(
    dataset: Dataset,
    *,
    shard: int,
    num_shards: int,
    counts: Counts,
    dealt: Dealt | None = None,
) -> Iterator[Document]:
    """Yield one shard's usable documents by rising index; add what was read to `counts`, what was dealt to `dealt`.

    `max_samples` takes the first so many documents of the corpus (and of `validation_split`, where
    set). A `shuffle` of a source that is no stream holds one shard's raw rows in memory. Raises
    ValueError for what cannot be read.
    """
    assert 0 <= shard < num_shards, (shard, num_shards)
    dataset = replace(dataset, num_shards=num_shards)
    dealt = Dealt() if dealt is None else dealt
    if dataset.sharding == "files":
        reading = Reading(dataset, shard=shard, dealt=dealt)
    else:
        reading = Reading(dataset, is_wanted=_note_in(dealt, dataset, shard))
    for index, side, row in reading:
        document = make_document(row(), dataset, index=index, split=side, counts=counts)
        if document is not None:
            yield document


def _note_in(dealt: Dealt, dataset: Dataset, shard: int) -> Callable[[int], bool]:
    """Return the function that says whether a document is the shard's, and notes every one that it is asked for."""
    shard_of = choose_sharding(dataset, lambda: count_documents(dataset))

    def is_wanted(index: int) -> bool:
        is_mine = shard_of(index) == shard
        dealt.see(index.to_bytes(8, "little"), is_mine=is_mine)
        return is_mine

    return is_wanted


@dataclass
class Place:
    """Where a reading stands: between two documents."""

    split: int = 0  # which of the dataset's splits
    file: int = 0  # which of the split's files, in the order in which they are read
    row: int = 0  # of that file
    documents: int = 0  # of this split, read so far
    before: int = 0  # documents of earlier splits


class Reading:
    """The rows of a corpus in its order, from `place` on, as (index, side of the held-out split or None, row).

    With `shard`, of that shard's files alone. `place` moves along; a reading may be taken up again where
    `place.documents` is a multiple of `window`. Not wanted rows are counted and not yielded.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        shard: int | None = None,
        place: Place | None = None,
        is_wanted: Callable[[int], bool] = lambda _: True,
        dealt: Dealt | None = None,
    ) -> None:
        self.dataset = dataset
        self.shard = shard
        self.place = replace(place or Place())
        self.is_wanted = is_wanted
        self.dealt = dealt
        self.window = dataset.streaming_buffer_size if dataset.shuffle and dataset.streaming else 1

    def __iter__(self) -> Iterator[tuple[int, str | None, Row]]:
        splits = list_splits(self.dataset)
        while self.place.split < len(splits):
            name, side = splits[self.place.split]
            for place, row in self._read_split(name):
                yield self._number(place), side, row
            before = self.place.before + self.place.documents
            self.place = Place(split=self.place.split + 1, before=before)

    def _number(self, place: int) -> int:
        """Return the index of a document of this split."""
        index = self.place.before + place
        return index if self.shard is None else index * self.dataset.num_shards + self.shard

    def _read_split(self, name: str) -> Iterator[tuple[int, Row]]:
        source = open_source(self.dataset, name)
        if self.place.split == 0:
            require_files(self.dataset, source.num_files)
        files = choose_files(self.dataset, source.num_files, self.shard)
        self._note_files(source.num_files, files)
        quota = choose_quota(self.dataset, self.shard)
        if self.dataset.shuffle and not self.dataset.streaming:
            yield from self._pick_shuffled(source, files, quota)
            return
        if self.dataset.shuffle:
            files = shuffle_numbers(0, len(files), self.dataset.seed, of=files)
        rows = self._read_files(source, files)
        if self.dataset.shuffle:
            rows = self._shuffle(rows)
        first = self.place.documents
        for place, row in enumerate(islice(rows, quota - first), start=first):
            self.place.documents = place + 1
            if self.is_wanted(self._number(place)):
                yield place, row

    def _note_files(self, num_files: int, files: list[int]) -> None:
        """Note, at a split's beginning, which of its files are read here. Another commit has other files."""
        if self.dealt is None or self.place.documents:
            return
        mine = set(files)
        for file in range(num_files):
            name = f"{self.dataset.revision} {self.place.split} {file}"
            self.dealt.see(name.encode(), is_mine=file in mine)

    def _read_files(self, source: Source, files: list[int]) -> Iterator[Row]:
        for number in range(self.place.file, len(files)):
            for row in source.read(files[number], self.place.row):
                self.place.row += 1
                yield row
            self.place.file, self.place.row = number + 1, 0

    def _shuffle(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Permute each window by the hashes of its rows' numbers."""
        first = self.place.documents
        while window := list(islice(rows, self.window)):
            yield from shuffle_numbers(first, len(window), self.dataset.seed, of=window)
            first += len(window)

    def _pick_shuffled(
        self, source: Source, files: list[int], quota: int
    ) -> Iterator[tuple[int, Row]]:
        """The wanted rows in the order of a shuffle of the whole split, which holds them in memory, unparsed."""
        done = self.place.documents
        size = sum(1 for file in files for _ in source.read(file, 0))
        places = [0] * size
        for place, number in enumerate(shuffle_numbers(0, size, self.dataset.seed, of=range(size))):
            places[number] = place
        rows = chain.from_iterable(source.read(file, 0) for file in files)
        picked = [
            (places[number], row)
            for number, row in enumerate(rows)
            if done <= places[number] < quota and self.is_wanted(self._number(places[number]))
        ]
        for place, row in sorted(picked, key=itemgetter(0)):
            self.place.documents = place + 1
            yield place, row
        self.place.documents = min(size, quota)


def shuffle_numbers(first: int, size: int, seed: int, *, of: Sequence[T]) -> list[T]:
    """Return the items numbered first, first + 1, ... in the order of a hash of their numbers: one everywhere."""
    keys = [
        xxhash.xxh3_64_intdigest(i.to_bytes(8, "little"), seed) for i in range(first, first + size)
    ]
    return [of[i] for i in sorted(range(size), key=keys.__getitem__)]


def list_splits(dataset: Dataset) -> list[tuple[str, str | None]]:
    """Return (split, side that its documents are on; None where their text decides) in order."""
    if dataset.validation_split is None:
        return [(dataset.split, None)]
    return [(dataset.split, "train"), (dataset.validation_split, "val")]


def count_documents(dataset: Dataset) -> int:
    """Return the number of documents of a corpus that can be read twice, by reading its rows unparsed."""
    limit = dataset.max_samples or sys.maxsize
    sizes = [
        sum(1 for _ in islice(read_rows(open_source(dataset, name)), limit))
        for name, _ in list_splits(dataset)
    ]
    return sum(sizes)


def read_rows(source: Source) -> Iterator[Row]:
    """Yield all rows of a split in the source's order."""
    for file in range(source.num_files):
        yield from source.read(file, 0)


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
        with nullcontext() if dataset.streaming else impatiently():
            counts, columns = _scan(probe)
    except ValueError as error:
        is_offline = isinstance(error.__cause__, ConnectionError | TimeoutError)
        if dataset.streaming or not is_offline:
            raise
        counts, columns = _scan(dataset)  # a copy may lie in the cache of a machine without network
    refuse_empty(dataset, counts)
    if is_custom(dataset):
        check_function(dataset)
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
        if stamp not in (None, digest_file_states(corpus_files(dataset))):
            raise ValueError(
                f"the files of dataset.data_files {dataset.data_files or dataset.name!r} changed while Retort read "
                "them; nothing was kept of what was read. Run the same command again: it goes on with the files as "
                "they are now."
            )

    compare()
    yield
    compare()


def _scan(dataset: Dataset) -> tuple[Counts, list[str]]:
    """Read the corpus's first documents, until one is usable; return counts and columns found."""
    counts, columns = Counts(), list[str]()
    for name, side in list_splits(dataset):
        seen = Counts()
        source = open_source(dataset, name)
        if name == dataset.split:
            require_files(dataset, source.num_files)
        for place, row in enumerate(read_rows(source)):
            values = row()
            columns = columns or list(values)
            make_document(values, dataset, index=place, split=side, counts=seen)
            is_enough = seen.read >= _SCANNED_DOCUMENTS and (seen.used or is_hub(dataset))
            if is_enough or seen.read == dataset.max_samples:
                break
        counts.merge(seen)
    return counts, columns


def refuse_empty(dataset: Dataset, counts: Counts) -> None:
    """Raise ValueError, with what was skipped and why, when no document is usable."""
    counts.reconcile()
    if counts.used == 0:
        reasons = [f"{number} {reason}" for reason, number in sorted(counts.skipped.items())]
        files = "" if dataset.data_files is None else f" ({dataset.data_files})"
        raise ValueError(
            f"the corpus {dataset.name!r}{files} has no usable document: {counts.read} read, "
            f"{', '.join(reasons) or 'none'} skipped. Expected at least one with text: check the "
            "files, and dataset.text_column (or prompt_column and response_column)."
        )
