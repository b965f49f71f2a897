"""A benchmark task run on a student or a teacher: benchmark.json and, for HumanEval, attempts.jsonl beside it.

A task is an entry of `evaluation.benchmarks.tasks`: a task or group of lm-evaluation-harness, or `humaneval`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from retort.cluster.gpus import count_threads
from retort.config.handoff import Job
from retort.config.load import identity
from retort.config.sections import HUMANEVAL, Evaluation
from retort.evaluation.harness import load_tasks, require_harness, run_harness_task
from retort.evaluation.humaneval import (
    STOPS,
    Attempt,
    attempt_problems,
    read_problems,
    score_attempts,
)
from retort.evaluation.inputs import read_trained_student
from retort.evaluation.records import BenchmarkRecord, TaskResult
from retort.evaluation.sandbox import require_sandbox
from retort.io.files import read_json, write_atomically
from retort.io.run_record import describe_run
from retort.models.generate import Sampling, complete_prompts
from retort.models.load import (
    choose_device,
    describe_device,
    load_pretrained,
    load_recorded_teacher,
    name_dtype,
)
from retort.tokens.tokenizer import load_tokenizer

ATTEMPTS_FILE = "attempts.jsonl"


def check_tasks(evaluation: Evaluation) -> list[str]:
    """Check the requirements of every task and fetch its data; return a note with its size for each task.

    Raises ValueError when the harness, a task, its data, the HumanEval problems or the sandbox are missing.
    """
    names = [name for name in evaluation.benchmarks.tasks if name != HUMANEVAL]
    if names:
        require_harness(names)
    notes = []
    if HUMANEVAL in evaluation.benchmarks.tasks:
        require_sandbox()
        problems = read_problems(Path(str(evaluation.humaneval.file)))
        notes.append(f"benchmark {HUMANEVAL}: {len(problems):,} problems")
    for name in names:
        tasks = load_tasks(name, tasks_dir=evaluation.benchmarks.tasks_dir)["tasks"].values()
        examples = sum(len(task.eval_docs) for task in tasks)
        notes.append(f"benchmark {name}: {examples:,} examples")
    return notes


def run_task_on_student(out: Path, job: Job, *, name: str, record_path: Path) -> str:
    """Run a task on the student in final/ beside training.json, write benchmark.json, return a one-line summary.

    Raises ValueError when final/ is not the student that training.json describes.
    """
    training = job.config.training
    torch.set_num_threads(count_threads(training))
    folder, record = read_trained_student(record_path)
    device = choose_device(training.device)
    model = load_pretrained(str(folder), dtype=torch.float32).to(device).eval()
    found = _run_task(out, job, name, model, load_tokenizer(str(folder)))
    return _write(out, found, run=record.run, id=record.id)


def run_task_on_teacher(out: Path, job: Job, *, name: str, record_path: Path) -> str:
    """Run a task on a teacher, write benchmark.json, return a one-line summary.

    Raises ValueError when the teacher is not the one in fingerprint.json.
    """
    section, teacher_path = job.config.teacher, job.teacher_path
    torch.set_num_threads(section.generation.cpu_threads)
    teacher = load_recorded_teacher(teacher_path, section, record_path=record_path)
    tokenizer = load_tokenizer(teacher_path, **section.source)
    found = _run_task(out, job, name, teacher.model, tokenizer)
    return _write(out, found, teacher=read_json(record_path)["name"])


def _run_task(
    out: Path, job: Job, name: str, model: PreTrainedModel, tokenizer: Any
) -> BenchmarkRecord:
    settings = job.config.evaluation
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    if name == HUMANEVAL:
        found, attempts = run_humaneval(model, tokenizer, settings=settings)
        write_attempts(out.with_name(ATTEMPTS_FILE), attempts)
    else:
        found = run_harness_task(name, model, tokenizer, settings=settings)
    made = describe_run(
        section={"evaluation": identity(settings)},
        seed=settings.benchmarks.seed,
        dtype=name_dtype(model.dtype),
        device=describe_device(model.device),
        seconds=time.monotonic() - started,
    )
    return BenchmarkRecord(task=name, run=None, id=None, teacher=None, result=found, made=made)


def _write(out: Path, found: BenchmarkRecord, **whose: str | None) -> str:
    """Write benchmark.json of a student (run, id) or a teacher, and return a one-line summary."""
    found.model_copy(update=whose).write(out)
    whom = whose.get("run") or whose.get("teacher")
    return f"benchmark {found.task} of {whom}  {_describe(found.result)}"


def run_humaneval(
    model: PreTrainedModel, tokenizer: Any, *, settings: Evaluation
) -> tuple[TaskResult, list[Attempt]]:
    """Return (result, every attempt) of a model on HumanEval.

    Raises ValueError when running code is not allowed, no problems are given or the sandbox does not work.
    """
    _require_consent(settings)
    require_sandbox()  # before hours of generation
    sampling = Sampling(
        temperature=settings.humaneval.temperature,
        max_new_tokens=settings.humaneval.max_new_tokens,
        seed=settings.benchmarks.seed,
        stops=STOPS,
        batch_size=settings.batch_size,
    )
    return score_humaneval(
        lambda prompts: complete_prompts(model, tokenizer, prompts, sampling=sampling),
        settings=settings,
    )


def _require_consent(settings: Evaluation) -> None:
    if not settings.humaneval.allow_code_execution or settings.humaneval.file is None:
        raise ValueError(
            f"{HUMANEVAL} runs code written by a model, on a local copy of the problems: set "
            "evaluation.humaneval.allow_code_execution and evaluation.humaneval.file."
        )


def score_humaneval(
    complete: Callable[[Any], list[str]], *, settings: Evaluation
) -> tuple[TaskResult, list[Attempt]]:
    """Return the same for any function from prompts to completions."""
    all_problems = read_problems(Path(str(settings.humaneval.file)))
    problems = all_problems[: settings.benchmarks.limit]
    attempts = attempt_problems(
        problems,
        complete,
        num_completions=settings.humaneval.completions,
        timeout_s=settings.humaneval.code_timeout_s,
    )
    found = TaskResult(
        scores=score_attempts(attempts, settings.humaneval.pass_at),
        examples=len(problems),
        examples_in_all=len(all_problems),
        versions={},
    )
    return found, attempts


def write_attempts(path: Path, attempts: list[Attempt]) -> None:
    """Write one line of JSON for each attempt: its completion and how its program ended."""
    rows = [
        {"task_id": a.task_id, "completion": a.completion, **asdict(a.outcome)} for a in attempts
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _describe(found: TaskResult) -> str:
    shown = ", ".join(f"{s.task} {s.metric} {s.value:.4f}" for s in found.scores[:3])
    more = len(found.scores) - 3
    examples = f"{found.examples:,} of {found.examples_in_all:,} examples"
    return f"{shown}{f' and {more} more' if more > 0 else ''} ({examples})"
