"""Runs that share an artifact agree on the keys that make it and are not in its id: else the last would decide."""

from collections.abc import Iterable, Iterator
from functools import cache, reduce
from typing import Any

from retort.artifacts.project import Run
from retort.config.schema import KeyPath, dotted, show
from retort.config.section import Section, changes_id
from retort.config.sections import Config, key_paths, section_at


def require_agreement(runs: Iterable[Run]) -> None:
    """Raise ValueError when two runs share an artifact, and give different values to a key that its id leaves out."""
    known: dict[tuple[str, str, KeyPath], tuple[str, Any]] = {}
    for run in runs:
        for what, artifact, sections, config in _list_shared(run):
            for key, value in _list_free_keys(config, sections):
                first, expected = known.setdefault((what, artifact, key), (run.name, value))
                if value != expected:
                    raise ValueError(
                        f"runs {first!r} and {run.name!r} share {what}, but {dotted(key)} is {show(expected)} in "
                        f"{first!r} and {show(value)} in {run.name!r}, and it can be made in one way only. Set "
                        f"{dotted(key)} for all runs alike, outside of runs."
                    )


def _list_shared(run: Run) -> Iterator[tuple[str, str, tuple[str, ...], Config]]:
    """Yield (in words, id, sections that make it, the config of these) of what other runs may share with a run."""
    corpus = run.tokens.corpus
    yield "a corpus", corpus.id, ("dataset",), run.config
    if corpus.synthesis:
        yield (
            "the responses of a synthesis",
            corpus.synthesis.id,
            ("synthesis",) if corpus.synthesis.is_online else ("synthesis", "teacher"),
            run.config,
        )
    for validation in run.validations:
        yield "a teacher's scores", validation.id, ("teacher",), validation.config
    if run.pruned and run.pruned.tokens:
        yield "what students start from", run.pruned.id, ("teacher",), run.config
    for logits in run.logits:
        yield "a logit cache", logits.id, ("teacher", "merge"), logits.config
    for teacher in run.teachers if run.config.evaluation.benchmarks.teacher else ():
        config = run.config.model_copy(update={"teacher": teacher.section})
        yield "a teacher's benchmarks", teacher.id, ("teacher", "evaluation"), config


def _list_free_keys(config: Config, sections: tuple[str, ...]) -> Iterator[tuple[KeyPath, Any]]:
    """Yield (key, value) of the keys in sections of a config that are in no id."""
    for path in _free_keys():
        if path[0] in sections:
            yield path, reduce(getattr, path, config)


@cache
def _free_keys() -> tuple[KeyPath, ...]:
    paths = list(key_paths())
    owners = [section_at(path[:-1]) or Section for path in paths]
    return tuple(p for p, owner in zip(paths, owners, strict=True) if not changes_id(owner, p[-1]))
