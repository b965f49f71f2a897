"""What workers did, and manifest.json: size and content of a merged cache, and how far it is from the live teacher."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from retort.cache.kinds import PartKind
from retort.config.sections import Generation
from retort.io.records import Entry, JsonObject, Record
from retort.io.run_record import RunRecord

BATCH_FILE = "batch_tokens.json"


class Fidelity(Entry):
    """Means over the training positions that the teacher scored again, at temperature 1.

    kl: KL(live teacher || cache) in nats over the kept tokens and one bucket for the tail: what storing (and scoring in
    other batches) changed. agreement: share with the same most probable token. tail_mass: mass outside the exact
    tokens.
    """

    positions: int
    kl: float
    agreement: float
    tail_mass: float


class Imported(Entry):
    """Where the distributions of an imported cache come from.

    kind: the format; files: number of them; compression: how they were compressed there; tail: whether the mass of what
    the dataset has not is estimated, as what its tokens leave of 1, or unknown, and taken as 0. The cache's fidelity is
    then measured against the dataset.
    """

    kind: str
    source: str
    files: int
    compression: JsonObject
    tail: Literal["estimated", "unknown"]


class Manifest(Record, format="retort-manifest", version=2):
    """manifest.json of a merged cache: `sha256` is of its content, `header` that of the file.

    fidelity: None where it was not measured.
    """

    has_digest: ClassVar[bool] = True

    file: str
    mode: str
    file_bytes: int
    sha256: str
    sequences: int
    tokens: int
    positions: int
    bytes_per_position: float
    method: str
    top_k: int | None
    min_probability: float | None
    halved_parts: int
    header: JsonObject
    fidelity: Fidelity | None
    imported: Imported | None = Field(default=None, exclude_if=lambda found: found is None)


class WorkerRecord(Record, format="retort-worker"):
    """metadata_worker<w>.json, the receipt of a worker: the names of the parts that it did.

    peak_memory: bytes of its process (see `read_peak_memory`), None in older records.
    """

    worker: int
    num_workers: int
    parts_done: tuple[str, ...]
    tokens: int
    made: RunRecord
    peak_memory: int | None = Field(default=None, exclude_if=lambda size: size is None)


class KindCount(Entry):
    """The number of parts of a kind, which is None where their headers do not name one."""

    kind: PartKind | None
    parts: int


class CacheRun(RunRecord, format="retort-cache-run", version=3):
    """run.json beside a merged cache: the receipts of the workers that made its parts, and these parts' kinds.

    kinds: most frequent first; empty where the parts were removed before they were counted.
    """

    workers: tuple[WorkerRecord, ...]
    kinds: tuple[KindCount, ...]

    @classmethod
    def upgrade(cls, content: JsonObject, version: int) -> JsonObject | None:
        """Return the content of version 2, which has no kinds, as this version has it."""
        return content | {"kinds": []} if version == RunRecord.version else None


class BatchTokens(Record, format="retort-batch-tokens"):
    """batch_tokens.json beside a cache's parts: the tokens of a batch, with padding, and how they were found."""

    has_digest: ClassVar[bool] = True

    batch_tokens: int
    device: str
    reason: str


def read_batch_tokens(folder: Path, generation: Generation) -> int | None:
    """Return the number that is recorded for the cache of a folder; None: none yet, or the config has no `auto`.

    Raises ValueError when the record is damaged or was edited.
    """
    path = folder / BATCH_FILE
    if generation.batch_tokens != "auto" or not path.exists():
        return None
    return BatchTokens.read(path).batch_tokens
