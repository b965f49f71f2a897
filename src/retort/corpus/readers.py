"""Rows of one local file: text, json (lines or an array), csv, parquet; text plain or compressed.

A *row* is a function that parses the row when it is called: rows of other shards are skipped without parsing.
Readers stream and write no cache. Any error in a file is a ValueError that names the file and the line.
"""

import csv
import difflib
import io
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from retort.config.sections import Dataset
from retort.corpus.chats import CHAT_COLUMNS, PAIR_COLUMNS, TOOLS_COLUMN
from retort.io.text_files import explain_read_errors, open_utf8

Row = Callable[[], Mapping[str, Any]]  # () -> {column: value}

# A text file is split into passages: a line is too short for a document, a whole book too long to hold out.
_PASSAGE_CHARACTERS = 4000
_PARQUET_BATCH_ROWS = 256
_DELIMITERS = ",;\t|"


class Columns(NamedTuple):
    """The columns to read: required in every file, read where present, and sets that serve instead of the required."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    instead: tuple[tuple[str, ...], ...] = ()

    def find_required(self, found: Collection[str]) -> tuple[str, ...]:
        """Return the required columns, or the first set of others that is there instead of them."""
        ways = (self.required, *self.instead)
        shared = set(self.required).intersection(*ways)  # labels, which the user named
        for needed in (set(), shared):
            for way in ways:
                if all(name in found or name in needed for name in way):
                    return way
        return self.required

    def select(self, found: Collection[str]) -> list[str]:
        """Return the columns to read of those in `found`."""
        return [name for name in (*self.find_required(found), *self.optional) if name in found]


def choose_columns(dataset: Dataset) -> Columns:
    """Return the columns to read for a dataset section."""
    instead: list[tuple[str, ...]] = []
    if dataset.messages_column is not None:
        required = [dataset.messages_column]
    elif dataset.prompt_column is not None and dataset.response_column is not None:
        required = [dataset.prompt_column, dataset.response_column]
    else:
        required = [dataset.text_column]
        if dataset.text_column == "text":
            instead = [*((name,) for name in CHAT_COLUMNS), PAIR_COLUMNS]
    labels = {"category": dataset.category_column, "language": dataset.language_column}
    # A label column that the user named is required; one with the default name is optional.
    named = [column for default, column in labels.items() if column not in (None, default)]
    named += [dataset.system_column] if dataset.system_column is not None else []
    optional = [column for default, column in labels.items() if column == default]
    return Columns(
        (*required, *named), (*optional, TOOLS_COLUMN), tuple((*way, *named) for way in instead)
    )


def read_file(path: Path, loader: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of one file; `loader` is one of LOADERS.

    Raises ValueError, here or when a row is called, for a file that cannot be read or lacks a required column.
    """
    with explain_read_errors(path):
        yield from _READERS[loader](path, columns)


def text_row(text: str) -> Mapping[str, str]:
    """Return the row of a source whose only column is `text`."""
    return {"text": text}


def require_columns(columns: Columns, found: Iterable[str], *, where: str) -> None:
    """Raise ValueError when a required column is not in `found`; `where` names the source."""
    found = list(found)
    for column in columns.find_required(found):
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"column {column!r} is not in {where}, which has "
                f"{', '.join(map(repr, found)) or 'no columns'}.{hint} Set dataset.text_column, or "
                "prompt_column and response_column, or messages_column (for prompts, synthesis.prompt_column), to a "
                "column that is there."
            )


