"""Check a corpus by its first documents, before anything expensive starts."""

from contextlib import nullcontext
from typing import Any

from retort.config.sections import Dataset
from retort.corpus.demo_text import describe_demo
from retort.corpus.documents import Counts, Document, make_document
from retort.corpus.hub import without_retries
from retort.corpus.readers import choose_columns, read_file
from retort.corpus.reading import list_splits, read_rows
from retort.corpus.sharding import (
    check_shard_function,
    is_custom,
    require_enough_files,
)
from retort.corpus.sources import (
    VALIDATION,
    is_demo,
    is_hub,
    list_files,
    list_validation_files,
    open_source,
)

_SCANNED_DOCUMENTS = 1000


def check_corpus(dataset: Dataset, *, sample: list[Document] | None = None) -> dict[str, Any]:
    """Check a corpus, or one source of a mixture, before anything expensive starts; return what was found, as JSON.

    Opens every file, checks its columns, and reads 1,000 documents, and on until one is usable; the usable ones are
    added to `sample`. Raises ValueError for anything missing, unreadable or empty, and for a user's sharding function
    that is not deterministic.
    """
    files = list_files(dataset) + list_validation_files(dataset)
    if not is_hub(dataset):
        for path in files:
            next(read_file(path, dataset.name, choose_columns(dataset)), None)
    streaming = dataset.streaming or is_hub(dataset)
    probe = dataset.model_copy(update={"shuffle": False, "streaming": streaming})
    try:
        with nullcontext() if dataset.streaming else without_retries():
            counts, columns = _scan(probe, sample)
    except ValueError as error:
        is_offline = isinstance(error.__cause__, ConnectionError | TimeoutError)
        if dataset.streaming or not is_offline:
            raise
        counts, columns = _scan(
            dataset, sample
        )  # offline, a copy may be in the cache of `datasets`
    refuse_empty(dataset, counts)
    if is_custom(dataset):
        check_shard_function(dataset)
    return {
        "name": dataset.name,
        "files": [str(path) for path in files],
        "bytes": sum(path.stat().st_size for path in files),
        "columns": columns,
        "scanned": vars(counts),
        "packages": describe_demo() if is_demo(dataset) else {},
    }


def _scan(dataset: Dataset, sample: list[Document] | None) -> tuple[Counts, list[str]]:
    """Read a corpus's first documents into `sample`; return their counts, and the columns of the first."""
    counts, columns = Counts(), list[str]()
    for (part,) in list_splits(dataset):
        seen = Counts()
        source = open_source(dataset, part.name)
        if part.name == dataset.split:
            require_enough_files(dataset, source.num_files)
        for index, row in enumerate(read_rows(source)):
            values = row()
            columns = columns or list(values)
            document = make_document(values, dataset, index=index, split=part.split, counts=seen)
            if document is not None and sample is not None:
                sample.append(document)
            is_enough = seen.read >= _SCANNED_DOCUMENTS and (seen.used or is_hub(dataset))
            if is_enough or seen.read == dataset.max_samples:
                break
        if part.name == VALIDATION:
            refuse_empty(dataset.model_copy(update={"data_files": dataset.validation_files}), seen)
        counts.merge(seen)
    return counts, columns


def refuse_empty(dataset: Dataset, counts: Counts) -> None:
    """Raise ValueError, with the reasons, when no document is usable."""
    counts.reconcile()
    if counts.used == 0:
        reasons = [f"{number} {reason}" for reason, number in sorted(counts.skipped.items())]
        first = [
            f"{reason}: {', '.join(map(str, rows))}" for reason, rows in sorted(counts.rows.items())
        ]
        numbers = f" (first documents {'; '.join(first)})" if first else ""
        files = "" if dataset.data_files is None else f" ({dataset.data_files})"
        raise ValueError(
            f"the corpus {dataset.title!r}{files} has no usable document: {counts.read} read, "
            f"{', '.join(reasons) or 'none'} skipped{numbers}. Expected at least one with text: check the "
            "files, and dataset.text_column (or prompt_column and response_column, or messages_column)."
        )
