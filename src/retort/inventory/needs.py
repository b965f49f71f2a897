"""What configs need: the places of all artifacts that they make, the same in every folder of results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retort.artifacts.build import build_project
from retort.artifacts.project import Logits, Project, Pruned, Run, TeacherModel, Tokens, Validation
from retort.artifacts.responses import Responses
from retort.config.config_files import load_source, locate, read_files
from retort.config.sections import Config
from retort.corpus.reading import list_corpus_files
from retort.inventory.origins import Keys, config_keys


@dataclass(frozen=True)
class Needs:
    """What one config needs.

    name: of its file. roots: its folders of results and caches. places: of its artifacts, with the runs that need each.
    keys: of each run. paths: the local files and folders that its keys name, without their own results.
    """

    name: str
    roots: tuple[Path, ...]
    places: dict[str, list[str]] = field(default_factory=dict)
    keys: dict[str, Keys] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()


def read_needs(paths: Sequence[Path]) -> list[Needs]:
    """Return what each config needs. Raises ValueError for one that is missing or wrong, naming it."""
    return [_read_needs(path) for path in paths]


def read_project(path: Path) -> tuple[dict[str, Config], Project]:
    """Return the runs' configs, and all artifacts, of a config file. Raises ValueError when it is missing or wrong."""
    if not path.is_file():
        raise ValueError(f"The config {str(path)!r} does not exist (looked in {Path.cwd()}).")
    source = read_files([path.absolute()], {})
    if source is None:
        from retort.pipeline.run_command import fill_in  # loads Snakemake

        source = fill_in([path.absolute()], {})
    configs = load_source(source)
    try:
        return configs, build_project(configs)
    except ValueError as error:
        raise ValueError(f"{path}: {locate(error, source)}") from None


def _read_needs(path: Path) -> Needs:
    configs, project = read_project(path)
    outputs = [config.output for config in configs.values()]
    folders = [o.results_dir for o in outputs] + [o.cache_folder for o in outputs]
    roots = tuple(dict.fromkeys(Path(folder) for folder in folders))
    needs = Needs(
        path.name,
        roots,
        keys={name: config_keys(config) for name, config in configs.items()},
        paths=tuple(_list_paths(configs)),
    )
    for folder, run in _list_folders(project, roots[0]):
        inside = [
            root
            for root in sorted(roots, key=lambda r: -len(r.parts))
            if folder.is_relative_to(root)
        ]
        if not inside:  # a folder of the user's, such as imported logits
            continue
        root = inside[0]
        runs = needs.places.setdefault(folder.relative_to(root).as_posix(), [])
        if run and run not in runs:
            runs.append(run)
    return needs


def _list_folders(project: Project, results: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield (folder, name of the run that needs it, None for all) of every artifact of a project."""
    for run in project.runs.values():
        yield from ((folder, run.name) for folder in _list_run_folders(run))
    yield from ((task.path.parent, None) for task in project.tasks.values())
    yield results / "checks" / project.check_id, None
    yield results / "reports" / project.report_id, None


def _list_run_folders(run: Run) -> Iterator[Path]:
    found: list[Tokens | TeacherModel | Logits | Validation | Pruned | None]
    found = [run.tokens, run.tokens.teacher, run.pruned]
    found += [*run.teachers, *run.logits, *run.validations]
    yield from (one.folder for one in found if one)
    teachers = [one for one in (*run.teachers, run.tokens.teacher) if one]
    for corpus in [run.tokens.corpus, *(one.corpus for one in teachers if one.corpus)]:
        if corpus.needs_snapshot or corpus.synthesis:
            yield corpus.folder
        if isinstance(corpus.synthesis, Responses):
            yield corpus.synthesis.folder.parent  # the journal
    yield run.folder
    yield run.metrics_path.parent


def _list_paths(configs: dict[str, Config]) -> Iterator[Path]:
    """Yield the files and folders that configs name: one may lie in the results of another config."""
    for config in configs.values():
        kept = config.model_copy(update={"output": type(config.output)()})
        texts = _list_texts(kept.model_dump(mode="json"))
        yield from (Path(text) for text in texts if _exists(text))
        yield from list_corpus_files(config.dataset) if config.dataset.name != "synthesis" else ()


def _list_texts(value: Any) -> Iterator[str]:
    """Yield all texts in nested sections and lists of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _list_texts(below)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # too long for a path
        return False
