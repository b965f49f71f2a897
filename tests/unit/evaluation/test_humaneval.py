"""HumanEval: pass@k by enumeration, correct solutions pass, wrong ones fail, and how completions are generated."""

import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from retort.config.sections import Evaluation
from retort.evaluation.humaneval import (
    Attempt,
    cut_completion,
    estimate_pass_at_k,
    read_problems,
    score_attempts,
)
from retort.evaluation.sandbox import Outcome
from retort.evaluation.tasks import run_humaneval, score_humaneval, write_attempts
from retort.models.generate import Sampling, complete_prompts
from retort.tokens.tokenizer import load_tokenizer
from support.sandbox import needs_sandbox
from support.sections import section

SOLUTIONS = {"add": "    return a + b\n", "double": "    return 2 * a\n"}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two problems in HumanEval's format."""
    rows = [
        {
            "task_id": f"Own/{name}",
            "prompt": f'from typing import Any\n\n\ndef {name}({inputs}) -> Any:\n    """ {name} """\n',
            "entry_point": name,
            "canonical_solution": SOLUTIONS[name],
            "test": f"def check(candidate):\n    assert candidate({given}) == {result}\n",
        }
        for name, inputs, given, result in (("add", "a, b", "2, 3", 5), ("double", "a", "4", 8))
    ]
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return path


def settings(path: Path, *, limit: int | None = None, **values: object) -> Evaluation:
    keys = {"file": str(path), "allow_code_execution": True, "code_timeout_s": 120.0}
    found: Evaluation = section("evaluation", humaneval=keys | values, benchmarks={"limit": limit})
    return found


def answer(prompt: str) -> str:
    return next(text for name, text in SOLUTIONS.items() if f"def {name}(" in prompt)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_samples_with_a_correct_completion(
    n: int, c: int, k: int
) -> None:
    samples = list(itertools.combinations([True] * c + [False] * (n - c), k))
    expected = sum(any(sample) for sample in samples) / len(samples)
    assert estimate_pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_with_fewer_than_k_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3 is not defined for 2 completions"):
        estimate_pass_at_k(2, 1, 3)


def test_a_completion_ends_where_it_leaves_the_function() -> None:
    assert cut_completion("    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert cut_completion("    x = 'def'\n    # mine\n    return x") == (
        "    x = 'def'\n    # mine\n    return x"
    )
    assert cut_completion("    return 1\nprint(f(2))\nclass A: pass") == "    return 1"


@needs_sandbox
def test_correct_solutions_pass_and_wrong_ones_fail(problems: Path, tmp_path: Path) -> None:
    turns = itertools.cycle([True, False, False])

    def complete(prompts: list[str]) -> list[str]:
        wrong = "    return None\n"
        return [
            answer(p) if next(turns) and "def add(" in p else wrong + "\ndef more(): pass"
            for p in prompts
        ]

    found, attempts = score_humaneval(
        complete, settings=settings(problems, completions=3, pass_at=(1, 3))
    )
    scores = {score.metric: score for score in found.scores}
    assert scores["pass@1"].value == pytest.approx((1 / 3 + 0) / 2)
    assert scores["pass@3"].value == pytest.approx(0.5)
    assert scores["pass@3"].standard_error == pytest.approx(math.sqrt(0.5 / 2))
    assert [a.outcome.has_passed for a in attempts] == [True] + [False] * 5
    assert attempts[1].outcome.failure == "AssertionError: "
    write_attempts(tmp_path / "attempts.jsonl", attempts)
    rows = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert rows[1]["completion"] == "    return None\n" and rows[0]["has_passed"]


@needs_sandbox
@pytest.mark.slow
def test_the_reference_solutions_of_humaneval_all_pass(shared_data: Path) -> None:
    path = shared_data / "benchmarks" / "HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    known = {row["prompt"]: row["canonical_solution"] for row in rows}
    found, attempts = score_humaneval(
        lambda prompts: [known[p] for p in prompts], settings=settings(path)
    )
    assert found.scores[0].value == 1.0, [a for a in attempts if not a.outcome.has_passed]
    assert found.examples == found.examples_in_all == len(attempts) == 164


@needs_sandbox
@pytest.mark.slow
def test_a_tiny_model_that_tells_stories_solves_nothing(shared_data: Path) -> None:
    folder = str(shared_data / "models" / "stories260K")
    path = shared_data / "benchmarks" / "HumanEval.jsonl.gz"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen = settings(path, limit=8, max_new_tokens=64)
    found, attempts = run_humaneval(model, load_tokenizer(folder), settings=chosen)
    assert found.scores[0].value == 0.0 and found.examples == 8
    assert all(attempt.completion and attempt.outcome.failure for attempt in attempts)


def test_a_completion_is_the_models_own_greedy_path(tiny_teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_teacher))
    prompts = ["The quick fox", "A lazy dog and a cat", "Blue"]
    sampling = Sampling(temperature=0.0, max_new_tokens=12, seed=0, batch_size=3)
    found = complete_prompts(model, tokenizer, prompts, sampling=sampling)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(12):
            with torch.inference_mode():
                best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True), prompt


def test_samples_follow_the_seed_and_a_long_prompt_keeps_its_end(tiny_teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_teacher))
    prompts = ["The fox", "word " * 400]  # longer than the context of 128

    def sample(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.0, max_new_tokens=200, seed=seed, batch_size=2)
        return complete_prompts(model, tokenizer, prompts, sampling=sampling)

    assert sample(0) == sample(0) != sample(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b'{"task_id": "x"}\n', "line 1"), (b"\x1f\x8b broken", "cut short")],
)
def test_files_that_are_not_humaneval_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / ("problems.jsonl.gz" if content[:1] == b"\x1f" else "problems.jsonl")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_problems(path)
    assert str(path) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_code_of_a_model_is_not_run_without_consent(problems: Path) -> None:
    with pytest.raises(ValueError, match="allow_code_execution"):
        run_humaneval(None, None, settings=settings(problems, allow_code_execution=False))


def test_one_problem_has_no_standard_error(problems: Path) -> None:
    (score,) = score_attempts([Attempt("a", "", Outcome(True))], [1])
    assert (score.metric, score.value, score.standard_error) == ("pass@1", 1.0, None)
