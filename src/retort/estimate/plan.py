"""The job of `plan`: the size of a cache, before the teacher's pass."""

from pathlib import Path

from retort.cache.cost import CacheCost, estimate_cost
from retort.cache.merged import require_few_parts
from retort.cache.parts import build_header
from retort.config.handoff import Job
from retort.estimate.cache_bytes import sample_features
from retort.io.fingerprints import TeacherRecord
from retort.tokens.index import TokenIndex


def plan_cache(
    folder: Path,
    job: Job,
    *,
    index_path: Path,
    fingerprint_path: Path,
    features_path: Path | None,
) -> CacheCost:
    """Return the size of the cache that will be in `folder`.

    features_path: the teacher's held-out scores, from whose training positions the bytes are measured. Raises
    ValueError when the disk has too little space, a virtual cache has too many parts, or the inputs are of another
    teacher or other tokens.
    """
    index, teacher = TokenIndex.read(index_path), TeacherRecord.read(fingerprint_path)
    codec = build_header(index, teacher, job.config.cache, source=fingerprint_path).codec
    is_stored = job.config.output.store is not None
    if job.config.merge.mode == "virtual" and not is_stored:
        require_few_parts(len(index.parts))
    sample = None
    if features_path:
        sample = sample_features(features_path, index, codec, weights=teacher.weights)
    return estimate_cost(
        index.record,
        job.config.cache,
        job.config.merge,
        vocabulary=teacher.vocabulary,
        folder=folder.resolve(),
        sample=sample,
        is_stored=is_stored,
    )
