"""`retort import`: a published dataset of logits becomes tokens and a logit cache, file by file.

The folder has tokenizer/, tokens/ (a shard for each file, and index.json), teacher_logits.h5 and manifest.json: what a
training needs. What an interrupted import has finished is kept.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retort.cache.codec import TokenOrder
from retort.cache.entropy_codec import EntropyCodec, Selection
from retort.cache.finished import MANIFEST
from retort.cache.merged import merge_parts
from retort.cache.methods import build_codec
from retort.cache.parts import find_missing_parts, part_path, remove_parts, write_part
from retort.cache.reader import CACHE_FILE, CacheHeader, LogitCache
from retort.config.sections import Cache
from retort.imports.distillkit import CONFIG_FILE, Compression, read_compression
from retort.imports.selection import FidelitySums, Selector
from retort.imports.source import SourceFile, find_files, identify_files, read_rows
from retort.imports.texts import Text, list_texts, write_tokens
from retort.io.digests import digest
from retort.io.files import (
    file_lock,
    read_json,
    remove_stale_temporaries,
    require_writable,
    write_json,
)
from retort.io.fingerprints import TokenizerIdentity
from retort.io.run_record import RUN_FILE, describe_run
from retort.teacher.merge import build_manifest
from retort.teacher.records import CacheRun, Fidelity, Imported
from retort.tokens.index import Part, TokenIndex
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_MEASURED_POSITIONS = 2000  # of each part
_LEAST_FOUND = 0.5  # share of next tokens among the dataset's; 0.9 and more of real ones, few where they do not fit


@dataclass(frozen=True)
class ImportSettings:
    """What is imported, and how; compression: the path of its config, where that is not beside the files."""

    source: str
    tokenizer: str
    compression: Path | None = None
    min_probability: float = 0.001
    validation_fraction: float = 0.01


def import_logits(out: Path, settings: ImportSettings) -> str:
    """Import a dataset into the folder `out`, and return a summary line.

    Raises ValueError when dataset, compression and tokenizer do not fit together, a file is damaged, or `out` is of
    another import.
    """
    started = time.monotonic()
    for name in ("min_probability", "validation_fraction"):
        value = getattr(settings, name)
        if not 0 < value < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}: give a number between 0 and 1."
            )
    files, find_config = find_files(settings.source)
    if settings.compression is None and find_config is None:
        raise ValueError(
            f"{settings.source} has no {CONFIG_FILE}: give --compression, a YAML file with the compressor's settings, "
            "which the dataset's page or the config of a DistillKit training has."
        )
    config = settings.compression or (find_config() if find_config else Path(CONFIG_FILE))
    compression = read_compression(config)
    require_writable(out)
    with file_lock(out / ".lock", busy=f"another process imports into {out}: waiting for it"):
        remove_stale_temporaries(out)
        tokenizer, identity = _keep_tokenizer(out / "tokenizer", settings.tokenizer, compression)
        source = identify_files(files)
        _require_same(out / "import.json", settings, compression, identity, source=source)
        selector = _choose_selector(files[0], compression, settings, num_tokens=len(tokenizer))
        index, firsts = write_tokens(
            out / "tokens", files, identity, validation_fraction=settings.validation_fraction
        )
        cache = Cache(method="top_p", min_probability=settings.min_probability, temperatures=(1.0,))
        counts = index.read_token_counts()
        codec = build_codec(cache, vocabulary=compression.vocabulary, token_counts=counts)
        assert isinstance(codec, EntropyCodec)
        codec = replace(codec, steps=selector.steps)
        teacher = digest(["imported", source, compression.model_dump(mode="json")])
        header = CacheHeader(teacher, identity.fingerprint, index.record.content, codec)
        job = _Job(out, files, firsts, settings, index, header, selector)
        if not (out / CACHE_FILE).exists():
            job.write_parts()
            merge_parts(index, job.parts, header, out / CACHE_FILE)
        seconds = time.monotonic() - started
        return job.finish(compression, seconds=seconds)


def _keep_tokenizer(
    folder: Path, source: str, compression: Compression
) -> tuple[Any, TokenizerIdentity]:
    """Save the tokenizer in the import's folder, once; return it and its identity.

    Raises ValueError when it has more tokens than the teacher's output layer.
    """
    tokenizer = load_tokenizer(source)
    if not folder.exists():
        tokenizer.save_pretrained(folder)
    identity = identify_tokenizer(str(folder), load_tokenizer(str(folder)))
    if identity.size > compression.vocabulary or len(tokenizer) != identity.size:
        raise ValueError(
            f"the tokenizer {source!r} has {len(tokenizer)} tokens, but the dataset's teacher only "
            f"{compression.vocabulary} ids: it is another one than the dataset was made with (--tokenizer)."
        )
    return tokenizer, identity


def _require_same(
    path: Path,
    settings: ImportSettings,
    compression: Compression,
    identity: TokenizerIdentity,
    *,
    source: str,
) -> None:
    """Write down what is imported. Raises ValueError when the folder has another import."""
    content = {
        "format": "retort-import",
        "files": source,
        "compression": compression.model_dump(mode="json"),
        "tokenizer": identity.fingerprint,
        "min_probability": settings.min_probability,
        "validation_fraction": settings.validation_fraction,
    }
    if not path.exists():
        write_json(path, content)
    found = read_json(path)
    other = [key for key, value in content.items() if found.get(key) != value]
    if other:
        raise ValueError(
            f"{path.parent} is of another import (other {', '.join(other)}): give another --output, or delete it."
        )


def _choose_selector(
    file: SourceFile, compression: Compression, settings: ImportSettings, *, num_tokens: int
) -> Selector:
    """Return what selects a dataset's tokens, by its first rows.

    Raises ValueError when its distributions do not fit its text: seldom have the token that follows.
    """
    rows = next(read_rows(file, compression.columns), None)
    if rows is None or len(rows.offsets) < 2:
        raise ValueError(f"{settings.source}: {file.name} has no rows.")
    num_found = num_looked_for = 0
    values = []
    for row, ids in enumerate(rows.ids):
        first, stop = rows.offsets[row : row + 2].tolist()
        stop = min(stop, first + max(0, len(ids) - 1))
        kept, own = compression.decode({n: c[first:stop] for n, c in rows.columns.items()})
        num_found += int((kept == ids[1 : 1 + len(kept), None]).any(axis=1).sum())
        num_looked_for += len(kept)
        values.append(own)
    if num_found < _LEAST_FOUND * num_looked_for:
        raise ValueError(
            f"{settings.source}: of the first texts' tokens only {num_found / num_looked_for:.0%} are among the "
            f"{compression.k} most probable ones at the position before: the compression's config (its k, exact_k, "
            "dtypes or vocabulary) is another one than the dataset was made with, or the rows are not its format."
        )
    return Selector.choose(
        compression, np.concatenate(values), least=settings.min_probability, num_tokens=num_tokens
    )


@dataclass(frozen=True)
class _Job:
    """An import whose tokens are written. firsts: number of the first document of each file."""

    out: Path
    files: list[SourceFile]
    firsts: list[int]
    settings: ImportSettings
    index: TokenIndex
    header: CacheHeader
    selector: Selector

    @property
    def parts(self) -> Path:
        return self.out / "parts"

    def write_parts(self) -> None:
        """Write every part that has no file yet."""
        missing = {part.name for _, part in find_missing_parts(self.index, self.parts, self.header)}
        measured = {path.stem for path in (self.out / "fidelity").glob("*.json")}
        order = self.header.codec.order_tokens(self.index.read_token_counts())
        for shard, file in enumerate(self.files):
            parts = [part for part in self.index.parts if part.shard == shard]
            if all(part.name in measured - missing for part in parts):
                continue
            started = time.monotonic()
            try:
                texts = self._read_texts(shard, file)
                for part in parts:
                    found = islice(texts, part.sequences)
                    self._write_part(part, found, order, is_missing=part.name in missing)
            except ValueError as error:
                raise ValueError(f"{file.name}: {error}") from None
            tokens = sum(part.tokens for part in parts)
            rate = tokens / (time.monotonic() - started)
            logger.info(f"{file.name}: {tokens:,} tokens, {rate:,.0f} tokens/s")

    def _read_texts(self, shard: int, file: SourceFile) -> Iterator[tuple[Text, Selection]]:
        """Yield the training texts of a file, and what is kept at their counted positions."""
        for rows in read_rows(file, self.selector.compression.columns):
            for text in list_texts(
                rows,
                first_document=self.firsts[shard],
                validation_fraction=self.settings.validation_fraction,
            ):
                first, stop = rows.offsets[text.row : text.row + 2].tolist()
                if stop - first < len(rows.ids[text.row]) - 1:
                    raise ValueError(
                        f"row {rows.first + text.row} has {len(rows.ids[text.row])} tokens, but only {stop - first} "
                        "distributions."
                    )
                if text.is_held_out:
                    continue
                begin = first + text.start
                end = min(begin + len(text.ids), stop)
                mask = text.loss_mask[: end - begin]
                columns = {name: c[begin:end][mask] for name, c in rows.columns.items()}
                yield text, self.selector.select(columns)

    def _write_part(
        self,
        part: Part,
        texts: Iterator[tuple[Text, Selection]],
        order: TokenOrder,
        *,
        is_missing: bool,
    ) -> None:
        """Write a part, unless it exists, and measure it against what was read."""
        table, codec = self.index.read_part(part), self.header.codec
        prepared, measured, num_measured = [], [], 0
        for number, (text, selected) in enumerate(texts):
            row = table[number]
            if not np.array_equal(row.ids, text.ids):
                raise ValueError(
                    "the file has changed since its tokens were read: delete the folder"
                )
            if is_missing:
                prepared.append(codec.prepare(selected, order, next_ids=row.next_ids, key=row.key))
            if num_measured < _MEASURED_POSITIONS:
                measured.append(selected)
                num_measured += len(selected.sizes)
        path = part_path(self.parts, part.name, self.header)
        if is_missing:
            write_part(path, table, prepared, self.header, order)
        sums, written = FidelitySums(), LogitCache(path)
        for number, selected in enumerate(measured):
            sums.add(selected, written.read_targets(number))
        write_json(self.out / "fidelity" / f"{part.name}.json", asdict(sums))

    def finish(self, compression: Compression, *, seconds: float) -> str:
        """Write manifest.json and run.json, and remove the parts; return a summary line."""
        merged = LogitCache(self.out / CACHE_FILE)
        merged.header.require(self.header, source=merged.path)
        sums = [read_json(path) for path in sorted((self.out / "fidelity").glob("*.json"))]
        total = {key: sum(found[key] for found in sums) for key in asdict(FidelitySums())}
        num = int(total.pop("positions"))
        fidelity = (
            Fidelity(positions=num, **{k: max(0.0, v / num) for k, v in total.items()})
            if num
            else None
        )
        imported = Imported(
            kind="distillkit",
            source=self.settings.source,
            files=len(self.files),
            compression=compression.model_dump(mode="json"),
            tail="estimated" if self.selector.is_normalized else "unknown",
        )
        made = describe_run(section={"import": asdict(self.settings)}, seconds=seconds)
        CacheRun(**dict(made), workers=(), kinds=()).write(self.out / RUN_FILE)
        manifest = build_manifest(merged, self.index, fidelity)
        manifest = manifest.model_copy(update={"imported": imported})
        manifest.write(self.out / MANIFEST)
        remove_parts(self.parts)
        line = f"{manifest.positions:,} positions, {manifest.bytes_per_position:.1f} bytes each"
        if fidelity:
            line += f"; KL(dataset || cache) {fidelity.kl:.2e} nats on {num:,} positions"
        return f"{line}; the tail's mass is {imported.tail}"
