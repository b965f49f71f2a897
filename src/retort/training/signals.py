"""What a student learns from: the files that it is given, as caches or as records of teachers.

Of several teachers (`teacher.mix`) there is one of each, in the order of the config, the main one first.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir

from pydantic import JsonValue

from retort.cache.local_copy import copy_cache, keep_blocks
from retort.cache.mixed import CacheMix
from retort.cache.reader import CACHE_FILE, LogitCache
from retort.config.handoff import Job
from retort.config.sections import Teacher, Training
from retort.io.fingerprints import TeacherRecord
from retort.io.run_record import RUN_FILE
from retort.models.causal_lm import CausalLM
from retort.models.load import name_dtype
from retort.teacher.features import name_mixture
from retort.teacher.records import CacheRun
from retort.tokens.index import TokenIndex
from retort.training.batches import TrainingSource
from retort.training.record import digest_caches

# A cache, or a teacher's fingerprint.json.
Signal = LogitCache | TeacherRecord


def open_signal(path: Path) -> Signal:
    """Return the cache at or beside a path, or the record of a teacher.

    Raises ValueError when the cache is missing.
    """
    if path.name == "fingerprint.json":
        return TeacherRecord.read(path)
    cache_path = path.with_name(CACHE_FILE) if path.suffix == ".json" else path
    if not cache_path.exists():
        raise ValueError(
            f"{cache_path} does not exist. In a workflow its manifest.json, which remains, counts as the finished "
            "cache: delete the manifest too and rerun the same command to make the cache again."
        )
    return LogitCache(cache_path)


def copy_signal(stack: ExitStack, signal: Signal, training: Training) -> Signal:
    """Return a cache as this machine's copy, if the config asks for one; of one in a store, what is kept of it here."""
    if isinstance(signal, LogitCache) and signal.stored:
        folder, most_bytes = training.cache_copy or gettempdir(), int(training.cache_copy_gb * 1e9)
        return stack.enter_context(keep_blocks(signal, folder, most_bytes=most_bytes))
    if isinstance(signal, LogitCache) and training.cache_copy:
        return stack.enter_context(copy_cache(signal, training.cache_copy))
    return signal


def require_mixable(job: Job, signals: list[Signal], paths: Sequence[Path]) -> None:
    """Raise ValueError unless there is what each teacher of the config said, all of them caches if they are several."""
    mix = job.config.teacher.mix
    if (len(paths) > 1 and len(paths) != len(mix)) or (mix and len(paths) < len(mix)):
        names = ", ".join(str(one.model_path) for one in mix) or str(job.config.teacher.model_path)
        raise ValueError(
            f"the student learns from {max(1, len(mix))} teachers ({names}), but --signal names {len(paths)} files. "
            "Give the manifest.json of the cache of each, in this order."
        )
    for path, signal in zip(paths, signals, strict=True):
        if len(paths) > 1 and not isinstance(signal, LogitCache):
            raise ValueError(
                f"{path} is of a live teacher, but several teachers (teacher.mix) are mixed from their caches only. "
                "Give the manifest.json of its cache."
            )
    made_by = [_read_maker(path) for path in paths] if len(paths) > 1 else []
    expected = [one.model_path for one in mix]
    for path, name, wanted in zip(paths, made_by, expected, strict=False):
        if name != wanted and name in expected:
            raise ValueError(
                f"{path} is the cache of teacher {name!r}, where that of {wanted!r} is expected, whose weight it would "
                f"get. Give --signal in the order of teacher.mix: {', '.join(map(str, expected))}."
            )


def _read_maker(signal_path: Path) -> str | None:
    """Return the path or Hub id of the teacher that made a cache, None where its run.json does not say it."""
    name = (_read_makers_settings(signal_path) or {}).get("model_path")
    return None if name is None else str(name)


def pair_features(
    job: Job, paths: Sequence[Path], weights: Sequence[str | None]
) -> dict[Path, str | None]:
    """Return held-out scores with the fingerprint of their teacher. Raises ValueError unless there is one of each."""
    count = len(job.config.teacher.members)
    if paths and count == 1 and not weights:
        weights = [None]
    if paths and not len(paths) == len(weights) == count:
        raise ValueError(
            f"--features names {len(paths)} files and --signal {len(weights)}, but there are {count} teachers "
            "(teacher.mix): give one of each, in their order."
        )
    return dict(zip(paths, weights, strict=True)) if paths else {}


