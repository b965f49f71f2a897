"""Atomic, deterministic HDF5 files: equal content gives equal bytes.

On a full disk HDF5 has crashed with a segmentation fault, and has left a truncated file without an error. So it writes
to memory only, and this module writes the bytes to the disk. In memory, large columns are holes: their bytes are copied
from their source to the disk, in pieces.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from retort.cli import SYSTEM_ERRORS
from retort.io.files import replacing, write_pieces

_IMAGE_BLOCK = 1 << 22


@dataclass(frozen=True)
class ColumnSource:
    """A column to write whose values need not be in memory: `pieces` are its bytes in C order, and are read once."""

    shape: tuple[int, ...]
    dtype: Any
    pieces: Iterable[memoryview]

    @property
    def num_bytes(self) -> int:
        """Size of all values in bytes."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


def write_h5(
    path: Path,
    fill: Callable[[Any], None],
    *,
    columns: Mapping[str, ColumnSource] | None = None,
    verify: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write an HDF5 file atomically (temporary name, fsync, rename).

    `fill` gets the open file and writes all small data; `columns` follow, by names with groups ("train/ids"); `verify`
    gets the path of the temporary file. Memory holds what `fill` writes and one piece.

    libver is "earliest" because files of "latest" have a consistency flag that stays set after a SIGKILL.
    """
    columns = columns or {}
    # A sparse file in memory: its holes, where the columns will be, take no memory.
    with os.fdopen(os.memfd_create("retort"), "w+b") as image:
        with h5py.File(image, "w", libver="earliest") as file:
            fill(file)
            places = {n: reserve(file, n, shape=c.shape, dtype=c.dtype) for n, c in columns.items()}
        with replacing(path) as temporary:
            with temporary.open("wb") as written:
                for first, name in sorted(
                    (places[n], n) for n, c in columns.items() if c.num_bytes
                ):
                    _copy_image(image, written, stop=first)
                    for piece in columns[name].pieces:
                        write_pieces(written, piece)
                    assert written.tell() == first + columns[name].num_bytes, name
                _copy_image(image, written, stop=image.seek(0, os.SEEK_END))
            verify(temporary)


def _copy_image(image: BinaryIO, written: BinaryIO, *, stop: int) -> None:
    """Append the image's bytes from the end of `written` up to `stop`."""
    image.seek(written.tell())
    while (left := stop - written.tell()) > 0:
        write_pieces(written, memoryview(image.read(min(left, _IMAGE_BLOCK))))


def reserve(file: Any, name: str, *, shape: tuple[int, ...], dtype: Any) -> int:
    """Create a column without writing its values; return its offset in the file in bytes (0 if it has no rows)."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)  # equal content, equal bytes
    space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=layout)
    return int(dataset.get_offset() or 0)


def write_text(group: Any, name: str, text: str) -> None:
    """Store text as a dataset of its UTF-8 bytes.

    HDF5 keeps strings of variable length in a heap, where one flipped bit can send its reader into an endless loop;
    strings of fixed length are limited to 64 KiB.
    """
    group.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8))


def read_text(group: Any, name: str) -> str:
    """Return a text that `write_text` stored."""
    return bytes(group[name][()]).decode()


@contextmanager
def open_h5(path: Path, *, expected_format: str, version: int) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Raises ValueError when it is missing, truncated, damaged, or of another format or version. Whatever h5py and numpy
    raise on damage inside the block (KeyError, RuntimeError, TypeError, ...) becomes this ValueError too.
    """
    try:
        with h5py.File(path, "r") as file:
            _refuse_other_format(path, file, expected_format, version)
            yield file
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: rerun the same snakemake command to make it."
        ) from None
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise ValueError(
            f"{path} cannot be read as HDF5 ({error}): it was cut short or damaged. Delete it and rerun "
            "the same command."
        ) from None


def _refuse_other_format(path: Path, file: Any, expected_format: str, version: int) -> None:
    name = file.attrs.get("format")
    name = name.decode() if isinstance(name, bytes) else name
    if name != expected_format:
        raise ValueError(
            f"{path} is not a {expected_format} file: its format attribute is {name!r}."
        )
    found = int(file.attrs.get("version", 0))
    if found != version:
        raise ValueError(
            f"{path} has format version {found}, this Retort reads {version}: use the Retort that wrote it, "
            "or make the file again with this one."
        )
