"""Sources of a corpus, as files of rows: the demo's text, local files, a dataset on the Hub, a stream.

Rows are ordered by file, as listed (globs sorted), then by row. Reading may start at any row of any file: a resumed
snapshot does, and with `sharding: files` each shard.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from retort.config.sections import Dataset
from retort.corpus.demo_text import read_demo_text
from retort.corpus.hub import open_stream, open_table
from retort.corpus.readers import LOADERS, Row, choose_columns, read_file, require_columns, text_row
from retort.io.files import suggest_path

# Below a results or cache folder, which may lie among the files of a corpus.
_OUTPUT = re.compile(
    r"(^|/)((corpora|tokens|logits|validation|teachers|syntheses|reports|checks)/(api-|demo-)?|runs/[^/]+/)"
    r"[0-9a-f]{12}[/.]"
)
# As `datasets` finds splits by the names of files and folders.
_FOR_EVALUATION = re.compile(
    r"(?<![a-z0-9])(validation|valid|val|dev|testing|test|evaluation|eval)(?![a-z0-9])"
)
VALIDATION = "validation"  # the split of local files that are held out


def is_hub(dataset: Dataset) -> bool:
    """Return whether `datasets` reads it: a Hub id, or a folder with the layout of a Hub dataset."""
    return dataset.name != "demo" and dataset.name not in LOADERS


def is_demo(dataset: Dataset) -> bool:
    """Return whether it is the built-in text."""
    return dataset.sources[0].name == "demo"


def list_files(dataset: Dataset) -> list[Path]:
    """Return a source's local files in reading order; none for the demo and for a Hub id.

    Raises ValueError when nothing is found, and for keys that apply to the Hub only.
    """
    if is_hub(dataset):
        return sorted(path for path in Path(dataset.name).rglob("*") if _is_file(path))
    _refuse_hub_keys(dataset)
    if dataset.name == "demo":
        return []
    if not dataset.data_files:
        raise ValueError(
            f"dataset.name is {dataset.name!r}, which reads local files, but dataset.data_files is "
            "not set: give paths or globs, for example data_files: data/*.jsonl."
        )
    return _expand_all(dataset.data_files, key="dataset.data_files")


def list_validation_files(dataset: Dataset) -> list[Path]:
    """Return the local files that are held out, in reading order; none without `validation_files`.

    Raises ValueError when nothing is found.
    """
    if not dataset.validation_files:
        return []
    return _expand_all(dataset.validation_files, key="dataset.validation_files")


def refuse_shared_files(trained: Iterable[Path], held_out: Iterable[Path]) -> None:
    """Raise ValueError for a file that is both trained on and held out."""
    found = {path.resolve() for path in trained}
    for path in held_out:
        if path.resolve() in found:
            raise ValueError(
                f"dataset.validation_files has '{path}', which is in dataset.data_files too: students would be "
                "evaluated on their training data. Take it out of one of the two, for instance by a narrower glob."
            )


def find_named_for_evaluation(files: Sequence[Path]) -> list[Path]:
    """Return those of several files that are named as a validation or test split; none if all are."""
    if len(files) < 2:
        return []
    root = os.path.commonpath(files)
    found = [path for path in files if _FOR_EVALUATION.search(os.path.relpath(path, root).lower())]
    return found if len(found) < len(files) else []


def _expand_all(patterns: str | tuple[str, ...], *, key: str) -> list[Path]:
    """Return the files that match one path or glob, or several, each file once."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    return list(dict.fromkeys(p for pattern in patterns for p in expand_pattern(pattern, key=key)))


@dataclass(frozen=True)
class Source:
    """The files of one split, in order; `read(file, row)` yields the rows of a file from number `row` on.

    Earlier rows are skipped unparsed. The demo's text, and a Hub dataset that is not streamed, count as one file.
    """

    num_files: int
    read: Callable[[int, int], Iterator[Row]]


def open_source(dataset: Dataset, split: str) -> Source:
    """Return the source of one split; VALIDATION is that of the local files that are held out.

    Raises ValueError, here or while rows are read, with file and line, for anything that cannot be read.
    """
    if is_hub(dataset) and dataset.streaming:
        return Source(*open_stream(dataset, split))
    if is_hub(dataset):
        table = open_table(dataset, split)
        return Source(1, lambda _, row: _read_table(table, row))
    columns = choose_columns(dataset)
    if dataset.name == "demo":
        require_columns(columns, ["text"], where="the demo's text")
        return Source(1, lambda _, row: islice(_read_demo(dataset), row, None))
    files = list_validation_files(dataset) if split == VALIDATION else list_files(dataset)
    return Source(
        len(files),
        lambda file, row: islice(read_file(files[file], dataset.name, columns), row, None),
    )


def _read_table(table: Any, first: int) -> Iterator[Row]:
    for row in range(first, len(table)):
        yield partial(table.__getitem__, row)


def _read_demo(dataset: Dataset) -> Iterator[Row]:
    for text in read_demo_text(seed=dataset.seed):
        yield partial(text_row, text)


def _refuse_hub_keys(dataset: Dataset) -> None:
    """Raise ValueError for a key that applies to the Hub only, rather than ignore it."""
    advice = {
        "config_name": "Remove it, or name the dataset on the Hub as dataset.name",
        "revision": "Remove it, or name the dataset on the Hub as dataset.name",
        "split": "Remove it (it is 'train'), and name the files to train on as dataset.data_files",
        "validation_split": "Remove it; dataset.validation_files names files to hold out, and without them "
        "dataset.validation_fraction sets how much is held out",
    }
    for key, next_step in advice.items():
        found = getattr(dataset, key)
        if found not in (None, "train"):
            raise ValueError(
                f"dataset.{key} is {found!r}, but applies only to a dataset on the Hub, and "
                f"dataset.name is {dataset.name!r}. {next_step}."
            )


def expand_pattern(pattern: str, *, key: str) -> list[Path]:
    """Return the files that match a path or glob, sorted. Raises ValueError, naming the config's `key`, for none."""
    if "://" in pattern:
        raise ValueError(
            f"{key} {pattern!r} is an address, but must be a local file: download it "
            "first, or give the Hub id of the dataset as dataset.name."
        )
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"{key} {pattern!r} is a folder: give its files, as in '{path}/*.jsonl'.")
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
    """Return the files that match a glob, sorted, without hidden ones and without what Retort made.

    Only below the folder that the pattern names are files left out: `results/syntheses/<id>/*.jsonl` is chosen.
    """
    parts = pattern.parts
    named = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    root = Path(*parts[:named])
    found = sorted(path.relative_to(root) for path in root.glob(str(Path(*parts[named:]))))
    return [
        root / path
        for path in found
        if not any(part.startswith(".") for part in path.parts)
        and not _is_output(root, path)
        and _is_file(root / path)
    ]


def _is_output(root: Path, path: Path) -> bool:
    """Return whether Retort made the file, at a path relative to `root`; it also links to its newest report."""
    link = str((root / path).readlink()) if (root / path).is_symlink() else ""
    return bool(_OUTPUT.search(str(path))) or link.startswith("reports/")


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; raises ValueError for a link to nothing, which a glob would pass over."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path} is a link to {str(path.readlink())!r}, which does not exist: restore that, or remove the link."
        )
    return path.is_file()
