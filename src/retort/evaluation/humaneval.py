"""HumanEval on a local copy of its problems: a model completes functions, their tests say which are right.

Chen et al., Evaluating Large Language Models Trained on Code, 2021 (arXiv 2107.03374). The model is given as a function
from prompts to completions; what it writes runs in the room `sandbox` and nowhere else.
"""

import gzip
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.evaluation.sandbox import Limits, Outcome, run_program

logger = logging.getLogger(__name__)

# Where a completion has left the function: section 3.2 of the paper ("# " is a comment at the margin).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_KEYS = ("task_id", "prompt", "entry_point", "test")

# Prompts -> one completion of each, in their order.
Complete = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Problem:
    """The head of a function with its docstring, and the tests of it."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """Return the program that raises nothing where the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Attempt:
    """One completion of one problem, and how its program ended."""

    task_id: str
    completion: str
    outcome: Outcome


def read_problems(path: Path) -> list[Problem]:
    """Read the problems of a .jsonl or .jsonl.gz.

    Raises ValueError, with file and line, where it is no copy of HumanEval.
    """
    try:
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        found = [_read_problem(line, path, number) for number, line in enumerate(lines, start=1)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"evaluation.humaneval_file {str(path)!r} cannot be read: {error}. Give a copy of HumanEval.jsonl.gz."
        ) from None
    if not found:
        raise ValueError(
            f"evaluation.humaneval_file {str(path)!r} is empty: 164 problems expected."
        )
    return found


def _read_problem(line: str, path: Path, number: int) -> Problem:
    try:
        row = json.loads(line)
        values = {key: row[key] for key in _KEYS}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"evaluation.humaneval_file {str(path)!r}, line {number}: {error!r}. Every line is expected to be a JSON "
            f"object with {', '.join(_KEYS)}, as OpenAI publishes them."
        ) from None
    return Problem(**{key: str(value) for key, value in values.items()})


def cut_completion(text: str) -> str:
    """Return a completion up to where it leaves the function."""
    ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def estimate_pass_at_k(num_completions: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k of one problem: 1 - C(n - c, k) / C(n, k) (Chen et al., equation 1).

    n completions, c of them right. Raises ValueError where k is more than n.
    """
    if not 1 <= k <= num_completions:
        raise ValueError(f"pass@{k} of {num_completions} completions is not defined.")
    return 1.0 - math.comb(num_completions - num_right, k) / math.comb(num_completions, k)


def attempt_problems(
    problems: Sequence[Problem],
    complete: Complete,
    *,
    num_completions: int,
    timeout_s: float,
) -> list[Attempt]:
    """Let a model complete every problem `num_completions` times, and run what it wrote.

    Returns the attempts, those of one problem together. Raises ValueError where there is no sandbox.
    """
    asked = [problem for problem in problems for _ in range(num_completions)]
    completions = [cut_completion(text) for text in complete([p.prompt for p in asked])]
    assert len(completions) == len(asked), (len(completions), len(asked))
    logger.info(f"{len(asked):,} completions of {len(problems):,} problems; running them")
    limits = Limits(seconds=timeout_s)
    pairs = list(zip(asked, completions, strict=True))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        outcomes = pool.map(
            lambda pair: run_program(pair[0].program(pair[1]), limits=limits), pairs
        )
        return [Attempt(p.task_id, c, o) for (p, c), o in zip(pairs, outcomes, strict=True)]


def score_attempts(attempts: Sequence[Attempt], ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return pass@k for each k: its value, the mean over problems, and the standard error of that mean.

    The error is the deviation of the problems' estimates by the root of their number; None for one problem.
    """
    right: dict[str, list[bool]] = {}
    for attempt in attempts:
        right.setdefault(attempt.task_id, []).append(attempt.outcome.has_passed)
    scores = {}
    for k in sorted(ks):
        each = [estimate_pass_at_k(len(found), sum(found), k) for found in right.values()]
        mean = math.fsum(each) / len(each)
        spread = math.fsum((x - mean) ** 2 for x in each)
        error = math.sqrt(spread / (len(each) - 1) / len(each)) if len(each) > 1 else None
        scores[f"pass@{k}"] = {"value": mean, "standard_error": error}
    return scores
