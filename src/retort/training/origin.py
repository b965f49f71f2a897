"""What a student came from, as its card says it: ids on the Hub, of local models and files their names alone."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from retort.config.dataset import LOADERS, SYNTHESIS
from retort.config.section import Section, changes_id, marks, subsection
from retort.config.sections import Config, Dataset, Student, Teacher
from retort.io.files import is_path


@dataclass(frozen=True)
class Origin:
    """What a student came from.

    base_model, datasets: ids on the Hub; start, learned_from, corpus: the same and what is local, as Markdown.
    license_source: whose licence `license` is, "" if the config names it. is_mixed: it learns from several teachers.
    """

    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    start: str = "random weights"
    learned_from: str = "text alone"
    corpus: str = "local text"
    license: str | None = None
    license_source: str = ""
    is_mixed: bool = False


def describe_origin(config: Config, *, has_teacher: bool) -> Origin:
    """Return where a run's student comes from. `has_teacher`: it learns from one, not from text alone."""
    student, teacher = config.student, config.teacher.model_path
    base = student.model_path or (teacher if student.is_pruned else None)
    sources = config.dataset.sources
    license, source = student.license, ""
    if license is None and base is not None:
        license, source = _read_license(base, student.revision), _link(base)
    return Origin(
        base_model=base if base and not _is_local(base) else None,
        datasets=tuple(dict.fromkeys(s.name for s in sources if _is_published(s))),
        start=_describe_start(student, base),
        learned_from=_describe_teachers(config.teacher) if has_teacher else "text alone",
        corpus=", ".join(dict.fromkeys(map(_describe_corpus, sources)))
        if config.teacher.imported is None
        else "the text of those logits",
        license=license,
        license_source=source if license else "",
        is_mixed=has_teacher and bool(config.teacher.mix),
    )


def describe_section(section: Section) -> dict[str, Any]:
    """Return the settings of a section that change a result, of local files and folders their names alone."""
    return dict(_list_settings(section))


def _list_settings(section: Section) -> Iterator[tuple[str, Any]]:
    kind = type(section)
    for key, value in section.model_dump(mode="json").items():
        known = marks(kind, key)
        if value is None or not changes_id(kind, key):
            continue
        if subsection(kind, key):
            if below := describe_section(getattr(section, key)):
                yield key, below
        elif isinstance(value, str) and (known.get("is_path") or _is_local_model(known, value)):
            yield key, Path(value).name
        else:
            yield key, value


def _is_local_model(known: Mapping[str, Any], value: str) -> bool:
    return bool(known.get("is_model")) and _is_local(value)


def _is_local(name: str) -> bool:
    """Return whether a model is a folder here, the demo's included, and not on the Hub."""
    return name == "demo" or is_path(name) or Path(name).is_dir()


def _is_published(source: Dataset) -> bool:
    return source.name not in (*LOADERS, SYNTHESIS, "demo") and not _is_local(source.name)


def _link(model: str) -> str:
    if _is_local(model):
        return f"`{Path(model).name}` (local)"
    return f"[{model}](https://huggingface.co/{model})"


def _describe_teachers(teacher: Teacher) -> str:
    """Return the teacher; of several each with its weight, and its licence where that is known."""
    if teacher.imported:
        return f"published logits, imported as `{Path(teacher.imported).name}`"
    if not teacher.mix:
        return _link(str(teacher.model_path))
    found = []
    for one, weight in zip(teacher.members, teacher.weights, strict=True):
        license = _read_license(str(one.model_path), one.revision)
        of = f" ({license})" if license else ""
        found.append(f"{weight:.3g} {_link(str(one.model_path))}{of}")
    return "a mixture of " + " and ".join(found)


def _describe_start(student: Student, base: str | None) -> str:
    if base is None:
        config = Path(str(student.config)).name
        return f"random weights, in the shape of `{config}`" if student.config else "random weights"
    sizes = student.from_teacher.sizes
    part = ", ".join(f"{key} {value}" for key, value in sizes.items())
    return f"{part} of {_link(base)}" if part else _link(base)


def _describe_corpus(source: Dataset) -> str:
    if _is_published(source):
        part = f" ({source.config_name})" if source.config_name else ""
        return f"[{source.name}](https://huggingface.co/datasets/{source.name}){part}"
    if source.name == "demo":
        return "documentation of installed Python packages"
    if source.name == SYNTHESIS:
        return "responses that a model wrote"
    files = source.data_files or ()
    names = [Path(path).name for path in ((files,) if isinstance(files, str) else files)]
    return ", ".join(f"`{name}`" for name in names or [Path(source.name).name]) + " (local)"


def _read_license(model: str, revision: str | None) -> str | None:
    """Return the licence in a model's card, where that is in its folder or was downloaded with it.

    None for `other`, whose name and link are needed too.
    """
    path: Any = Path(model) / "README.md"
    if not _is_local(model):
        path = try_to_load_from_cache(model, "README.md", revision=revision)
    with suppress(OSError, ValueError, TypeError):
        found = ModelCard.load(path, ignore_metadata_errors=True).data.license
        return found if isinstance(found, str) and found != "other" else None
    return None
