"""A teacher's pass over the text, and the cache that comes of it."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retort.artifacts.project import Logits
from retort.cache.cost import CacheCost, Sizes, count_copies, size_cache
from retort.cache.methods import build_codec
from retort.estimate.apart import call_apart
from retort.estimate.calibrate import TeacherSample, sample_teacher
from retort.estimate.memory import Load, estimate_teacher_memory, find_smallest_group
from retort.estimate.options import Options
from retort.estimate.records import CacheEstimate, TeacherEstimate, TextEstimate
from retort.estimate.sizes import ModelSize
from retort.estimate.text import Text
from retort.io.fingerprints import list_weights

_SAMPLED_BYTES = 4e9  # of a teacher that is loaded on a CPU to sample it


@dataclass(frozen=True)
class TeacherWork:
    """The estimates of one pass, and what they were made from."""

    teacher: TeacherEstimate
    cache: CacheEstimate
    cost: CacheCost
    load: Load
    copies: int  # of the records on the disk while parts are merged


def choose_dtype(dtype: str, options: Options) -> str:
    """Return the data type that a teacher is loaded in."""
    return dtype if dtype != "auto" else "bfloat16" if options.gpu else "float32"


def find_load(text: Text, batch_size: int, batch_tokens: object) -> Load:
    """Return what a forward pass reads at most: batch_size of the longest sequences, or so many tokens."""
    longest = text.estimate.longest
    if isinstance(batch_tokens, int):
        batch_size = max(1, batch_tokens // longest)
    share = text.estimate.positions / max(1, text.estimate.tokens)
    return Load(batch_size, longest, round(batch_size * longest * share))


def estimate_teacher(
    logits: Logits, size: ModelSize, text: Text, options: Options, *, num_tokens: int, peak: float
) -> TeacherWork:
    """Return what one pass of a teacher takes, and its cache.

    num_tokens: size of the tokenizer; peak: operations a second of a device.

    The distributions of a small teacher here are sampled, if that is allowed; its speed too, on the device at hand.
    Raises ValueError where the teacher cannot be loaded.
    """
    config, found = logits.config, text.estimate
    dtype = choose_dtype(config.teacher.dtype, options)
    load = find_load(
        text, config.teacher.generation.batch_size, config.teacher.generation.batch_tokens
    )
    memory = estimate_teacher_memory(size, config, load, dtype=dtype, device=options.device)
    sample = _sample(logits, size, text, options, num_tokens=num_tokens)
    context = float((text.lengths.astype(float) ** 2).sum() / text.lengths.sum())
    operations = found.tokens * size.forward_operations(context)
    operations += found.positions * size.head_operations
    smallest = find_smallest_group(memory, size, options.usable) if options.gpu else None
    group = max(smallest or 1, config.teacher.generation.gpus_per_model if options.gpu else 1)
    copies = config.teacher.generation.num_workers or max(1, options.num_devices // group)
    if options.gpu and options.is_counted:
        copies = max(1, min(copies, options.num_devices // group))
    hours = operations / (peak * options.forward_share * group) / 3600 / copies
    if sample:
        seconds = found.tokens * sample.seconds / sample.tokens
        hours = (seconds / copies + sample.start_seconds) / 3600
    codec = build_codec(config.cache, vocabulary=size.vocabulary)
    documents = found.documents or found.sequences
    parts = math.ceil(documents / config.dataset.streaming_chunk_size) + config.dataset.num_shards
    sizes = Sizes(found.positions, found.tokens, found.sequences, parts)
    copies_on_disk = count_copies(config.merge, is_stored=config.output.store is not None)
    cost = size_cache(
        sizes,
        codec,
        copies_on_disk,
        folder=logits.folder,
        sample=sample.bytes if sample else None,
    )
    minutes = options.slots.get("generate_logits")
    teacher = TeacherEstimate(
        id=logits.id,
        name=str(config.teacher.model_path),
        parameters=size.parameters,
        active_parameters=size.active + size.head,
        dtype=dtype,
        memory=memory,
        measured_memory=_measure_memory(sample, found, parts, options) if sample else None,
        gpus_per_model=config.teacher.generation.gpus_per_model,
        smallest_group=smallest,
        copies=copies,
        operations=operations,
        hours=hours,
        device_hours=hours * copies * group,
        is_timed=sample is not None,
        slots=math.ceil(hours * 60 / minutes) if minutes else 1,
    )
    return TeacherWork(teacher, describe_cache(logits, cost), cost, load, copies_on_disk)


def _measure_memory(sample: TeacherSample, text: TextEstimate, parts: int, options: Options) -> int:
    """Return the most bytes of a worker: those of the sample, and what it holds of whole parts (not on a GPU).

    Of two parts: one is written while the next is scored.
    """
    if options.gpu:
        return sample.peak_memory
    return round(sample.peak_memory + 2 * sample.held * text.positions / max(1, parts))


def describe_cache(logits: Logits, cost: CacheCost) -> CacheEstimate:
    """Return a cost as it is shown."""
    cache = logits.config.cache
    parameter = {
        "top_k": cache.top_k,
        "top_p": cache.min_probability or 0.001,
        "sampled": cache.head_probability or 0.05,
    }[cache.method]
    return CacheEstimate(
        id=logits.id,
        method=f"{cache.method} {parameter}",
        bytes_per_position=round(cost.record_bytes / max(1, cost.positions), 2),
        relative_error=cost.relative_error,
        basis=cost.basis,
        record_bytes=cost.record_bytes,
        disk_bytes=cost.total_bytes,
        free_bytes=cost.disk_free_bytes,
    )


def _sample(
    logits: Logits, size: ModelSize, text: Text, options: Options, *, num_tokens: int
) -> TeacherSample | None:
    """Return what a teacher did with some of the text here; None where it is not run."""
    path = Path(logits.teacher.model_path)
    is_small = size.weight_bytes("float32") <= _SAMPLED_BYTES
    if not (options.may_run and is_small and len(text.table) and _has_weights(path)):
        return None
    codec = build_codec(
        logits.config.cache,
        vocabulary=size.vocabulary,
        token_counts=np.bincount(text.table.ids, minlength=size.vocabulary)[: size.vocabulary],
    )
    return call_apart(
        sample_teacher, str(path), logits.config, text.table, codec, num_tokens=num_tokens
    )


def _has_weights(path: Path) -> bool:
    """Say whether a folder holds a model's weights. A model of the Hub is not loaded for an estimate."""
    return path.is_dir() and any(file.name != "config.json" for file in list_weights(path))
