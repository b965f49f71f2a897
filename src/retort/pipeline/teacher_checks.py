"""Cheap checks of teachers before any expensive job: they load, are causal, and have the text's tokenizer."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retort.cache.reader import CACHE_FILE, LogitCache
from retort.config.sections import Config, Teacher
from retort.io.fingerprints import TeacherRecord, fingerprint_tokenizer, fingerprint_weights
from retort.models.load import load_model_config, output_width, refuse_short_context
from retort.pipeline.demo_teacher import DEMO_TEACHER, DemoTokenizer
from retort.pipeline.mistakes import Mistakes
from retort.pipeline.packages import find_missing_packages
from retort.tokens.tokenizer import identify_tokenizer, load_tokenizer
from retort.tokens.vocabularies import require_teacher_ids


def check_teacher(config: Config, mistakes: Mistakes) -> tuple[Any, int, str]:
    """Return the text's tokenizer, the width of the teacher's output layer (or number of tokens), and a note.

    What is missing to load it is added to `mistakes`.
    """
    section, dataset = config.teacher, config.dataset
    if section.model_path == "demo":
        return DemoTokenizer(), DEMO_TEACHER.vocabulary, "teacher: the demo's own, trained first"
    if section.imported:
        width = LogitCache(Path(section.imported) / CACHE_FILE).header.codec.vocabulary
        note = f"teacher: imported from {section.imported}, {width:,} ids"
        return load_tokenizer(str(dataset.tokenizer)), width, note
    if section.model_path is None:
        tokenizer = load_tokenizer(str(dataset.tokenizer))
        return tokenizer, len(tokenizer), f"no teacher; tokenizer of {len(tokenizer):,} tokens"
    model = _read_teachers_config(section, mistakes)
    tokenizer = load_tokenizer(
        dataset.tokenizer or section.model_path,
        revision=section.revision if dataset.tokenizer is None else None,
        trust_remote_code=section.trust_remote_code,
    )
    width = output_width(model)
    if config.training.distillation_type != "output":
        _check_teachers_tokenizer(config, tokenizer, width)
    refuse_short_context(
        model, dataset.max_length, f"teacher {section.model_path!r}", what="dataset.max_length"
    )
    beyond = (
        f" ({width - len(tokenizer)} ids beyond its tokenizer get probability zero)"
        if width > len(tokenizer)
        else ""
    )
    return (
        tokenizer,
        max(width, len(tokenizer)),
        f"teacher: {section.model_path}, {model.model_type}, {width:,} ids{beyond}",
    )


def check_other_teachers(config: Config, tokenizer: Any, mistakes: Mistakes) -> list[str]:
    """Return notes about the teachers of a mixture but the main one; `tokenizer`: the text's.

    What is wrong with each is added to `mistakes`.
    """
    source = config.dataset.tokenizer or config.teacher.model_path
    notes = []
    for section in config.teacher.members[1:]:
        path = str(section.model_path)
        with mistakes:
            model = _read_teachers_config(section, mistakes)
            refuse_short_context(
                model, config.dataset.max_length, f"teacher {path!r}", what="dataset.max_length"
            )
            width = output_width(model)
            notes.append(f"teacher: {path} too, {model.model_type}, {width:,} ids")
            if config.training.distillation_type != "output":
                whole = config.dataset.model_copy(update={"tokenizer": source})
                alone = config.model_copy(update={"teacher": section, "dataset": whole})
                _check_teachers_tokenizer(alone, tokenizer, width, is_mixed=True)
    return notes


def find_same_teachers(config: Config) -> list[str]:
    """Return a note for each teacher with results whose files are those of a local teacher at another path."""
    path = Path(config.teacher.model_path or "")
    if config.teacher.model_path in (None, "demo") or not path.is_dir():
        return []
    mine = (fingerprint_weights(path), fingerprint_tokenizer(path))
    root = Path(config.output.cache_folder)
    records = []
    for found in sorted(root.glob("teachers/*/fingerprint.json")):
        with suppress(ValueError):  # another teacher's, of an older version
            records.append(TeacherRecord.read(found))
    names = [r.name for r in records if (r.weights, r.tokenizer.fingerprint) == mine]
    return [
        f"teacher: {path} has the weights and the tokenizer of {name}, which has results in {root}. The path is part "
        f"of an id, so tokens and cache are made again for {path}. Set teacher.model_path: {name} to use its own."
        for name in dict.fromkeys(names)
        if name != str(path)
    ]


def _check_teachers_tokenizer(
    config: Config, tokenizer: Any, width: int, *, is_mixed: bool = False
) -> None:
    """Raise ValueError when the teacher's ids, or with a cache its tokenizer files, are not those of `tokenizer`.

    is_mixed: it is one of several teachers, and not the main one.
    """
    section, path = config.teacher, str(config.teacher.model_path)
    source = config.dataset.tokenizer or path
    teachers = tokenizer
    if config.dataset.tokenizer is not None:
        teachers = load_tokenizer(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    require_teacher_ids(tokenizer, teachers, width=width, source=source, teacher=path)
    # A cache records the fingerprint of all tokenizer files, templates included, and only that one is accepted.
    mine, theirs = (
        identify_tokenizer(source, tokenizer),
        identify_tokenizer(path, teachers),
    )
    if not config.training.use_cached_logits or mine == theirs:
        return
    differ = (
        f"gives the ids of the teacher {path!r}, but its files differ (fingerprint {mine.fingerprint}, not "
        f"{theirs.fingerprint}), and a cache is made with the teacher's own."
    )
    if is_mixed:
        raise ValueError(
            f"the text's tokenizer {source!r} {differ} Copy the tokenizer's files of one teacher to the other's "
            "folder, or leave it out of teacher.mix."
        )
    raise ValueError(
        f"dataset.tokenizer {source!r} {differ} Leave dataset.tokenizer out, or set training.use_cached_logits: false."
    )


def _read_teachers_config(section: Teacher, mistakes: Mistakes) -> PretrainedConfig:
    """Return the config of a teacher that can be loaded; packages that it lacks are added to `mistakes`."""
    path = str(section.model_path)
    model = load_model_config(path, **section.source)
    if Path(path).is_dir():
        fingerprint_weights(Path(path))
    check_causal(model, section)
    mistakes.found |= dict.fromkeys(find_missing_packages(model, section))
    return model


def check_causal(model: PretrainedConfig, section: Teacher) -> None:
    """Raise ValueError for a model that is not a causal LM, or was saved with another head (as a masked LM, say)."""
    architectures = model.architectures or []
    has_class = type(model) in AutoModelForCausalLM._model_mapping
    has_head = not architectures or any(name in _causal_classes() for name in architectures)
    if not (has_class and has_head) and not section.trust_remote_code:
        raise ValueError(
            f"teacher.model_path {section.model_path!r} is a {model.model_type!r} model "
            f"({', '.join(architectures) or 'no architectures given'}), which is not a causal language model: it has "
            "no distribution of the next token. Choose one that AutoModelForCausalLM loads."
        )


def _causal_classes() -> set[str]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return {name for value in names for name in ([value] if isinstance(value, str) else value)}
