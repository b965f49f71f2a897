"""HumanEval on a local copy of its problems: a model completes functions, and unit tests check them.

Chen et al., Evaluating Large Language Models Trained on Code, 2021 (arXiv 2107.03374). The model is given as a function
from prompts to completions; its code runs only in the `sandbox`.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from retort.config.sections import HUMANEVAL
from retort.evaluation.records import Score
from retort.evaluation.sandbox import Limits, Outcome, run_program
from retort.io.text_files import explain_read_errors, open_utf8

logger = logging.getLogger(__name__)

# Strings at which a completion has left the function (section 3.2 of the paper).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_KEYS = ("task_id", "prompt", "entry_point", "test")

# Prompts -> one completion each, in the same order.
Complete = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Problem:
    """A function's signature with its docstring, and its tests."""

    task_id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """Return the program that ends without an exception if the completion is correct."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Attempt:
    """One completion of one problem, and how its program ended."""

    task_id: str
    completion: str
    outcome: Outcome


def read_problems(path: Path) -> list[Problem]:
    """Read the problems of a .jsonl, compressed or not.

    Raises ValueError, with file and line, when it is not a copy of HumanEval.
    """
    try:
        with explain_read_errors(path), open_utf8(path) as file:
            text = file.read().decode("utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        found = [_read_problem(line, path, number) for number, line in enumerate(lines, start=1)]
    except OSError as error:
        raise ValueError(
            f"evaluation.humaneval.file {str(path)!r} cannot be read: {error}. Give a copy of HumanEval.jsonl.gz."
        ) from None
    if not found:
        raise ValueError(
            f"evaluation.humaneval.file {str(path)!r} is empty. Give a copy of HumanEval.jsonl.gz (164 problems)."
        )
    return found


def _read_problem(line: str, path: Path, number: int) -> Problem:
    try:
        row = json.loads(line)
        values = {key: row[key] for key in _KEYS}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"evaluation.humaneval.file {str(path)!r}, line {number}: {error!r}. Every line must be a JSON object "
            f"with {', '.join(_KEYS)}, as in OpenAI's HumanEval.jsonl.gz."
        ) from None
    return Problem(**{key: str(value) for key, value in values.items()})


def cut_completion(text: str) -> str:
    """Return the part of a completion that belongs to the function."""
    ends = [start for stop in STOPS if (start := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def estimate_pass_at_k(num_completions: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k of one problem: 1 - C(n - c, k) / C(n, k) (Chen et al., equation 1).

    n is the number of completions, c how many of them are correct. Raises ValueError when k is not in 1..n.
    """
    if not 1 <= k <= num_completions:
        raise ValueError(
            f"pass@{k} is not defined for {num_completions} completions: generate {k} or more for each problem."
        )
    return 1.0 - math.comb(num_completions - num_correct, k) / math.comb(num_completions, k)


def attempt_problems(
    problems: Sequence[Problem],
    complete: Complete,
    *,
    num_completions: int,
    timeout_s: float,
) -> list[Attempt]:
    """Generate `num_completions` completions of every problem, run them, and return the attempts problem by problem.

    Raises ValueError when there is no sandbox to run them in.
    """
    repeated = [problem for problem in problems for _ in range(num_completions)]
    completions = [cut_completion(text) for text in complete([p.prompt for p in repeated])]
    assert len(completions) == len(repeated), (len(completions), len(repeated))
    logger.info(f"{len(repeated):,} completions of {len(problems):,} problems; running them")
    limits = Limits(seconds=timeout_s)
    pairs = list(zip(repeated, completions, strict=True))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        outcomes = pool.map(
            lambda pair: run_program(pair[0].program(pair[1]), limits=limits), pairs
        )
        return [Attempt(p.task_id, c, o) for (p, c), o in zip(pairs, outcomes, strict=True)]


def score_attempts(attempts: Sequence[Attempt], ks: Sequence[int]) -> tuple[Score, ...]:
    """Return pass@k for each k: the mean over problems, and its standard error.

    The standard error is s / sqrt(n), s the sample standard deviation over n problems; None for one problem.
    """
    passed: dict[str, list[bool]] = {}
    for attempt in attempts:
        passed.setdefault(attempt.task_id, []).append(attempt.outcome.has_passed)
    scores = []
    for k in sorted(ks):
        estimates = [estimate_pass_at_k(len(found), sum(found), k) for found in passed.values()]
        mean = math.fsum(estimates) / len(estimates)
        squares = math.fsum((x - mean) ** 2 for x in estimates)
        num = len(estimates)
        error = math.sqrt(squares / (num - 1) / num) if num > 1 else None
        scores.append(
            Score(
                task=HUMANEVAL,
                metric=f"pass@{k}",
                value=mean,
                standard_error=error,
                is_less_better=False,
            )
        )
    return tuple(scores)
