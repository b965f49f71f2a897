"""Merge parts into one cache, measure it against the live teacher, and describe it in a manifest.

Legend: P counted positions, K kept tokens, V vocabulary.
"""

import logging
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from retort.cache.codec import Codec, SparseTargets
from retort.cache.kinds import PartKind, UnlikePartsError, count_kinds, describe_count
from retort.cache.merged import merge_parts
from retort.cache.parts import (
    DAMAGED_SUFFIX,
    build_header,
    find_missing_parts,
    is_merged,
    part_files,
    read_kinds,
    remove_parts,
)
from retort.cache.reader import CACHE_FILE, CacheHeader, LogitCache, cache_digest
from retort.config.handoff import Job
from retort.config.sections import Merge
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE, describe_run
from retort.teacher.claims import Claims
from retort.teacher.features import TeacherFeatures, read_features
from retort.teacher.records import (
    CacheRun,
    Fidelity,
    KindCount,
    Manifest,
    WorkerRecord,
    read_batch_tokens,
)
from retort.tokens.index import TokenIndex
from retort.tokens.sequences import concatenate_tables

logger = logging.getLogger(__name__)

# Nats. Storing and scoring in other batches costs below 1e-2 even in bfloat16; distributions of another position or
# another teacher are several nats away.
_MISALIGNED_KL = 0.5
_ORPHAN_POLL_S = 1.0
# Log of the least tail: one that rounds to zero is below 1e-5, but would cost infinitely many nats.
_LEAST_TAIL = -30.0


def merge_h5(
    manifest_path: Path,
    job: Job,
    *,
    index_path: Path,
    fingerprint_path: Path,
    features_path: Path | None,
) -> str:
    """Merge parts/ beside the manifest into teacher_logits.h5, measure it, write manifest.json; return a summary line.

    The parts are removed last, unless the merged cache is virtual; of parts in a store, their receipts. After an
    interruption at any point the same call completes the work: the merged file is written atomically, and parts are
    removed only once it exists. Raises ValueError when parts are missing, damaged or of unlike kinds, when inputs
    belong to another teacher or other tokens, or when the cache is far from the live teacher.
    """
    started = time.monotonic()
    cache, merge = job.config.cache, job.config.merge
    index = TokenIndex.read(index_path)
    header = build_header(
        index, TeacherRecord.read(fingerprint_path), cache, source=fingerprint_path
    )
    folder = manifest_path.parent
    header = replace(
        header,
        batch_tokens=read_batch_tokens(folder, job.config.teacher.generation),
        store=job.config.output.find_store(folder),
    )
    out = folder / CACHE_FILE
    if _is_done(out, header, parts=folder / "parts"):
        paths = part_files(index, folder / "parts", header)
        kinds = count_kinds(read_kinds(paths, most=len(paths)).values())
    else:
        kinds = _merge(index, folder, header, out, merge)
    if len(kinds) > 1:
        named = "; ".join(describe_count(kind, count) for kind, count in kinds.items())
        logger.warning(f"merge.accept_unlike_parts: {out} has parts of unlike kinds ({named})")
    merged = LogitCache(out)
    workers = [WorkerRecord.read(path) for path in sorted(folder.glob("metadata_worker*.json"))]
    manifest = build_manifest(merged, index, read_fidelity(merged, features_path))
    _refuse_misaligned(out, manifest.fidelity)
    made = describe_run(
        section={"cache": cache, "merge": merge},
        seconds=time.monotonic() - started,
    )
    counts = tuple(KindCount(kind=kind, parts=count) for kind, count in kinds.items())
    CacheRun(**dict(made), workers=tuple(workers), kinds=counts).write(folder / RUN_FILE)
    manifest.write(manifest_path)
    if not merged.needs_parts:
        remove_parts(folder / "parts")
    line = f"cache: {manifest.positions:,} positions, {manifest.bytes_per_position:.1f} bytes each"
    found = manifest.fidelity
    if found is None:
        return f"{line}; its fidelity was not measured"
    return (
        f"{line}, tail mass {found.tail_mass:.3f}; KL(live teacher || cache) {found.kl:.2e} "
        f"nats on {found.positions:,} positions"
    )