def find_width(signals: Sequence[Signal]) -> int:
    """Return the width of the main teacher's output layer, 0 without a teacher."""
    main = signals[0] if signals else None
    if isinstance(main, LogitCache):
        return main.header.codec.vocabulary
    return main.vocabulary if main else 0


def read_weights(signal: Signal) -> str:
    """Return the fingerprint of a teacher's weights."""
    return signal.header.teacher if isinstance(signal, LogitCache) else signal.weights


def name_weights(signals: Sequence[Signal], weights: tuple[float, ...]) -> str | None:
    """Return the fingerprint of the teacher's weights, or of all teachers'; None without one."""
    if not signals:
        return None
    shares = weights if len(weights) == len(signals) else (1.0,) * len(signals)
    return name_mixture([read_weights(signal) for signal in signals], shares)


def digest_signals(signals: Sequence[Signal], weights: tuple[float, ...]) -> str | None:
    headers = [s.header.to_json() for s in signals if isinstance(s, LogitCache)]
    return digest_caches(headers, weights) if headers else None


def describe_sources(
    index: TokenIndex, signals: Sequence[Signal], weights: tuple[float, ...]
) -> dict[str, str]:
    """Return what a student is trained on, by name. The identity of its checkpoints is a digest of this too."""
    facts = {"tokens": index.record.content}
    if name := name_weights(signals, weights):
        facts |= {"teacher's weights": name}
    if cache := digest_signals(signals, weights):
        methods = [s.header.codec.method for s in signals if isinstance(s, LogitCache)]
        facts |= {"logit cache": cache, "cache's method": " and ".join(dict.fromkeys(methods))}
    return facts


def describe_teachers(
    job: Job, signal_paths: Sequence[Path], teacher: CausalLM | None
) -> dict[str, JsonValue]:
    """Return the settings of the main teacher; of several, those of all with their weights in `mix`."""
    members = job.config.teacher.members
    found = [
        _describe_teacher(member, path, teacher)
        for member, path in zip(members, signal_paths, strict=False)
    ]
    if len(found) == 1:
        return found[0]
    pairs = zip(found, job.config.teacher.weights, strict=True)
    return found[0] | {"mix": [settings | {"weight": weight} for settings, weight in pairs]}


def _describe_teacher(
    section: Teacher, signal_path: Path, teacher: CausalLM | None
) -> dict[str, JsonValue]:
    """Return the settings of the live teacher, or of the one that made a cache, with the dtype that it had."""
    settings: dict[str, JsonValue] = section.model_dump(mode="json")
    dtype: JsonValue = name_dtype(teacher.model.dtype) if teacher else None
    if own := _read_makers_settings(signal_path):
        settings = own
    settings = {k: v for k, v in settings.items() if k not in ("generation", "mix")}
    return settings | {"dtype": dtype or settings["dtype"]}


def _read_makers_settings(signal_path: Path) -> dict[str, JsonValue] | None:
    """Return the settings of the teacher that made a cache, with the dtype that it had; None where they are unknown."""
    made_path, found = signal_path.with_name(RUN_FILE), None
    if signal_path.name == "manifest.json" and made_path.exists():
        for made in (worker.made for worker in CacheRun.read(made_path).workers):
            if made.dtype and isinstance(own := made.config.get("teacher"), dict):
                found = own | {"dtype": made.dtype}
    return found


def choose_source(
    index: TokenIndex, signals: Sequence[Signal], weights: tuple[float, ...]
) -> TrainingSource:
    """Return the cache if that is the signal, or several as one, else the training split.

    Raises ValueError for a cache of other tokens.
    """
    caches = [signal for signal in signals if isinstance(signal, LogitCache)]
    if not caches:
        return index.read_split("train")
    for cache in caches:
        if cache.header.tokens != index.record.content:
            raise ValueError(
                f"{cache.path} holds distributions for other tokens (content {cache.header.tokens}) than {index.path} "
                f"lists ({index.record.content}). Give the cache that was made from this index."
            )
    return caches[0] if len(caches) == 1 else CacheMix(tuple(caches), weights)
