"""Rows of one corpus: the demo's text, local files in order, a dataset on the Hub, a stream.

The order of rows is that of the files as listed (globs sorted) and of the rows in each; a stream's
may be shuffled through a buffer. `datasets` is imported only where a Hub dataset is opened.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from retort.config import Dataset
from retort.demo_text import read_demo_text
from retort.provenance import suggest_path
from retort.readers import LOADERS, Columns, Row, as_text, read_file, require


def choose_columns(dataset: Dataset) -> Columns:
    """Return the columns that a dataset section asks for."""
    if dataset.prompt_column is not None and dataset.response_column is not None:
        required = [dataset.prompt_column, dataset.response_column]
    else:
        required = [dataset.text_column]
    labels = {"category": dataset.category_column, "language": dataset.language_column}
    # A label column that was named on purpose must be there; the default's is used when present.
    required += [column for default, column in labels.items() if column not in (None, default)]
    optional = [column for default, column in labels.items() if column == default]
    return Columns(tuple(required), tuple(optional))


def is_hub(dataset: Dataset) -> bool:
    """Say whether `datasets` reads it: a Hub id, or a folder laid out as one."""
    return dataset.name != "demo" and dataset.name not in LOADERS


def list_files(dataset: Dataset) -> list[Path]:
    """Return a local source's files in reading order; none for the demo and for the Hub.

    Raises ValueError when nothing is found, and for keys that such a source cannot follow.
    """
    if is_hub(dataset):
        return sorted(path for path in Path(dataset.name).rglob("*") if path.is_file())
    _refuse_hub_keys(dataset)
    if dataset.name == "demo":
        return []
    files = dataset.data_files
    patterns = [files] if isinstance(files, str) else list(files or [])
    if not patterns:
        raise ValueError(
            f"dataset.name is {dataset.name!r}, which reads local files, but dataset.data_files is "
            "not set: give paths or globs, for example data_files: data/*.jsonl."
        )
    return list(dict.fromkeys(path for pattern in patterns for path in _expand(pattern)))


def read_rows(dataset: Dataset, split: str) -> Iterator[Row]:
    """Yield the rows of one split in the source's order; a stream's shuffled where asked for.

    Raises ValueError, naming file and line where there is one, for what cannot be read.
    """
    columns = choose_columns(dataset)
    if is_hub(dataset):
        yield from _read_hub(dataset, split)
    elif dataset.name == "demo":
        require(columns, ["text"], where="the demo's text")
        for text in read_demo_text(seed=dataset.seed):
            yield partial(as_text, text)
    else:
        files = list_files(dataset)
        is_shuffled = dataset.streaming and dataset.shuffle
        if is_shuffled:
            files.sort(key=lambda path: _hash(path, dataset.seed))
        rows = (row for path in files for row in read_file(path, dataset.name, columns))
        yield from _shuffle_buffer(rows, dataset) if is_shuffled else rows


def _hash(path: Path, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(path.as_posix().encode(), seed)


def _refuse_hub_keys(dataset: Dataset) -> None:
    """Raise ValueError for a key that only means something on the Hub, rather than ignore it."""
    advice = {
        "config_name": "Remove it, or name the dataset on the Hub as dataset.name",
        "revision": "Remove it, or name the dataset on the Hub as dataset.name",
        "split": "Remove it (it is 'train'), and name the files to train on as dataset.data_files",
        "validation_split": "Remove it; dataset.validation_fraction holds documents out",
    }
    for key, next_step in advice.items():
        found = getattr(dataset, key)
        if found not in (None, "train"):
            raise ValueError(
                f"dataset.{key} is {found!r}, but only a dataset on the Hub has one, and "
                f"dataset.name is {dataset.name!r}. {next_step}."
            )


def _expand(pattern: str) -> list[Path]:
    if "://" in pattern:
        raise ValueError(
            f"dataset.data_files {pattern!r} is an address, but local files are read: download it "
            "first, or give the Hub id of the dataset as dataset.name."
        )
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(
            f"dataset.data_files {pattern!r} is a folder: name its files, as in '{path}/*.jsonl'."
        )
    if path.is_file():
        return [path]
    is_glob = any(character in pattern for character in "*?[")
    found = _match(path) if is_glob else []
    if not found:
        raise ValueError(
            f"dataset.data_files {pattern!r} {'matches no file' if is_glob else 'does not exist'} "
            f"(looked in {Path.cwd()}).{suggest_path(path)} Paths are relative to the folder in which snakemake is "
            "started."
        )
    return found


def _match(pattern: Path) -> list[Path]:
    """Return the files that match a glob, sorted; hidden ones do not."""
    root = Path(pattern.anchor)
    matches = root.glob(pattern.relative_to(root).as_posix())
    return sorted(path for path in matches if path.is_file() and not path.name.startswith("."))


def _shuffle_buffer(rows: Iterable[Row], dataset: Dataset) -> Iterator[Row]:
    """Yield rows drawn at random from a buffer of `streaming_buffer_size` that the next refill."""
    draw = random.Random(dataset.seed)
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < dataset.streaming_buffer_size:
            buffer.append(row)
            continue
        place = draw.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = row
    draw.shuffle(buffer)
    yield from buffer


def _read_hub(dataset: Dataset, split: str) -> Iterator[Row]:
    columns = choose_columns(dataset)
    where = f"{dataset.name}, split {split!r}"
    table = open_hub(dataset, split)
    if table.column_names is not None:
        require(columns, table.column_names, where=where)
        table = table.select_columns([c for c in columns.both if c in table.column_names])
    if not dataset.streaming:
        for place in range(len(table)):
            yield partial(table.__getitem__, place)
        return
    if dataset.shuffle:
        table = table.shuffle(seed=dataset.seed, buffer_size=dataset.streaming_buffer_size)
    for number, values in enumerate(_explaining(table, dataset)):
        if number == 0:
            require(columns, values, where=where)
        yield partial(dict, values)


def _explaining(stream: Iterable[Any], dataset: Dataset) -> Iterator[Mapping[str, Any]]:
    """Yield a stream's rows; what breaks it, at whatever row, becomes a one-sentence ValueError."""
    iterator = iter(stream)
    while True:
        try:
            values = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # whatever the HTTP client or a file format's reader raises
            raise explain_hub_error(dataset, error) from error
        yield values