def _is_done(out: Path, header: CacheHeader, *, parts: Path) -> bool:
    """Say whether the merged cache exists. A damaged one is renamed if its parts still exist, else ValueError."""
    try:
        if not is_merged(out, header):
            return False
        LogitCache(out).verify_parts()
    except ValueError:
        if not any(parts.glob("*.h5")):
            raise
        out.replace(out.with_suffix(DAMAGED_SUFFIX))
        return False
    return True


def _merge(
    index: TokenIndex, folder: Path, header: CacheHeader, out: Path, merge: Merge
) -> Counter[PartKind | None]:
    """Merge the parts, unless another process does so first: an orphan of a killed Snakemake may also be merging.

    If parts are missing or of unlike kinds, the workers' receipts are removed too, so that Snakemake runs the workers
    again. Returns the number of parts of each kind, none where the other process has merged them.
    """
    parts = folder / "parts"
    _await_orphans(index, parts, header)
    accept_unlike = merge.accept_unlike_parts
    try:
        return merge_parts(index, parts, header, out, mode=merge.mode, accept_unlike=accept_unlike)
    except (ValueError, FileNotFoundError) as error:
        if is_merged(out, header):
            return Counter()  # by the other process, which removed the parts
        if isinstance(error, UnlikePartsError) or find_missing_parts(index, parts, header):
            for receipt in folder.glob("metadata_worker*.json"):
                receipt.unlink(missing_ok=True)
        raise


def _await_orphans(index: TokenIndex, parts: Path, header: CacheHeader) -> None:
    """Wait while live workers do parts that are missing.

    Those of this run are done before the merge; workers of a Snakemake that was killed may still be at their last part.
    """
    claims, num_waited_for = Claims(parts), 0
    while at_work := [
        part for _, part in find_missing_parts(index, parts, header) if claims.is_claimed(part.name)
    ]:
        if len(at_work) != num_waited_for:
            num_waited_for = len(at_work)
            logger.info(
                f"waiting for {num_waited_for} parts, which workers of an earlier run are at"
            )
        time.sleep(_ORPHAN_POLL_S)


def _refuse_misaligned(path: Path, found: Fidelity | None) -> None:
    """Raise ValueError when the cache is so far from the teacher that its records must belong elsewhere."""
    if found is not None and not found.kl <= _MISALIGNED_KL:
        raise ValueError(
            f"{path} does not hold this teacher's distributions at these positions: KL(live teacher || cache) is "
            f"{found.kl:.2f} nats on {found.positions:,} positions, expected below "
            f"{_MISALIGNED_KL}. Delete {path.parent} and rerun the same command."
        )


def build_manifest(
    cache: LogitCache, index: TokenIndex, fidelity: Fidelity | None = None
) -> Manifest:
    """Return the manifest, which but for the fidelity depends on the cache's content alone."""
    positions, header = cache.table.num_positions, cache.header.to_json()
    assert positions == index.record.train.positions, (positions, index.record.train)
    codec = header["codec"]
    return Manifest(
        file=cache.path.name,
        mode="stored" if cache.stored else "virtual" if cache.is_virtual else "copy",
        file_bytes=cache.path.stat().st_size,
        sha256=cache_digest(cache),
        sequences=len(cache),
        tokens=len(cache.table.ids),
        positions=positions,
        bytes_per_position=(cache.record_bytes + cache.table_bytes) / max(1, positions),
        method=codec["method"],
        top_k=codec["top_k"],
        min_probability=codec["min_probability"],
        halved_parts=cache.halved_parts,
        header=header,
        fidelity=fidelity,
    )


