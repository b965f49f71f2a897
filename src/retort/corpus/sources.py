"""One corpus as files of rows: the demo's text, local files in order, a dataset on the Hub, a stream.

The order of rows is that of the files as listed (globs sorted) and of the rows in each. A reading may
begin at any row of any file: so do a draw that goes on, and a shard that has files of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from retort.config.sections import Dataset
from retort.corpus.demo_text import read_demo_text
from retort.corpus.hub import open_stream, open_table
from retort.corpus.readers import LOADERS, Row, as_text, choose_columns, read_file, require
from retort.io.files import suggest_path


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
    return list(
        dict.fromkeys(
            path for pattern in patterns for path in expand(pattern, key="dataset.data_files")
        )
    )


@dataclass(frozen=True)
class Source:
    """The files of one split, in their stated order; `read(file, row)` yields a file's rows from one on.

    Rows before `row` are passed over unparsed. The demo's text, and a Hub dataset that is no stream, are one file.
    """

    num_files: int
    read: Callable[[int, int], Iterator[Row]]


def open_source(dataset: Dataset, split: str) -> Source:
    """Return one split of a corpus, ready to be read.

    Raises ValueError, here or while rows are read, naming file and line where there is one, for what cannot be read.
    """
    if is_hub(dataset) and dataset.streaming:
        return Source(*open_stream(dataset, split))
    if is_hub(dataset):
        table = open_table(dataset, split)
        return Source(1, lambda _, row: _read_table(table, row))
    columns = choose_columns(dataset)
    if dataset.name == "demo":
        require(columns, ["text"], where="the demo's text")
        return Source(1, lambda _, row: islice(_read_demo(dataset), row, None))
    files = list_files(dataset)
    return Source(
        len(files),
        lambda file, row: islice(read_file(files[file], dataset.name, columns), row, None),
    )


def _read_table(table: Any, row: int) -> Iterator[Row]:
    for place in range(row, len(table)):
        yield partial(table.__getitem__, place)


def _read_demo(dataset: Dataset) -> Iterator[Row]:
    for text in read_demo_text(seed=dataset.seed):
        yield partial(as_text, text)


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


def expand(pattern: str, *, key: str) -> list[Path]:
    """Return the files that a path or a glob names, sorted. Raises ValueError, with the config's key, for none."""
    if "://" in pattern:
        raise ValueError(
            f"{key} {pattern!r} is an address, but local files are read: download it "
            "first, or give the Hub id of the dataset as dataset.name."
        )
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"{key} {pattern!r} is a folder: name its files, as in '{path}/*.jsonl'.")
    if path.is_file():
        return [path]
    is_glob = any(character in pattern for character in "*?[")
    found = _match(path) if is_glob else []
    if not found:
        raise ValueError(
            f"{key} {pattern!r} {'matches no file' if is_glob else 'does not exist'} "
            f"(looked in {Path.cwd()}).{suggest_path(path)} Paths are relative to the folder in which snakemake is "
            "started."
        )
    return found


def _match(pattern: Path) -> list[Path]:
    """Return the files that match a glob, sorted; hidden ones do not."""
    root = Path(pattern.anchor)
    matches = root.glob(pattern.relative_to(root).as_posix())
    return sorted(path for path in matches if path.is_file() and not path.name.startswith("."))