def open_hub(dataset: Dataset, split: str) -> Any:
    """Return the `datasets` object of one split; raises a one-sentence ValueError if it cannot."""
    import datasets

    files = dataset.data_files
    try:
        return datasets.load_dataset(
            dataset.name,
            dataset.config_name,
            data_files=files if files is None or isinstance(files, str) else list(files),
            split=split,
            revision=dataset.revision,
            streaming=dataset.streaming,
            num_proc=None if dataset.streaming else dataset.num_proc,
        )
    except Exception as error:  # whatever a cache, a reader or the HTTP client raises
        raise explain_hub_error(dataset, error) from error


def explain_hub_error(dataset: Dataset, error: BaseException) -> ValueError:
    """Return a sentence that says if it is the network, the login or the name, and what to do."""
    said = str(error).strip().partition("\n")[0]
    if re.search(r"\b(gated|authenticated|401|403)\b", said):
        advice = (
            "is gated or private: accept its terms at "
            f"https://huggingface.co/datasets/{dataset.name}, then type `hf auth login` (or set "
            "HF_TOKEN)"
        )
    elif isinstance(error, ConnectionError | TimeoutError) or "Couldn't reach" in said:
        advice = (
            "could not be reached: check the network (and HF_HUB_OFFLINE, HTTPS_PROXY), or "
            "download the dataset where there is one (`hf download --repo-type dataset "
            f"{dataset.name}`)"
        )
    elif isinstance(error, FileNotFoundError):
        advice = (
            "was not found on the Hub nor as a folder here: check its spelling; local files are "
            f"read by {', '.join(LOADERS)} with dataset.data_files; a private dataset needs `hf "
            "auth login`"
        )
    else:
        advice = "could not be opened: check dataset.config_name, split, revision and data_files"
    found = f"{type(error).__name__}: {said}"
    return ValueError(f"dataset.name {dataset.name!r} {advice}. Found: {found}")
