"""Parts of a cache in an object store, of which a *receipt* is kept here, and how their records are read.

A receipt is a part without its records: the sequences, keys and checksums, and the object (URL, first byte, number of
bytes) that holds the records. It is written once the object is stored and compared with what was sent, so it is what a
part's file is for all else: its existence means that the part is done. An object's name has the checksum of its bytes,
and an object appears whole or not at all: a kill leaves none half-visible, and a part made twice is one object.

Records are read by ranges of bytes. The first `most_bytes` of all records are kept on a disk of this machine, in
blocks, as they are read; what is beyond is asked for anew each time. So the disk is bounded without evicting anything:
an epoch reads every sequence once, in random order, and no other choice of blocks would be found here more often.
"""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retort.io.objects import ByteRange, read_ranges

logger = logging.getLogger(__name__)

# Of what is kept here. Larger ones are fewer requests; but the first steps read a block for almost each sequence.
BLOCK_BYTES = 1 << 20
_NAME_DIGITS = 16  # of the sha256 in an object's name


class StoredRecords(NamedTuple):
    """Where the records of a part are: `size` bytes of an object, from byte `offset` on."""

    url: str
    offset: int
    size: int


class Span(NamedTuple):
    """Bytes `start` to before `stop` of a part's records."""

    part: int
    start: int
    stop: int


def name_object(receipt: Path, part: Path) -> str:
    """Return the name of the object of a part: that of its receipt, and the checksum of its bytes."""
    with part.open("rb") as file:
        digits = hashlib.file_digest(file, "sha256").hexdigest()[:_NAME_DIGITS]
    return f"{receipt.name.partition('.')[0]}-{digits}.h5"


@dataclass(frozen=True)
class KeptBlocks:
    """Blocks of records in a folder of this machine, which its processes share: at most `most_bytes` of them."""

    folder: Path
    most_bytes: int

    def path(self, part: int, block: int) -> Path:
        """Return the file of a block of a part's records."""
        return self.folder / f"{part}-{block}.block"


class RecordStore:
    """Reads records of a cache whose parts are objects; each process that reads has its own."""

    def __init__(self, parts: Sequence[StoredRecords], kept: KeptBlocks | None) -> None:
        self._parts, self._kept = parts, kept
        self._ends = np.cumsum([part.size for part in parts])
        self._ready: dict[Span, bytes] = {}

    def prefetch(self, spans: Sequence[Span]) -> None:
        """Read spans at the same time, and hold them until the next call."""
        self._ready = dict(zip(spans, self._read(spans), strict=True))

    def read(self, span: Span) -> bytes:
        """Return the bytes of a span. Raises ValueError when the store does not give them."""
        found = self._ready.get(span)
        return self._read([span])[0] if found is None else found

    def read_again(self, span: Span) -> bytes:
        """Return the bytes of a span from the store, and forget what this machine has of it, which is damaged."""
        if self._kept:
            for block in _blocks_of(span):
                self._kept.path(span.part, block).unlink(missing_ok=True)
        return read_ranges([self._locate(span)])[0]

    def _read(self, spans: Sequence[Span]) -> list[bytes]:
        kept = [span for span in spans if self._is_kept(span)]
        blocks = dict.fromkeys((span.part, block) for span in kept for block in _blocks_of(span))
        missing = [name for name in blocks if not self._has_block(*name)]
        far = list(dict.fromkeys(span for span in spans if not self._is_kept(span)))
        wanted = [self._block_span(*name) for name in missing] + far
        found = read_ranges([self._locate(span) for span in wanted])
        new = dict(zip(missing, found, strict=False))
        rest = dict(zip(far, found[len(missing) :], strict=True))
        for name, content in new.items():
            self._write_block(*name, content)
        return [rest[span] if span in rest else self._join(span, new) for span in spans]

    def _join(self, span: Span, new: dict[tuple[int, int], bytes]) -> bytes:
        """Return the bytes of a span from blocks: those that were just read, and files."""
        pieces = []
        for block in _blocks_of(span):
            first = block * BLOCK_BYTES
            start, stop = max(span.start - first, 0), min(span.stop - first, BLOCK_BYTES)
            content = new.get((span.part, block))
            if content is not None:
                pieces.append(content[start:stop])
            else:
                pieces.append(self._read_block(span.part, block, start, stop))
        joined = b"".join(pieces)
        return joined if len(joined) == span.stop - span.start else self.read_again(span)

    def _locate(self, span: Span) -> ByteRange:
        url, offset, _ = self._parts[span.part]
        return ByteRange(url, offset + span.start, offset + span.stop)

    def _is_kept(self, span: Span) -> bool:
        """Say whether the blocks of a span are among those that this machine keeps."""
        if self._kept is None or span.start == span.stop:
            return False
        first = int(self._ends[span.part]) - self._parts[span.part].size
        last = self._block_span(span.part, _blocks_of(span)[-1])
        return first + last.stop <= self._kept.most_bytes

    def _block_span(self, part: int, block: int) -> Span:
        stop = min((block + 1) * BLOCK_BYTES, self._parts[part].size)
        return Span(part, block * BLOCK_BYTES, stop)

    def _has_block(self, part: int, block: int) -> bool:
        assert self._kept
        span = self._block_span(part, block)
        try:
            size = self._kept.path(part, block).stat().st_size
        except FileNotFoundError:
            return False
        return size == span.stop - span.start

    def _read_block(self, part: int, block: int, start: int, stop: int) -> bytes:
        """Return some bytes of a block's file; fewer if another process has removed it as damaged."""
        if self._kept is None:
            return b""
        with suppress(FileNotFoundError), self._kept.path(part, block).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
        return b""

    def _write_block(self, part: int, block: int, content: bytes) -> None:
        """Write a block's file at once, not to the disk at once: a damaged one is noticed, and read from the store."""
        if self._kept is None:
            return
        path = self._kept.path(part, block)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                written = Path(file.name)
                try:
                    file.write(content)
                    file.flush()
                    written.replace(path)
                finally:
                    written.unlink(missing_ok=True)
        except OSError as error:  # the disk is full: the rest is read from the store
            logger.warning(f"{self._kept.folder} takes no more of the cache ({error.strerror})")
            self._kept = None


def _blocks_of(span: Span) -> range:
    return range(span.start // BLOCK_BYTES, -(-span.stop // BLOCK_BYTES))
