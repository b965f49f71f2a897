"""Benchmarks of a student or a teacher: benchmark.json, and for HumanEval attempts.jsonl beside it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from retort.config.load import identity
from retort.config.sections import HUMANEVAL, Evaluation, Teacher
from retort.evaluation.harness import load_tasks, require_harness, run_tasks
from retort.evaluation.humaneval import (
    STOPS,
    Attempt,
    attempt_problems,
    read_problems,
    score_attempts,
)
from retort.evaluation.run import refuse_other_student
from retort.evaluation.sandbox import require_sandbox
from retort.io.files import read_json, write_atomically, write_json
from retort.io.run_record import describe_run
from retort.models.generate import Sampling, complete_prompts
from retort.models.load import (
    choose_device,
    describe_device,
    load_pretrained,
    load_recorded_teacher,
)
from retort.tokens.tokenizer import load_tokenizer

BENCHMARK_FORMAT = "retort-benchmark"
BENCHMARK_VERSION = 1
ATTEMPTS_FILE = "attempts.jsonl"


def check_benchmarks(evaluation: Evaluation) -> list[str]:
    """Check what benchmarks need, and fetch their data; return a note for each.

    Raises ValueError where the harness, a task, its data, the problems or the sandbox are missing.
    """
    names = [name for name in evaluation.benchmarks if name != HUMANEVAL]
    if names:
        require_harness(names)
    notes = []
    if HUMANEVAL in evaluation.benchmarks:
        require_sandbox()
        problems = read_problems(Path(str(evaluation.humaneval_file)))
        notes.append(f"benchmark {HUMANEVAL}: {len(problems):,} problems")
    for name in names:
        tasks = load_tasks(name, tasks_dir=evaluation.benchmark_tasks_dir)["tasks"].values()
        examples = sum(len(task.eval_docs) for task in tasks)
        notes.append(f"benchmark {name}: {examples:,} examples")
    return notes


def benchmark_run(
    out: Path,
    *,
    name: str,
    training_path: Path,
    settings: Evaluation,
    device: str,
    cpu_threads: int,
) -> str:
    """Run a benchmark on the student in final/ beside training.json, write benchmark.json, return its line.

    Raises ValueError when final/ is not what training wrote.
    """
    torch.set_num_threads(cpu_threads)
    record = read_json(training_path)
    folder = training_path.parent / "final"
    refuse_other_student(folder, record, training_path)
    model = load_pretrained(str(folder), dtype=torch.float32).to(choose_device(device)).eval()
    about = {"run": record["run"], "id": record["id"], "teacher": None}
    return _benchmark(out, name, model, load_tokenizer(str(folder)), about=about, settings=settings)


def benchmark_teacher(
    out: Path,
    *,
    name: str,
    teacher_path: str,
    fingerprint_path: Path,
    section: Teacher,
    settings: Evaluation,
) -> str:
    """Run a benchmark on a teacher, write benchmark.json, return its line.

    Raises ValueError when it is not the recorded one.
    """
    torch.set_num_threads(section.generation.cpu_threads)
    teacher = load_recorded_teacher(teacher_path, section, record_path=fingerprint_path)
    tokenizer = load_tokenizer(
        teacher_path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    about = {"run": None, "id": None, "teacher": section.model_path}
    return _benchmark(out, name, teacher.model, tokenizer, about=about, settings=settings)


def _benchmark(
    out: Path,
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    about: dict[str, Any],
    settings: Evaluation,
) -> str:
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    if name == HUMANEVAL:
        found, attempts = run_humaneval(model, tokenizer, settings=settings)
        write_attempts(out.with_name(ATTEMPTS_FILE), attempts)
    else:
        found = run_tasks(name, model, tokenizer, settings=settings)
    keys = identity(settings)
    device = describe_device(model.device)
    made = describe_run(
        section={"evaluation": keys},
        seed=settings.benchmark_seed,
        device=device,
        seconds=time.monotonic() - started,
    )
    made["versions"] |= found.pop("versions")
    header = {"format": BENCHMARK_FORMAT, "version": BENCHMARK_VERSION, "benchmark": name}
    write_json(out, header | about | found | {"made": made})
    return f"benchmark {name} of {about['run'] or about['teacher']}  {_describe(found)}"


def run_humaneval(
    model: PreTrainedModel, tokenizer: Any, *, settings: Evaluation
) -> tuple[dict[str, Any], list[Attempt]]:
    """Return what benchmark.json says of a model on HumanEval, and every attempt."""
    _require_consent(settings)
    require_sandbox()  # before hours of writing
    sampling = Sampling(
        temperature=settings.humaneval_temperature,
        max_new_tokens=settings.humaneval_max_new_tokens,
        seed=settings.benchmark_seed,
        stops=STOPS,
        batch_size=settings.batch_size,
    )
    return score_humaneval(
        lambda prompts: complete_prompts(model, tokenizer, prompts, sampling=sampling),
        settings=settings,
    )


def _require_consent(settings: Evaluation) -> None:
    if not settings.allow_code_execution or settings.humaneval_file is None:
        raise ValueError(
            f"{HUMANEVAL} runs the code that a model writes on problems of yours: give "
            "--evaluation-allow-code-execution and --evaluation-humaneval-file (in a config, the same keys of "
            "evaluation)."
        )


def score_humaneval(
    complete: Callable[[Any], list[str]], *, settings: Evaluation
) -> tuple[dict[str, Any], list[Attempt]]:
    """Return the same of anything that goes on from prompts."""
    everything = read_problems(Path(str(settings.humaneval_file)))
    problems = everything[: settings.benchmark_limit]
    attempts = attempt_problems(
        problems,
        complete,
        num_completions=settings.humaneval_completions,
        timeout_s=settings.code_timeout_s,
    )
    scores = score_attempts(attempts, settings.humaneval_pass_at)
    rows = [
        {"task": HUMANEVAL, "metric": metric, "is_less_better": False, **score}
        for metric, score in scores.items()
    ]
    found = {
        "scores": rows,
        "examples": len(problems),
        "examples_in_all": len(everything),
        "versions": {},
    }
    return found, attempts


def write_attempts(path: Path, attempts: list[Attempt]) -> None:
    """Write what was written and how it ended, a line of JSON for each attempt."""
    rows = [
        {"task_id": a.task_id, "completion": a.completion, **asdict(a.outcome)} for a in attempts
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _describe(found: dict[str, Any]) -> str:
    shown = ", ".join(f"{r['task']} {r['metric']} {r['value']:.4f}" for r in found["scores"][:3])
    more = len(found["scores"]) - 3
    examples = f"{found['examples']:,} of {found['examples_in_all']:,} examples"
    return f"{shown}{f' and {more} more' if more > 0 else ''} ({examples})"
