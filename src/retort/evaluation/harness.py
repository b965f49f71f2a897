"""Tasks of lm-evaluation-harness, and task files of the user's own, run on a model that is loaded.

The harness is an extra and is imported where it is used. Tasks that run a model's code are refused: it would run them
in this process, with all that this process may do.
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

REQUIREMENT = "lm-eval>=0.4.13"


def require_harness(names: list[str]) -> None:
    """Raise ValueError, with the line that installs it, where lm-evaluation-harness is missing."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"evaluation.benchmarks asks for {', '.join(names)} of lm-evaluation-harness, which is not installed here. "
            f"Type: {sys.executable} -m pip install '{REQUIREMENT}'"
        )


def load_tasks(name: str, *, tasks_dir: str | None) -> Any:
    """Return the harness's tasks and groups of one name, their data read.

    Names of the user's own folder come first. Raises ValueError for a name that nobody knows (with the nearest ones),
    for data that cannot be had, and for a task that runs a model's code.
    """
    require_harness([name])
    manager = _find_manager(name, tasks_dir)
    try:
        loaded = manager.load([name])
    except Exception as error:  # of the task's own code, of datasets, of the network
        raise ValueError(_cannot_load(name, error)) from error
    unsafe = [t for t, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise ValueError(
            f"evaluation.benchmarks asks for {name!r}, but {unsafe[0]} runs the code that a model writes, and "
            f"lm-evaluation-harness does that without a sandbox. Take it out; {HUMANEVAL} is run in one."
        )
    return loaded


def run_tasks(
    name: str, model: PreTrainedModel, tokenizer: Any, *, settings: Evaluation
) -> dict[str, Any]:
    """Return what the harness says of a model: `scores` (a row for each task and metric), `examples`, `versions`."""
    load_tasks(name, tasks_dir=settings.benchmark_tasks_dir)  # refused here, by a sentence
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seed = settings.benchmark_seed
    lm = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, truncation=True
    )
    with _quiet():
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[name],
            task_manager=_find_manager(name, settings.benchmark_tasks_dir),
            limit=settings.benchmark_limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None, name
    counts = found["n-samples"].values()
    return {
        "scores": _read_scores(found),
        "examples": sum(count["effective"] for count in counts),
        "examples_in_all": sum(count["original"] for count in counts),
        "versions": {"lm_eval": metadata.version("lm_eval")} | dict(found["versions"]),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what the harness says on stderr nowhere: its bars belong to no log, nor what git says of this folder."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _read_scores(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each metric of each task; the harness says {"acc,none": 0.5, "acc_stderr,none": ...}."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if not way or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            is_higher_better = found["higher_is_better"].get(task, {}).get(metric)
            rows.append(
                {
                    "task": task,
                    "metric": metric if way == "none" else f"{metric} ({way})",
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "is_less_better": is_higher_better is False,
                }
            )
    return rows


def _find_manager(name: str, tasks_dir: str | None) -> Any:
    """Return an index of tasks that knows a name; of the user's folder alone where that is enough."""
    if tasks_dir is not None:
        own = _index_tasks(tasks_dir, False)
        if name in own.all_subtasks:
            return own
    everything = _index_tasks(tasks_dir, True)
    if name in everything.all_tasks:
        return everything
    near = difflib.get_close_matches(name, [*everything.all_tasks, HUMANEVAL], n=3)
    advice = (
        f"Did you mean {' or '.join(map(repr, near))}?" if near else "lm-eval ls tasks lists them."
    )
    where = f" and in {tasks_dir}" if tasks_dir else ""
    raise ValueError(
        f"evaluation.benchmarks asks for {name!r}, which is none of the {len(everything.all_tasks):,} tasks and groups "
        f"of lm-evaluation-harness {metadata.version('lm_eval')}{where}. {advice}"
    )


@cache
def _index_tasks(tasks_dir: str | None, has_defaults: bool) -> Any:
    """Read the names of all tasks: half a minute for the harness's own."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=tasks_dir, include_defaults=has_defaults)
    except Exception as error:  # a task file that is no YAML, say
        raise ValueError(
            f"evaluation.benchmark_tasks_dir {tasks_dir!r}: lm-evaluation-harness cannot read it. {first_line(error)}"
        ) from error


def _cannot_load(name: str, error: Exception) -> str:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    advice = (
        "HF_HUB_OFFLINE is set, so data that were not fetched before are not there. Type, where there is network: "
        "snakemake --cores 1 check_inputs; or bring a task file with local data (evaluation.benchmark_tasks_dir)"
        if is_offline
        else "its data must be on this machine, or within reach"
    )
    return f"benchmark {name!r} cannot be loaded: {advice}. {type(error).__name__}: {first_line(error)}"
