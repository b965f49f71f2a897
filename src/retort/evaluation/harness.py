"""Tasks of lm-evaluation-harness, and task files of the user's, run on a loaded model.

The harness is an optional dependency and is imported where it is used. Tasks that run a model's code are refused: the
harness would run it in this process, with all of its rights.
"""

import difflib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from retort.cli import first_line
from retort.config.sections import HUMANEVAL, Evaluation
from retort.evaluation.records import Score, TaskResult

REQUIREMENT = "lm-eval>=0.4.13"


def require_harness(names: list[str]) -> None:
    """Raise ValueError, with the command that installs it, when lm-evaluation-harness is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"evaluation.benchmarks.tasks asks for {', '.join(names)} of lm-evaluation-harness, which is not installed "
            "here. "
            f"Run: {sys.executable} -m pip install '{REQUIREMENT}'"
        )


def load_tasks(name: str, *, tasks_dir: str | None) -> Any:
    """Return the harness's dictionary of tasks and groups for one name, with their data loaded.

    Tasks in `tasks_dir`, the user's folder, take precedence.
    Raises ValueError for an unknown name (with the nearest ones), for data that cannot be loaded, and for a task that
    runs a model's code.
    """
    require_harness([name])
    manager = _find_manager(name, tasks_dir)
    try:
        loaded = manager.load([name])
    except Exception as error:  # from the task's own code, datasets or the network
        raise ValueError(_cannot_load(name, error)) from error
    unsafe = [t for t, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise ValueError(
            f"evaluation.benchmarks.tasks asks for {name!r}, but {unsafe[0]} runs the code that a model writes, and "
            f"lm-evaluation-harness does that without a sandbox. Remove it, or use {HUMANEVAL}, which runs in one."
        )
    return loaded


def run_harness_task(
    name: str, model: PreTrainedModel, tokenizer: Any, *, settings: Evaluation
) -> TaskResult:
    """Return the scores of a task, or of the subtasks of a group, one for each metric.

    Raises ValueError as `load_tasks` does.
    """
    load_tasks(name, tasks_dir=settings.benchmarks.tasks_dir)  # for its clear errors
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seed = settings.benchmarks.seed
    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, truncation=True
    )
    with _quiet():
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[name],
            task_manager=_find_manager(name, settings.benchmarks.tasks_dir),
            limit=settings.benchmarks.limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None, name
    counts = found["n-samples"].values()
    versions = {task: str(version) for task, version in found["versions"].items()}
    return TaskResult(
        scores=tuple(_read_scores(found)),
        examples=sum(count["effective"] for count in counts),
        examples_in_all=sum(count["original"] for count in counts),
        versions={"lm_eval": metadata.version("lm_eval")} | versions,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard stderr: the harness writes progress bars and git's warnings about the current folder there."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def _read_scores(found: dict[str, Any]) -> Iterator[Score]:
    """Yield each metric of each task; the harness's keys are "acc,none", "acc_stderr,none", ..."""
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            is_higher_better = found["higher_is_better"].get(task, {}).get(metric)
            yield Score(
                task=task,
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                is_less_better=is_higher_better is False,
            )


def _find_manager(name: str, tasks_dir: str | None) -> Any:
    """Return the harness's TaskManager that has a task: of the user's folder alone if it does, because that is fast."""
    if tasks_dir is not None:
        own = _index_tasks(tasks_dir, False)
        if name in own.all_subtasks:
            return own
    manager = _index_tasks(tasks_dir, True)
    if name in manager.all_tasks:
        return manager
    near = difflib.get_close_matches(name, [*manager.all_tasks, HUMANEVAL], n=3)
    advice = (
        f"Did you mean {' or '.join(map(repr, near))}?"
        if near
        else "List them with: lm-eval ls tasks."
    )
    where = f" and in {tasks_dir}" if tasks_dir else ""
    raise ValueError(
        f"evaluation.benchmarks.tasks asks for {name!r}, which is none of the {len(manager.all_tasks):,} tasks and "
        "groups "
        f"of lm-evaluation-harness {metadata.version('lm_eval')}{where}. {advice}"
    )


@cache
def _index_tasks(tasks_dir: str | None, has_defaults: bool) -> Any:
    """Return a TaskManager; reading the names of the harness's own tasks takes half a minute."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=tasks_dir, include_defaults=has_defaults)
    except Exception as error:  # a task file that is not YAML, for example
        raise ValueError(
            f"evaluation.benchmarks.tasks_dir {tasks_dir!r}: lm-evaluation-harness cannot read it. {first_line(error)}"
        ) from error


def _cannot_load(name: str, error: Exception) -> str:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    advice = (
        "HF_HUB_OFFLINE is set and its data are not in the local cache. With network access, run: "
        "snakemake --cores 1 check_inputs; or use a task file with local data (evaluation.benchmarks.tasks_dir)"
        if is_offline
        else "its data must be on this machine or downloadable from here"
    )
    return f"benchmark {name!r} cannot be loaded: {advice}. {type(error).__name__}: {first_line(error)}"
