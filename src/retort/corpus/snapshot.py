"""A corpus drawn: read once, in its order, and written down as one file per shard, in steps that a kill does not undo.

A *step* is a fixed number of documents. Each shard's documents of a step become one gzip member of the shard's file.
When the files are on the disk, a record beside them says how long they are and where the reading stood. A draw that was
killed cuts the files to those lengths and goes on from there, so its files are those of an undisturbed draw, byte for
byte. Where shards have files of their own, each is drawn by a *reader* of its own, side by side with the others.
"""

import gzip
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from retort.config.sections import Dataset
from retort.corpus.demo_text import describe_demo
from retort.corpus.documents import Counts, Document, make_document
from retort.corpus.hub import pin
from retort.corpus.readers import naming, open_bytes
from retort.corpus.reading import (
    Place,
    Reading,
    corpus_files,
    corpus_keys,
    count_documents,
    count_readers,
    record_path,
    refuse_empty,
    unchanged,
)
from retort.corpus.sharding import Dealt, choose_sharding
from retort.corpus.sources import is_hub
from retort.io.digests import digest, digest_file_states
from retort.io.files import file_lock, read_json, write_json

logger = logging.getLogger(__name__)

_DRAWN_FORMAT = {"format": "retort corpus", "version": 1}
_PROGRESS_FORMAT = {"format": "retort draw", "version": 1}
# A step ends with one fsync a shard, so it grows with their number.
_STEP_DOCUMENTS = 1000
_STEP_DOCUMENTS_PER_SHARD = 125
_SECONDS_BETWEEN_LINES = 10.0
_PATIENCE_S = 3.0


