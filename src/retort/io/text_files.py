"""Text files of users as UTF-8: decompressed, transcoded from UTF-16 or UTF-32, without a byte order mark.

What a file is follows from its first bytes, not from its name. Everything streams.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip")
# Loaders by a file's ending.
LOADER_OF = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}

_CHUNK_BYTES = 1 << 17
_ENCODINGS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_ending(path: Path) -> str:
    """Return a path's last ending that is not of a compression, "" without one."""
    endings = [ending for ending in path.suffixes if ending not in COMPRESSED_SUFFIXES]
    return endings[-1] if endings else ""


@contextmanager
def open_utf8(path: Path) -> Iterator[BinaryIO]:
    """Open a text file for reading, as UTF-8 bytes.

    Raises ValueError for an archive of several files. Errors while reading: see `explain_read_errors`.
    """
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        plain = _decompress(file, path, stack)
        first = plain.peek(512)
        if first[257:262] == b"ustar":
            raise ValueError(f"{path} is a tar archive: unpack it, and give the files in it.")
        if encoding := _find_encoding(first[:4]):
            yield _buffer(_transcode(plain, encoding))
            return
        if first[:3] == codecs.BOM_UTF8:
            plain.read(3)
        yield cast(BinaryIO, plain)


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Convert errors of decompressors and decoders into a ValueError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {error.encoding.upper()} text (byte 0x{error.object[error.start]:02x}: {error.reason}). "
            "UTF-8, UTF-16 and UTF-32 are read: convert another encoding, for example Western European text with "
            "`iconv -f windows-1252 -t utf-8`."
        ) from error
    except PermissionError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): check its permissions."
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the content
        raise ValueError(
            f"{path} is damaged or cut short ({error}): write or download it again."
        ) from error


def _decompress(file: io.BufferedReader, path: Path, stack: ExitStack) -> io.BufferedReader:
    """Return the file decompressed, if its first bytes are those of a format that is known; all returned can peek."""
    magic = file.peek(6)[:6]
    opened: object = file
    if magic.startswith(b"\x1f\x8b"):
        opened = stack.enter_context(gzip.GzipFile(fileobj=file))
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        opened = _buffer(_decompress_zstd(file))
    elif magic.startswith(b"BZh"):
        opened = stack.enter_context(bz2.BZ2File(file))
    elif magic == b"\xfd7zXZ\x00":
        opened = stack.enter_context(lzma.LZMAFile(file))  # noqa: SIM115  # the stack closes it
    elif magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        opened = stack.enter_context(_open_zip(file, path, stack))
    return cast(io.BufferedReader, opened)


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames. Unlike zstandard's own reader, raises EOFError when the last one is cut."""
    import zstandard

    frame = None
    while chunk := file.read(_CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _open_zip(file: BinaryIO, path: Path, stack: ExitStack) -> BinaryIO:
    """Open the only file of a zip archive; raises ValueError for several, and for one that needs a password."""
    archive = stack.enter_context(zipfile.ZipFile(file))
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        raise ValueError(
            f"{path} is a zip archive of {len(members)} files: unpack it, and give the files in it."
        )
    try:
        return cast(BinaryIO, archive.open(members[0]))
    except RuntimeError as error:  # encrypted, or an unusual compression
        raise ValueError(f"{path} cannot be decompressed ({error}): unpack it.") from error


def _find_encoding(first: bytes) -> str | None:
    """Return the encoding of a text by its first four bytes, None for UTF-8."""
    for mark, encoding in _ENCODINGS.items():
        if first.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in first]  # two ASCII characters of UTF-16 without a mark
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    return "utf-16-be" if zeros == [True, False, True, False] else None


def _transcode(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while chunk := file.read(_CHUNK_BYTES):
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", final=True).encode()


def _buffer(chunks: Iterator[bytes]) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Chunks(chunks), _CHUNK_BYTES))


class _Chunks(io.RawIOBase):
    """A file whose content is that of an iterator."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int] | bytearray") -> int:  # type: ignore[override]
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size
