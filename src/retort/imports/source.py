"""The parquet files of a published dataset of logits: found here or on the Hub, and read a few rows at a time."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download
from numpy.typing import NDArray

from retort.cli import first_line
from retort.imports.distillkit import CONFIG_FILE
from retort.io.digests import digest, digest_file
from retort.io.files import is_path, suggest_path

_ROWS_AT_ONCE = 16  # of a text each: 16 of 8,192 tokens at 344 bytes a position are 45 MB


@dataclass(frozen=True)
class SourceFile:
    """A parquet file: its name in the dataset, and `fetch`, which returns where it is here, downloaded if need be."""

    name: str
    identity: str  # of its content, known before it is here
    fetch: Callable[[], Path]


@dataclass(frozen=True)
class SourceRows:
    """Some consecutive rows: the number of the first in its file, token ids of each, labels and segments if there are
    any, and columns of all their positions [P, ...] with where each row's positions begin."""

    first: int
    ids: list[NDArray[np.int64]]
    labels: list[NDArray[np.int64]] | None
    segments: list[NDArray[np.int64]] | None
    columns: dict[str, NDArray[Any]]
    offsets: NDArray[np.int64]


def find_files(source: str) -> tuple[list[SourceFile], Callable[[], Path] | None]:
    """Return the parquet files of a folder, a file or a dataset of the Hub, in order, and how to get the
    compression's config if that is beside them.

    Raises ValueError when there is nothing.
    """
    path = Path(source).expanduser()
    if path.exists() or is_path(source):
        return _find_here(path)
    try:
        info = HfApi().dataset_info(source, files_metadata=True)
    except Exception as error:  # of the HTTP client too
        raise ValueError(
            f"{source!r} is neither a folder here (looked in {Path.cwd()}) nor a dataset that the Hub gives: "
            f"{first_line(error)}"
        ) from None

    def fetch(name: str) -> Path:
        try:
            return Path(hf_hub_download(source, name, repo_type="dataset", revision=info.sha))
        except Exception as error:  # of the HTTP client too
            raise ValueError(
                f"{source}: {name} cannot be downloaded: {first_line(error)}. What is finished is kept: rerun the "
                "same command."
            ) from None

    names = {entry.rfilename: entry for entry in info.siblings or ()}
    files = [
        SourceFile(name, f"{info.sha}/{name}", lambda name=name: fetch(name))  # type: ignore[misc]
        for name in sorted(names, key=_natural)
        if name.endswith(".parquet")
    ]
    if not files:
        raise ValueError(f"the Hub's dataset {source!r} has no parquet files.")
    config = next((name for name in names if Path(name).name == CONFIG_FILE), None)
    return files, (lambda: fetch(config)) if config else None


def _find_here(path: Path) -> tuple[list[SourceFile], Callable[[], Path] | None]:
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} does not exist (looked in {Path.cwd()}).{suggest_path(path)} Give the folder of the "
            "parquet files, or the id of a dataset on the Hub."
        )
    folder = path if path.is_dir() else path.parent
    found = (
        sorted(path.rglob("*.parquet"), key=lambda p: _natural(str(p))) if path.is_dir() else [path]
    )
    if not found:
        raise ValueError(f"{str(path)!r} has no parquet files.")
    files = [
        SourceFile(str(p.relative_to(folder)), f"{p.stat().st_size}", lambda p=p: p)  # type: ignore[misc]
        for p in found
    ]
    config = folder / CONFIG_FILE
    return files, (lambda: config) if config.exists() else None


def _natural(name: str) -> list[Any]:
    """Sort data_10 behind data_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def identify_files(files: list[SourceFile]) -> str:
    """Return a digest of a dataset's files: of the Hub's commit, or of the names and contents here."""
    return digest(
        [[f.name, f.identity if "/" in f.identity else digest_file(f.fetch())] for f in files]
    )


def count_rows(file: SourceFile) -> int:
    """Return the number of rows. Raises ValueError for a file that cannot be read."""
    with _open(file.fetch()) as opened:
        return int(opened.metadata.num_rows)


def read_rows(file: SourceFile, columns: tuple[str, ...] = ()) -> Iterator[SourceRows]:
    """Yield the rows of a file, some at a time, with some columns of their positions.

    Raises ValueError for a file that cannot be read, lacks a column, or has positions of unlike widths.
    """
    path, first = file.fetch(), 0
    with _open(path) as opened:
        present = opened.schema_arrow.names
        if missing := [name for name in ("input_ids", *columns) if name not in present]:
            raise ValueError(
                f"{path} has no column {missing[0]!r}, but {', '.join(present)}: it is not a dataset of this "
                "compression."
            )
        extra = [name for name in ("labels", "attention_mask") if name in present]
        try:
            batches = opened.iter_batches(_ROWS_AT_ONCE, columns=["input_ids", *extra, *columns])
            for batch in batches:
                lists = {name: _split(batch.column(name)) for name in ("input_ids", *extra)}
                found, offsets = _flatten(batch, columns, path)
                yield SourceRows(
                    first,
                    lists["input_ids"],
                    lists.get("labels"),
                    lists.get("attention_mask"),
                    found,
                    offsets,
                )
                first += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}. Download it again.") from None


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}.") from None


def _split(column: Any) -> list[NDArray[np.int64]]:
    """Return the lists of a column of integers."""
    offsets = np.asarray(column.offsets)
    values = np.asarray(column.values).astype(np.int64)
    return [values[a:b] for a, b in pairwise(offsets.tolist())]


def _flatten(
    batch: Any, columns: tuple[str, ...], path: Path
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Return columns of lists of lists as arrays [P, width], and where each row's positions begin."""
    found: dict[str, NDArray[Any]] = {}
    offsets = np.zeros(batch.num_rows + 1, np.int64)
    for name in columns:
        column = batch.column(name)
        own = np.asarray(column.offsets).astype(np.int64)
        inner = column.values.slice(own[0], own[-1] - own[0])
        ends = np.asarray(inner.offsets)
        widths = np.unique(np.diff(ends))
        if len(widths) > 1 or (found and (own - own[0] != offsets).any()):
            raise ValueError(f"{path}: the positions of {name} are of unlike widths or numbers.")
        width = int(widths[0]) if len(widths) else 0
        values = np.asarray(inner.values)[int(ends[0]) : int(ends[-1])]
        found[name], offsets = values.reshape(-1, width), own - own[0]
    return found, offsets