def draw_corpus(
    dataset: Dataset, out_dir: Path, *, reader: int = 0, stamp: str | None = None
) -> dict[str, Any]:
    """Read a corpus once, in its order, into a file per shard and a record, which is returned.

    Of several readers, each draws the shard of its number. Memory holds one document (and the shuffle's window). A
    draw goes on where the last one of the same corpus ended, waits for one that is at work, and finds what is done.
    The content of the files depends on the source and the dataset section alone. Raises ValueError when nothing is
    usable, or the source is no longer what `stamp` was taken of.
    """
    if reader >= count_readers(dataset):
        raise ValueError(
            f"--reader is {reader}, but this corpus has {count_readers(dataset)} (dataset.sharding "
            f"{dataset.sharding!r}, num_shards {dataset.num_shards}): readers count from 0."
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        busy = f"{out_dir} is being drawn by another process: waiting for it"
        lock = out_dir / f".draw_{reader:05d}.lock"
        stack.enter_context(file_lock(lock, busy=busy, notify_after_s=_PATIENCE_S))
        drawn = _Drawn.resume(dataset, out_dir, reader)
        if not drawn.is_complete:
            with unchanged(dataset, stamp):
                _draw(drawn)
            drawn.commit(is_complete=True)
        summary = drawn.describe()
        write_json(record_path(out_dir, dataset, reader), summary)
    return summary


def read_drawn(
    out_dir: Path, *, shard: int, counts: Counts, dealt: Dealt | None = None
) -> Iterator[Document]:
    """Yield one shard's documents as `draw_corpus` wrote them; add their counts to `counts`.

    What the shard was dealt is copied to `dealt`, where readers drew apart. Raises ValueError when the files are not
    what their record says.
    """
    path = out_dir / f"corpus_{shard:05d}.json"
    path = path if path.exists() else out_dir / "corpus.json"
    summary = read_json(path)
    is_known = {key: summary.get(key) for key in _DRAWN_FORMAT} == _DRAWN_FORMAT
    place = shard - summary.get("shard", 0)
    if not is_known or not 0 <= place < len(summary["shards"]):
        raise ValueError(
            f"{path} does not describe shard {shard} of a corpus in format "
            f"{_DRAWN_FORMAT}: remove the folder and draw the corpus again."
        )
    expected = Counts.from_json(summary["shards"][place])
    if dealt is not None:
        for key, value in summary.get("dealt", {}).items():
            setattr(dealt, key, value)
    path = _drawn_path(out_dir, shard)
    num_read = 0
    with naming(path), open_bytes(path) as file:
        for line in file:
            yield Document(**json.loads(line))
            num_read += 1
    if num_read != expected.used:
        raise ValueError(
            f"{path} holds {num_read} documents, but its record says {expected.used}: remove the "
            "folder and draw the corpus again."
        )
    counts.merge(expected)


def _drawn_path(out_dir: Path, shard: int) -> Path:
    return out_dir / f"documents_{shard:05d}.jsonl.gz"


def _draw(drawn: "_Drawn") -> None:
    """Read from where `drawn` stands to the corpus's end, committing at the end of every step."""
    dataset = drawn.dataset
    dealt = None if drawn.shard is None else drawn.dealt
    reading = Reading(dataset, shard=drawn.shard, place=drawn.place, dealt=dealt)
    shard_of = choose_sharding(dataset, lambda: count_documents(dataset))
    step = _choose_step(dataset, reading.window)
    progress = _Progress(drawn)
    with _Files(drawn) as files:
        for index, split, row in reading:
            shard = shard_of(index)
            counts = drawn.counts[shard]
            document = make_document(row(), dataset, index=index, split=split, counts=counts)
            if document is not None:
                line = _to_line(document)
                files.write(shard, line)
                drawn.num_bytes += len(document.text.encode())
                drawn.num_bytes += len((document.prompt or "").encode())
            if reading.place.documents % step == 0:
                files.flush()
                drawn.place = reading.place
                drawn.commit()
            progress.tick()
        files.flush()
    if drawn.shard is None:
        refuse_empty(dataset, drawn.total)


def _choose_step(dataset: Dataset, window: int) -> int:
    """Return the documents of a step, whole windows of the shuffle: a function of the config alone."""
    least = max(_STEP_DOCUMENTS, _STEP_DOCUMENTS_PER_SHARD * dataset.num_shards)
    return -(-least // window) * window


def _to_line(document: Document) -> bytes:
    values = asdict(document)
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@dataclass
class _Drawn:
    """What was drawn so far, and the record of it."""

    dataset: Dataset  # its revision is the commit that is read
    out_dir: Path
    reader: int
    key: str
    counts: dict[int, Counts]  # by shard
    sizes: dict[int, int]  # bytes of each shard's file
    place: Place = field(default_factory=Place)
    dealt: Dealt = field(default_factory=Dealt)
    num_bytes: int = 0  # of text
    content: str = ""  # digest of all steps' lines
    is_complete: bool = False

    @classmethod
    def resume(cls, dataset: Dataset, out_dir: Path, reader: int) -> "_Drawn":
        """Return what an earlier draw of the same corpus committed, or nothing drawn."""
        shards = range(dataset.num_shards) if count_readers(dataset) == 1 else [reader]
        packages = describe_demo() if dataset.name == "demo" else {}
        key = digest([corpus_keys(dataset), digest_file_states(corpus_files(dataset)), packages])
        drawn = cls(dataset, out_dir, reader, key, {s: Counts() for s in shards}, {})
        if drawn._load():
            if not drawn.is_complete:
                logger.info(
                    f"going on after document {drawn.total.read:,}, where the last draw ended"
                )
        elif dataset.streaming and is_hub(dataset):
            drawn.dataset = pin(dataset)
        return drawn

    @property
    def shard(self) -> int | None:
        """The one shard whose files are read, where readers draw apart."""
        return None if count_readers(self.dataset) == 1 else self.reader

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.counts.values():
            total.merge(counts)
        return total

    @property
    def _record(self) -> Path:
        return self.out_dir / f".draw_{self.reader:05d}.json"

    def commit(self, *, is_complete: bool = False) -> None:
        """Write down how far the files go, once they are on the disk."""
        self.is_complete = is_complete
        record = {
            **_PROGRESS_FORMAT,
            "key": self.key,
            "revision": self.dataset.revision,
            "place": asdict(self.place),
            "dealt": self.dealt.to_json(),
            "counts": {str(shard): counts.to_json() for shard, counts in self.counts.items()},
            "sizes": {str(shard): size for shard, size in self.sizes.items()},
            "bytes": self.num_bytes,
            "content": self.content,
            "is_complete": is_complete,
        }
        write_json(self._record, record | {"digest": digest(record)})

    def _load(self) -> bool:
        """Take up a record and cut the files to its lengths; False where there is none, or of another corpus."""
        try:
            record = read_json(self._record)
        except (FileNotFoundError, ValueError):
            return False
        expected = _PROGRESS_FORMAT | {"key": self.key}
        if not isinstance(record, dict) or {k: record.get(k) for k in expected} != expected:
            return False
        if record.pop("digest", None) != digest(record):  # edited, or not ours
            return False
        sizes = {int(shard): size for shard, size in record["sizes"].items()}
        paths = {shard: _drawn_path(self.out_dir, shard) for shard in sizes}
        if any(not p.exists() or p.stat().st_size < sizes[s] for s, p in paths.items()):
            return False
        for shard, path in paths.items():
            os.truncate(path, sizes[shard])
        self.dataset = replace(self.dataset, revision=record["revision"])
        self.sizes = sizes
        self.place = Place(**record["place"])
        self.dealt = Dealt(**record["dealt"])
        self.counts = {int(s): Counts.from_json(c) for s, c in record["counts"].items()}
        self.num_bytes, self.content = record["bytes"], record["content"]
        self.is_complete = record["is_complete"]
        return True

    def describe(self) -> dict[str, Any]:
        """Return the record of a finished draw."""
        apart = {} if self.shard is None else {"shard": self.shard, "dealt": self.dealt.to_json()}
        is_stream = self.dataset.streaming and is_hub(self.dataset)
        return {
            **_DRAWN_FORMAT,
            "name": self.dataset.name,
            "revision": self.dataset.revision if is_stream else None,
            "packages": describe_demo() if self.dataset.name == "demo" else {},
            "bytes": self.num_bytes,
            "sha256_of_steps": self.content,
            "counts": self.total.to_json(),
            **apart,
            "shards": [counts.to_json() for counts in self.counts.values()],
        }


class _Files:
    """The shards' files, to which a step's documents are added as one gzip member each."""

    def __init__(self, drawn: _Drawn) -> None:
        self.drawn = drawn
        self.lines = hashlib.sha256()

    def __enter__(self) -> "_Files":
        self.stack = ExitStack()
        self.packed: dict[int, BinaryIO] = {}
        self.files = {
            shard: self.stack.enter_context(_drawn_path(self.drawn.out_dir, shard).open("r+b"))
            for shard in self._prepare()
        }
        return self

    def _prepare(self) -> list[int]:
        """Make the files that are missing, and cut all to what was committed."""
        for shard in self.drawn.counts:
            path = _drawn_path(self.drawn.out_dir, shard)
            path.touch()
            os.truncate(path, self.drawn.sizes.setdefault(shard, 0))
        return list(self.drawn.counts)

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def write(self, shard: int, line: bytes) -> None:
        """Add one line to a shard's member of this step."""
        if shard not in self.packed:
            file = self.files[shard]
            file.seek(0, os.SEEK_END)
            # Level 1: 3x as fast as the default, for files a tenth larger. Neither a name nor the time in it.
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0)
            self.packed[shard] = cast(BinaryIO, packed)
        self.packed[shard].write(line)
        self.lines.update(line)

    def flush(self) -> None:
        """End the step: its members are on the disk, and their sizes and digest in `drawn`."""
        for shard, packed in self.packed.items():
            packed.close()
            file = self.files[shard]
            file.flush()
            os.fsync(file.fileno())
            self.drawn.sizes[shard] = file.tell()
        if self.packed:
            self.drawn.content = hashlib.sha256(
                (self.drawn.content + self.lines.hexdigest()).encode()
            ).hexdigest()
        self.packed, self.lines = {}, hashlib.sha256()


class _Progress:
    """A line on stderr every ten seconds of long work."""

    def __init__(self, drawn: _Drawn) -> None:
        self.drawn = drawn
        self.start = self.last = time.monotonic()
        self.before = drawn.total.read

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            read = self.drawn.total.read
            rate = (read - self.before) / (now - self.start)
            size = f"{self.drawn.num_bytes / 1e6:,.1f} MB of text"
            logger.info(f"{read:,} documents read, {size}, {rate:,.0f}/s")
