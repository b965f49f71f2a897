"""How many sequences, tokens and positions there are to train on: counted, sampled, or said."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retort.artifacts.project import Tokens
from retort.config.sections import Dataset
from retort.corpus.checking import check_corpus
from retort.corpus.documents import Counts, Document
from retort.corpus.hub import count_split_rows
from retort.corpus.reading import CorpusReader, count_rows, list_corpus_files, list_splits
from retort.corpus.sources import is_demo, is_hub
from retort.estimate.records import TextEstimate
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.tokenize import TokenCounts, tokenize_documents

_TOKENIZED_BYTES = 16_000_000  # of local files: half a minute at most; larger ones are sampled
_QUICK_BYTES = 1_000_000
_COUNTED_STEPS = 200  # of files with so many times these bytes, only the first documents are read
_FIRST_DOCUMENTS = 5000  # of files that are larger
_SAMPLED_POSITIONS = 65_536  # of an index
_DEMO_CHARACTERS = 2.1  # of a token of the demo's tokenizer, which does not exist yet
_NORMAL_95 = 1.96
_GOLDEN = 0x9E3779B97F4A7C15  # of Fibonacci hashing (Knuth, TAOCP 3, section 6.4)


class UncountedError(ValueError):
    """Why the tokens of a text cannot be counted here; their number can be given."""


@dataclass(frozen=True)
class Text:
    """The text to train on. lengths: tokens of its sequences, or of a sample; table: the sample's sequences."""

    estimate: TextEstimate
    lengths: NDArray[np.int64]
    table: SequenceTable

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence."""
        return self.estimate.tokens / max(1, self.estimate.sequences)


def count_text(
    tokens: Tokens, tokenizer: Any, *, given: int | None, is_quick: bool = False
) -> Text:
    """Return the training text: from its index where it is tokenized already, else as `given`, else by reading it.

    tokenizer: None where there is none yet. given: a number of tokens. is_quick: sample more sparsely. Raises
    UncountedError where none of these is possible, and ValueError where the corpus cannot be read.
    """
    dataset = tokens.corpus.dataset
    index_path = tokens.folder / "index.json"
    if given is None and index_path.exists():
        return _read_index(TokenIndex.read(index_path), tokens)
    if given is not None:
        return _assume(given, tokens)
    responses = tokens.corpus.synthesis
    is_unwritten = responses is not None and not responses.record.exists()
    if is_unwritten or tokenizer is None:
        what = "has not been written yet" if is_unwritten else "has no tokenizer here"
        raise UncountedError(
            f"the text {dataset.title!r} {what}, so its tokens cannot be counted: give their number, such as "
            "--tokens 1e9."
        )
    return _read_text(tokens, tokenizer, _QUICK_BYTES if is_quick else _TOKENIZED_BYTES)


def _read_index(index: TokenIndex, tokens: Tokens) -> Text:
    train = index.record.train
    _, table = index.read_sample(num_positions=_SAMPLED_POSITIONS)
    found = TextEstimate(
        id=tokens.id,
        name=tokens.corpus.dataset.title,
        documents=train.documents,
        sequences=train.sequences,
        tokens=train.tokens,
        positions=train.positions,
        longest=train.longest,
        basis="counted, as tokenized",
        relative_error=0.0,
    )
    return Text(found, table.lengths, table)


def _assume(given: int, tokens: Tokens) -> Text:
    """Every token but the first of a sequence is predicted; all sequences are of dataset.max_length."""
    dataset = tokens.corpus.dataset
    sequences = math.ceil(given / dataset.max_length)
    found = TextEstimate(
        id=tokens.id,
        name=dataset.title,
        documents=None,
        sequences=sequences,
        tokens=given,
        positions=given - sequences,
        longest=dataset.max_length,
        basis="given, as full sequences without prompts",
        relative_error=None,
    )
    return Text(found, np.array([dataset.max_length]), build_table([]))


def _read_text(tokens: Tokens, tokenizer: Any, most_bytes: int) -> Text:
    """Read all documents of small local files, every n-th of larger ones, and the first ones of the Hub."""
    dataset = tokens.corpus.dataset
    num_bytes = sum(path.stat().st_size for path in list_corpus_files(dataset))
    is_local = not any(map(is_hub, dataset.sources))
    total: int | None = None
    if not is_local:
        documents, read, total = _read_first(dataset)
    elif num_bytes > _COUNTED_STEPS * most_bytes:
        documents, read, total = _read_beginning(dataset, num_bytes)
    else:
        step = math.ceil(num_bytes / most_bytes) or 1
        documents, read, total = _read_some(dataset, step)
        total = total if step > 1 else None
    factor = 1.0 if total is None else total / read
    if total is None or len(list_splits(dataset)) > 1:
        documents = [d for d in documents if d.split == "train"]
    else:  # held-out documents are like the others, so all of a sample say how long they are
        factor *= 1 - dataset.validation_fraction
    table, lengths = _tokenize(documents, tokenizer, dataset)
    if len(table) == 0:
        raise UncountedError(
            f"the text {dataset.title!r} has no document to train on among the {read:,} that were read."
        )
    error = 1.0
    if len(lengths) > 1:
        error = _NORMAL_95 * float(lengths.std(ddof=1) / lengths.mean()) / math.sqrt(len(lengths))
        error *= math.sqrt(max(0.0, 1 - read / (total or read)))  # of a finite number
    basis = (
        f"counted in all {read:,} documents"
        if total is None
        else f"from {read:,} of {total:,} documents"
        + ("" if is_local else ", the first ones: later ones may be longer or shorter")
    )
    if is_demo(dataset) and not hasattr(tokenizer, "encode"):
        basis, error = f"from characters: {_DEMO_CHARACTERS} a token", 0.1
    found = TextEstimate(
        id=tokens.id,
        name=dataset.title,
        documents=round(len(documents) * factor),
        sequences=round(len(table) * factor),
        tokens=round(len(table.ids) * factor),
        positions=round(table.num_positions * factor),
        longest=int(table.lengths.max()),
        basis=basis,
        relative_error=round(error, 4) if total is not None or "characters" in basis else 0.0,
    )
    return Text(found, table.lengths, table)


def _read_some(dataset: Dataset, step: int) -> tuple[list[Document], int, int]:
    """Return one in `step` documents of both splits, the number that was read, and that of all.

    Which ones is decided by a hash: the documents of a corpus may be in an order with a period.
    """
    counts = Counts()
    reader = CorpusReader(dataset, is_wanted=lambda n: (n * _GOLDEN % 2**64 >> 32) % step == 0)
    found = [part.make_document(row, index=n, counts=counts) for n, part, row in reader]
    return [d for d in found if d is not None], counts.read, reader.cursor.before


def _read_beginning(dataset: Dataset, num_bytes: int) -> tuple[list[Document], int, int]:
    """Return the first documents of files too large to count, how many were read, and how many there may be."""
    counts = Counts()
    rows = islice(CorpusReader(dataset), _FIRST_DOCUMENTS)
    found = [part.make_document(row, index=n, counts=counts) for n, part, row in rows]
    documents = [d for d in found if d is not None]
    size = sum(len(f"{d.prompt or ''}{d.text}".encode()) for d in documents)
    total = min(round(counts.read * num_bytes / max(1, size)), dataset.max_samples or sys.maxsize)
    return documents, counts.read, max(counts.read, total)


def _read_first(dataset: Dataset) -> tuple[list[Document], int, int]:
    """Return the first documents of a corpus on the Hub, how many were read, and how many there are."""
    documents: list[Document] = []
    read, rows = 0, 0
    for source in dataset.sources:
        found = check_corpus(source, sample=documents)
        read += found["scanned"]["read"]
        known = count_split_rows(source).get(source.split) if is_hub(source) else count_rows(source)
        rows += known or 0
    most = dataset.max_samples or sys.maxsize
    if not rows and dataset.max_samples is None:
        raise UncountedError(
            f"the Hub does not say how many documents {dataset.title!r} has: give the number of tokens, such as "
            "--tokens 1e9."
        )
    return documents, read, max(read, min(rows or most, most))


def _tokenize(
    documents: list[Document], tokenizer: Any, dataset: Dataset
) -> tuple[SequenceTable, NDArray[np.float64]]:
    """Return the sequences of documents, and each document's number of tokens."""
    if not hasattr(tokenizer, "encode"):  # the demo's, which is not trained yet
        sizes = [max(2, round(len(d.text) / _DEMO_CHARACTERS)) for d in documents]
        rows = [
            (np.zeros(n, int), np.arange(n) < n - 1, i, ("", ""))
            for i, size in enumerate(sizes)
            for n in _cut(size, dataset.max_length)
        ]
        return build_table(rows), np.array(sizes, float)
    table = tokenize_documents(documents, tokenizer, dataset, counts=TokenCounts())
    numbers = np.unique(table.documents, return_inverse=True)[1]
    return table, np.bincount(numbers, weights=table.lengths).astype(np.float64)


def _cut(size: int, length: int) -> Iterator[int]:
    for start in range(0, max(1, size - 1), length - 1):
        yield max(2, min(length, size - start))
