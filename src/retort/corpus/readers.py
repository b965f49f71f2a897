"""Rows of one local file: text, json (lines or an array), csv, parquet; plain, gzip or zstd.

A *row* is a function that parses the row when it is called: rows of other shards are skipped without parsing.
Readers stream and write no cache. Any error in a file is a ValueError that names the file and the line.
"""

import csv
import difflib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from retort.config.sections import Dataset

Row = Callable[[], Mapping[str, Any]]  # () -> {column: value}

# A text file is split into passages: a line is too short for a document, a whole book too long to hold out.
_PASSAGE_CHARACTERS = 4000
_PARQUET_BATCH_ROWS = 256


class Columns(NamedTuple):
    """The columns to read: required in every file, and read where present."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def both(self) -> tuple[str, ...]:
        """Required columns, then optional ones."""
        return self.required + self.optional


def choose_columns(dataset: Dataset) -> Columns:
    """Return the columns to read for a dataset section."""
    if dataset.prompt_column is not None and dataset.response_column is not None:
        required = [dataset.prompt_column, dataset.response_column]
    else:
        required = [dataset.text_column]
    labels = {"category": dataset.category_column, "language": dataset.language_column}
    # A label column that the user named is required; one with the default name is optional.
    required += [column for default, column in labels.items() if column not in (None, default)]
    optional = [column for default, column in labels.items() if column == default]
    return Columns(tuple(required), tuple(optional))


def read_file(path: Path, loader: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of one file; `loader` is one of LOADERS.

    Raises ValueError, here or when a row is called, for a file that cannot be read or lacks a required column.
    """
    with explain_read_errors(path):
        yield from _READERS[loader](path, columns)


@contextmanager
def open_decompressed(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if its first bytes are those of gzip or zstd."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        magic = file.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            yield cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file)))
        elif magic == b"\x28\xb5\x2f\xfd":
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            yield cast(BinaryIO, stack.enter_context(io.BufferedReader(cast(io.RawIOBase, reader))))
        else:
            yield file


def text_row(text: str) -> Mapping[str, str]:
    """Return the row of a source whose only column is `text`."""
    return {"text": text}


def require_columns(columns: Columns, found: Iterable[str], *, where: str) -> None:
    """Raise ValueError when a required column is not in `found`; `where` names the source."""
    found = list(found)
    for column in columns.required:
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"column {column!r} is not in {where}, which has "
                f"{', '.join(map(repr, found)) or 'no columns'}.{hint} Set dataset.text_column, or "
                "prompt_column and response_column (for prompts, synthesis.prompt_column), to a column that "
                "is there."
            )


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Convert errors of decompressors and decoders into a ValueError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): write or download it again."
        ) from error
    except PermissionError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): check its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason}): "
            "convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from error


def _read_text(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield passages of at least 4,000 characters, cut at blank lines, or after 8,000 at a line end."""
    require_columns(columns, ["text"], where=f"{path} (a text file's one column is 'text')")
    lines: list[str] = []
    size = 0
    with open_decompressed(path) as file:
        for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
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
    with open_decompressed(path) as file:
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
    """Yield rows of comma-separated values with a header line; a quoted value may contain line breaks."""
    csv.field_size_limit(sys.maxsize)  # the default refuses values above 131,072 characters
    with open_decompressed(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            require_columns(columns, header, where=f"the header of {path}")
            for values in reader:
                if len(values) > len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num} has {len(values)} values, but the header "
                        f"names {len(header)} columns: quote values that contain commas."
                    )
                if values:
                    yield partial(_pair, header, values)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num} is not CSV ({error}): quote values that contain "
                "commas, quotes or line breaks, and double the quotes inside."
            ) from error


def _pair(header: Sequence[str], values: Sequence[str]) -> Mapping[str, str]:
    return dict(zip(header, values, strict=False))  # a short row has no values for the last columns


def _read_parquet(path: Path, columns: Columns) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            require_columns(columns, present, where=str(path))
            wanted = [name for name in columns.both if name in present]
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