def _read_text(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield passages of at least 4,000 characters, cut at blank lines, or after 8,000 at a line end."""
    require_columns(columns, ["text"], where=f"{path} (a text file's one column is 'text')")
    lines: list[str] = []
    size = 0
    with open_utf8(path) as file:
        for line in io.TextIOWrapper(file, encoding="utf-8"):
            is_blank = not line.strip()
            if is_blank and not lines:
                continue
            lines.append(line)
            size += len(line)
            if size >= (_PASSAGE_CHARACTERS if is_blank else 2 * _PASSAGE_CHARACTERS):
                yield partial(text_row, "".join(lines).rstrip())
                lines, size = [], 0
    if lines:
        yield partial(text_row, "".join(lines).rstrip())


def _read_json(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield rows of one JSON object per line, or of one array of objects."""
    with open_utf8(path) as file:
        is_first = True
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if is_first and line.lstrip().startswith(b"["):
                rows = _parse_json(line + file.read(), path, number)
            else:
                rows = [partial(_parse_object, line, path, number)]
            for row in rows:
                if is_first:
                    require_columns(columns, row(), where=f"{path}, line {number}")
                is_first = False
                yield row


def _parse_json(content: bytes, path: Path, number: int) -> list[Row]:
    values = _load_json(content, path, number)
    return [partial(_check_object, value, path, number) for value in values]


def _parse_object(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    return _check_object(_load_json(line, path, number), path, number)


def _load_json(content: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        start = content[:40].decode("utf-8", errors="replace").strip()
        raise ValueError(
            f"{path}, line {number} is not JSON ({error}); it starts with {start!r}. Expected one "
            "object per line, or one array of objects; fix or remove the line."
        ) from error


def _check_object(value: Any, path: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}, line {number} holds {json.dumps(value)[:40]}, not an object: expected lines "
            'such as {"text": "..."}; fix or remove the line.'
        )
    return value


def _read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield rows of separated values with a header line; a quoted value may contain line breaks.

    The delimiter is the one with which the header has the required columns, so a wrong one is never used.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses values above 131,072 characters
    with open_utf8(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        first, num_before = _skip_blank_lines(lines)
        delimiter = _choose_delimiter(first, columns)
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if not header:
                return
            require_columns(columns, header, where=f"the header of {path}")
            _refuse_doubled_columns(columns, header, path)
            for values in reader:
                if len(values) > len(header):
                    raise ValueError(
                        f"{path}, line {num_before + reader.line_num} has {len(values)} values, but the header "
                        f"names {len(header)} columns: quote values that contain {delimiter!r}."
                    )
                if values:
                    yield partial(_pair, header, values)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {num_before + reader.line_num} is not CSV ({error}): quote values that contain "
                f"{delimiter!r}, quotes or line breaks, and double the quotes inside."
            ) from error


def _skip_blank_lines(lines: Iterator[str]) -> tuple[str, int]:
    """Return the first line with a name in it ("" without one), and the number of lines before it.

    Spreadsheets write empty rows as delimiters alone, and may state the delimiter in a first line such as `sep=;`.
    """
    number = 0
    for number, line in enumerate(lines):
        if line.strip(f'{_DELIMITERS}" \r\n') and not line.startswith("sep="):
            return line, number
    return "", number


def _choose_delimiter(header: str, columns: Columns) -> str:
    """Return the delimiter with which a header line has the required columns, or else the most columns."""
    found = {d: next(csv.reader([header], delimiter=d), []) for d in _DELIMITERS}
    for delimiter, names in found.items():
        if all(column in names for column in columns.find_required(names)):
            return delimiter
    return max(found, key=lambda delimiter: len(found[delimiter]))


def _refuse_doubled_columns(columns: Columns, header: list[str], path: Path) -> None:
    for column in columns.select(header):
        if header.count(column) > 1:
            raise ValueError(
                f"the header of {path} names the column {column!r} {header.count(column)} times: rename all but the "
                "one to read."
            )


def _pair(header: Sequence[str], values: Sequence[str]) -> Mapping[str, str]:
    return dict(zip(header, values, strict=False))  # a short row has no values for the last columns


def _read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            require_columns(columns, present, where=str(path))
            wanted = columns.select(present)
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=wanted):
                for row in range(batch.num_rows):
                    yield partial(_take, batch, row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a readable Parquet file: {error}. Write or download it again."
        ) from error


def _take(batch: Any, row: int) -> Mapping[str, Any]:
    return {name: batch.column(name)[row].as_py() for name in batch.schema.names}


_READERS: dict[str, Callable[[Path, Columns], Iterator[Row]]] = {
    "text": _read_text,
    "json": _read_json,
    "parquet": _read_parquet,
    "csv": _read_csv,
}

LOADERS = tuple(_READERS)
