"""The documents of any source in one order: assigned to shards, cleaned, split into train and val, and counted.

A document's *index* is its number in the order of the source's files and rows (or of its seeded shuffle), counted
before anything is skipped. Its shard depends only on the index (on its file, if sharding is `files`); train or val,
only on its text and the seed, so exact copies are on the same side.

A stream is shuffled in *windows*: files are ordered by the seed, and each `streaming_buffer_size` consecutive documents
are permuted. No document is buffered at the end of a window, so another `CorpusReader` can continue from its `cursor`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from retort.config.dataset import name_source
from retort.config.load import identity
from retort.config.sections import Dataset
from retort.corpus.documents import Counts, Document, make_document
from retort.corpus.mixtures import WITHOUT_REPLACEMENT, interleave
from retort.corpus.readers import Row
from retort.corpus.sharding import (
    Assignment,
    build_shard_function,
    compute_quota,
    find_module,
    is_custom,
    require_enough_files,
    select_files,
)
from retort.corpus.sources import (
    VALIDATION,
    Source,
    is_demo,
    is_hub,
    list_files,
    list_validation_files,
    open_source,
    refuse_shared_files,
)
from retort.io.digests import digest_file_states

T = TypeVar("T")

# Keys of `dataset` that affect how documents become sequences; the others affect which documents there are.
TOKENIZING_KEYS = (
    "tokenizer",
    "append_eos",
    "control_tokens",
    "supervised_turns",
    "chat_date",
    "max_length",
    "long_documents",
    "streaming_chunk_size",
)


def list_corpus_files(dataset: Dataset) -> list[Path]:
    """Return the local files that a corpus is made from, in reading order; none for the demo and for the Hub.

    The file of a user's sharding function is the last. Raises ValueError when a path, glob or module does not exist,
    when a file is both trained on and held out, or when sharding is `files` and there are fewer files than shards.
    """
    trained: list[Path] = []
    held_out: list[Path] = []
    for number, section in enumerate(dataset.sources):
        try:
            trained += list_files(section)
            held_out += list_validation_files(section)
        except ValueError as error:
            raise ValueError(name_source(str(error), number) if dataset.mix else error) from None
    refuse_shared_files(trained, held_out)
    if trained and not is_hub(dataset):
        require_enough_files(dataset, len(trained))
    code = [find_module(dataset.sharding.partition(":")[0])] if is_custom(dataset) else []
    return trained + held_out + code


def corpus_keys(dataset: Dataset) -> dict[str, Any]:
    """Return {key: value} of the section's keys that affect the documents and differ from their defaults."""
    keys = {k: v for k, v in identity(dataset).items() if k not in TOKENIZING_KEYS}
    if not (dataset.shuffle and dataset.streaming):
        keys.pop("streaming_buffer_size", None)
    return keys


def needs_snapshot(dataset: Dataset) -> bool:
    """Return whether a snapshot of the corpus is written before it is tokenized."""
    return dataset.streaming or is_demo(dataset)


def count_readers(dataset: Dataset) -> int:
    """Return how many jobs write a snapshot in parallel: one per shard if sharding is `files`, else 1."""
    return dataset.num_shards if dataset.sharding == "files" else 1


def snapshot_record_path(out_dir: Path, dataset: Dataset, reader: int) -> Path:
    """Return the path of a reader's record, written when its part of the snapshot is complete."""
    return out_dir / ("corpus.json" if count_readers(dataset) == 1 else f"corpus_{reader:05d}.json")


def read_shard_documents(
    dataset: Dataset,
    *,
    shard: int,
    num_shards: int,
    counts: Counts,
    assignment: Assignment | None = None,
) -> Iterator[Document]:
    """Yield one shard's usable documents by rising index; add to `counts` and `assignment` what was read.

    `max_samples` limits the corpus to its first documents (and what is held out by name to as many). `shuffle`
    without streaming holds one shard's unparsed rows in memory. Raises ValueError for anything that cannot be read.
    """
    assert 0 <= shard < num_shards, (shard, num_shards)
    dataset = dataset.model_copy(update={"num_shards": num_shards})
    assignment = Assignment() if assignment is None else assignment
    if dataset.sharding == "files":
        reader = CorpusReader(dataset, shard=shard, assignment=assignment)
    else:
        reader = CorpusReader(dataset, is_wanted=_select_shard(dataset, shard, assignment))
    for index, part, row in reader:
        document = part.make_document(row, index=index, counts=counts)
        if document is not None:
            yield document