def read_fidelity(cache: LogitCache, features_path: Path | None) -> Fidelity | None:
    """Return the fidelity (see `measure_fidelity`); None where no position was scored again.

    Raises ValueError when the features are of another teacher or other sequences.
    """
    if features_path is None:
        return None
    teacher = read_features(features_path)
    teacher.require_teacher(cache.header.teacher, source=features_path, made_from=cache.path)
    indices = [i for i in teacher.train_sequences.tolist() if i < len(cache)]
    rows = [cache.table.slice(i, i + 1) for i in indices]
    teacher.require("train", concatenate_tables(rows), source=features_path)
    return measure_fidelity(cache, teacher) if indices else None


@torch.inference_mode()
def measure_fidelity(cache: LogitCache, teacher: TeacherFeatures) -> Fidelity:
    """Return the cache's fidelity at the training positions that the teacher scored again, at least one."""
    num_positions, kl, agree, tail = 0, 0.0, 0, 0.0
    cache.prefetch(teacher.train_sequences.tolist())
    for index in teacher.train_sequences.tolist():
        targets = cache.read_targets(index)
        live_PV = teacher.logprobs("train", slice(num_positions, num_positions + len(targets)))
        num_positions += len(targets)
        ids_PK, logprobs_PK = map(torch.from_numpy, targets.to_rows())
        ids_PK = ids_PK.long()
        best_P1 = logprobs_PK.argmax(dim=-1, keepdim=True)
        kept_PK, tail_P1 = _split(targets, logprobs_PK, cache.header.codec)
        is_kept_PK = kept_PK > -torch.inf
        cached = torch.cat([kept_PK, tail_P1], 1)
        live_PK = live_PV.gather(1, ids_PK).masked_fill(~is_kept_PK, -torch.inf)
        outside_PV = _hide(live_PV, ids_PK, is_kept_PK)
        live = torch.cat([live_PK, outside_PV.logsumexp(dim=-1, keepdim=True)], 1)
        terms = live.exp() * (live - cached)
        kl += float(terms.masked_fill(live == -torch.inf, 0.0).double().sum())
        agree += int((live_PV.argmax(dim=-1, keepdim=True) == ids_PK.gather(1, best_P1)).sum())
        tail += float(cached[:, -1].exp().double().sum())
    assert num_positions == len(teacher.features["train"]), num_positions
    return Fidelity(
        positions=num_positions,
        # Rows rounded to float16 need not sum to one, which can make a KL of zero slightly negative.
        kl=max(0.0, kl / num_positions),
        agreement=agree / num_positions,
        tail_mass=tail / num_positions,
    )


def _hide(live_PV: Tensor, ids_PK: Tensor, is_kept_PK: Tensor) -> Tensor:
    """Return the logprobs [P, V] with those of the kept ids at -inf."""
    hidden_PV = live_PV.clone()
    rows, columns = is_kept_PK.nonzero(as_tuple=True)
    hidden_PV[rows, ids_PK[rows, columns]] = -torch.inf
    return hidden_PV


def _split(targets: SparseTargets, logprobs_PK: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Return logprobs of the exact tokens [P, K] (-inf elsewhere) and of all other mass at temperature 1 [P, 1].

    Sampled tokens estimate the tail, so their mass is part of it.
    """
    tail_P1 = torch.from_numpy(targets.tail_logprobs)[:, [codec.temperatures.index(1.0)]]
    tail_P1 = tail_P1.clamp(min=_LEAST_TAIL)
    if targets.num_exact is None:
        return logprobs_PK, tail_P1
    is_sampled_PK = (
        torch.arange(logprobs_PK.shape[1]) >= torch.from_numpy(targets.num_exact)[:, None]
    )
    sampled_PK = logprobs_PK.masked_fill(~is_sampled_PK, -torch.inf)
    tail_P1 = torch.logaddexp(tail_P1, sampled_PK.logsumexp(dim=-1, keepdim=True))
    return logprobs_PK.masked_fill(is_sampled_PK, -torch.inf), tail_P1