def _select_shard(dataset: Dataset, shard: int, assignment: Assignment) -> Callable[[int], bool]:
    """Return a function that says whether a document belongs to the shard, and adds it to `assignment`."""
    shard_of = build_shard_function(dataset, lambda: count_rows(dataset))

    def is_wanted(index: int) -> bool:
        is_mine = shard_of(index) == shard
        assignment.add(index.to_bytes(8, "little"), is_mine=is_mine)
        return is_mine

    return is_wanted


@dataclass
class Cursor:
    """Position of a reader in a corpus, between two documents. Its fields are stored on disk."""

    split: int = 0  # number of the dataset's split
    file: int = 0  # number of the split's file, in reading order
    row: int = 0  # in that file
    documents: int = 0  # read so far in this split
    before: int = 0  # documents of earlier splits


class CorpusReader:
    """Iterates over the rows of a corpus in its order, from `cursor` on, as (index, part of the corpus, row).

    With `shard`, only over the rows of that shard's files. `cursor` advances with each row; another reader can continue
    from it where `cursor.documents` is a multiple of `window`. Rows that are not wanted are counted, but not yielded.
    A mixture has no place in files to continue from: the rows before are passed over, unparsed.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        shard: int | None = None,
        cursor: Cursor | None = None,
        is_wanted: Callable[[int], bool] = lambda _: True,
        assignment: Assignment | None = None,
        is_mixed: bool = False,
    ) -> None:
        """`is_mixed`: it is a source of a mixture, whose rows are shuffled as those of a stream."""
        self.dataset = dataset
        self.shard = shard
        self.cursor = replace(cursor or Cursor())
        self.is_wanted = is_wanted
        self.assignment = assignment
        in_windows = dataset.shuffle and (dataset.streaming or is_mixed)
        self.is_shuffled_whole = dataset.shuffle and not in_windows
        self.window = dataset.streaming_buffer_size if in_windows else 1

    def __iter__(self) -> Iterator[tuple[int, "Part", Row]]:
        splits = list_splits(self.dataset)
        while self.cursor.split < len(splits):
            parts = splits[self.cursor.split]
            if len(parts) > 1:
                found = self._mix(parts)
            else:
                found = ((number, parts[0], row) for number, row in self.read_part(parts[0]))
            for number, part, row in found:
                yield self._index(number), part, row
            before = self.cursor.before + self.cursor.documents
            self.cursor = Cursor(split=self.cursor.split + 1, before=before)

    def _index(self, number: int) -> int:
        """Return the index in the corpus of a document, from its number in this split."""
        index = self.cursor.before + number
        return index if self.shard is None else index * self.dataset.num_shards + self.shard

    def _mix(self, parts: Sequence["Part"]) -> Iterator[tuple[int, "Part", Row]]:
        """Yield (number in this split, part, row) of the wanted rows; what is held out is read whole."""
        is_trained = self.cursor.split == 0
        strategy = self.dataset.stopping_strategy if is_trained else WITHOUT_REPLACEMENT
        sources = [partial(_read_source, part) for part in parts]
        mixed = interleave(sources, [part.weight for part in parts], strategy=strategy)
        first, quota = self.cursor.documents, compute_quota(self.dataset, None)
        for number, (source, row) in enumerate(islice(mixed, first, quota), start=first):
            self.cursor.documents = number + 1
            if self.is_wanted(self._index(number)):
                yield number, parts[source], row

    def read_part(self, part: "Part") -> Iterator[tuple[int, Row]]:
        """Yield (number in its split, row) of the wanted rows of a part."""
        source = open_source(part.dataset, part.name)
        if self.cursor.split == 0:
            require_enough_files(self.dataset, source.num_files)
        files = select_files(self.dataset, source.num_files, self.shard)
        self._count_files(source.num_files, files)
        quota = compute_quota(self.dataset, self.shard)
        if self.is_shuffled_whole:
            yield from self._pick_shuffled(source, files, quota)
            return
        if self.dataset.shuffle:
            files = shuffle_by_hash(files, seed=self.dataset.seed)
        rows = self._read_files(source, files)
        if self.dataset.shuffle:
            rows = self._shuffle(rows)
        first = self.cursor.documents
        for number, row in enumerate(islice(rows, quota - first), start=first):
            self.cursor.documents = number + 1
            if self.is_wanted(self._index(number)):
                yield number, row

    def _count_files(self, num_files: int, files: list[int]) -> None:
        """Add a split's files to `assignment`, by commit and number, before the first document is read."""
        if self.assignment is None or self.cursor.documents:
            return
        mine = set(files)
        for file in range(num_files):
            name = f"{self.dataset.revision} {self.cursor.split} {file}"
            self.assignment.add(name.encode(), is_mine=file in mine)

    def _read_files(self, source: Source, files: list[int]) -> Iterator[Row]:
        for number in range(self.cursor.file, len(files)):
            for row in source.read(files[number], self.cursor.row):
                self.cursor.row += 1
                yield row
            self.cursor.file, self.cursor.row = number + 1, 0

    def _shuffle(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Permute the rows of each window by hashes of their numbers."""
        first = self.cursor.documents
        while window := list(islice(rows, self.window)):
            yield from shuffle_by_hash(window, seed=self.dataset.seed, first=first)
            first += len(window)

    def _pick_shuffled(
        self, source: Source, files: list[int], quota: int
    ) -> Iterator[tuple[int, Row]]:
        """Yield (number, row) of the wanted rows, shuffled over the whole split; they are held in memory, unparsed."""
        done = self.cursor.documents
        size = sum(1 for file in files for _ in source.read(file, 0))
        numbers = [0] * size  # after the shuffle, by number before it
        for number, unshuffled in enumerate(shuffle_by_hash(range(size), seed=self.dataset.seed)):
            numbers[unshuffled] = number
        rows = chain.from_iterable(source.read(file, 0) for file in files)
        picked = [
            (number, row)
            for number, row in zip(numbers, rows, strict=False)  # see refuse_changed_files
            if done <= number < quota and self.is_wanted(self._index(number))
        ]
        for number, row in sorted(picked, key=itemgetter(0)):
            self.cursor.documents = number + 1
            yield number, row
        self.cursor.documents = min(size, quota)


def _read_source(part: "Part") -> Iterator[Row]:
    """Yield the rows of a part of a mixture from the first on, shuffled in windows if at all."""
    for _, row in CorpusReader(part.dataset, is_mixed=True).read_part(part):
        yield row


def shuffle_by_hash(items: Sequence[T], *, seed: int, first: int = 0) -> list[T]:
    """Return the items, numbered first, first + 1, ..., sorted by a hash of number and seed: equal on all machines."""
    keys = [
        xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"), seed)
        for number in range(first, first + len(items))
    ]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


class Part(NamedTuple):
    """One split of one source: the source's section, the split's name there, and what its documents are.

    split: "train", "val", or None: then the content decides. label, weight: of the source in a mixture.
    """

    dataset: Dataset
    name: str
    split: str | None
    label: str | None = None
    weight: float = 1.0

    def make_document(self, row: Row, *, index: int, counts: Counts) -> Document | None:
        """Return the document of a row of this part (see `documents.make_document`)."""
        return make_document(
            row(), self.dataset, index=index, split=self.split, counts=counts, source=self.label
        )


def list_splits(dataset: Dataset) -> list[list[Part]]:
    """Return what to read, in order: the parts to train on, then those that are held out by name, if there are any.

    Each is one part, or of a mixture one for each source.
    """
    trained, held_out = [], []
    weights = [source.weight for source in dataset.mix] or [1.0]
    for section, label, weight in zip(dataset.sources, dataset.labels, weights, strict=True):
        name = VALIDATION if section.validation_files else section.validation_split
        split = None if name is None else "train"
        trained.append(Part(section, section.split, split, label, weight))
        if name is not None:
            held_out.append(Part(section, name, "val", label, weight))
    return [trained, held_out] if held_out else [trained]


def count_rows(dataset: Dataset) -> int:
    """Return the number of documents of a corpus, by reading its rows unparsed."""
    if dataset.mix:
        return sum(1 for _ in CorpusReader(dataset))
    limit = dataset.max_samples or sys.maxsize
    sizes = [
        sum(1 for _ in islice(read_rows(open_source(dataset, part.name)), limit))
        for (part,) in list_splits(dataset)
    ]
    return sum(sizes)


def read_rows(source: Source) -> Iterator[Row]:
    """Yield all rows of a source in order."""
    for file in range(source.num_files):
        yield from source.read(file, 0)


@contextmanager
def refuse_changed_files(dataset: Dataset, stamp: str | None) -> Iterator[None]:
    """Raise ValueError when the local files differ from `stamp` (see `digest_file_states`) before or after the block.

    Ids are computed from the files when the command starts; text edited later would be stored under the old id.
    None, for a script run without the workflow: nothing is compared.
    """

    files = f"dataset.data_files {dataset.data_files or dataset.name!r}"
    if dataset.validation_files:
        files += f" and validation_files {dataset.validation_files!r}"

    def compare() -> None:
        if stamp not in (None, digest_file_states(list_corpus_files(dataset))):
            raise ValueError(
                f"the files of {'dataset.mix' if dataset.mix else files} changed while "
                "Retort read them; nothing was saved. Rerun the same command to use the files as they are now."
            )

    compare()
    yield
    compare()
