"""HumanEval: pass@k by enumeration, right answers pass, wrong ones fail, and a model is asked as it should be."""

import gzip
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from retort.evaluation.benchmark import run_humaneval, score_humaneval, write_attempts
from retort.evaluation.humaneval import (
    cut_completion,
    estimate_pass_at_k,
    read_problems,
    score_attempts,
)
from retort.models.generate import Sampling, complete_prompts
from retort.tokens.tokenizer import load_tokenizer
from support.tiny import section
from unit.evaluation.test_sandbox import needs_sandbox

RIGHT = {"add": "    return a + b\n", "double": "    return 2 * a\n"}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two problems in HumanEval's form."""
    rows = [
        {
            "task_id": f"Own/{name}",
            "prompt": f'from typing import Any\n\n\ndef {name}({inputs}) -> Any:\n    """ {name} """\n',
            "entry_point": name,
            "canonical_solution": RIGHT[name],
            "test": f"def check(candidate):\n    assert candidate({given}) == {result}\n",
        }
        for name, inputs, given, result in (("add", "a, b", "2, 3", 5), ("double", "a", "4", 8))
    ]
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return path


def settings(path: Path, **values: object):  # type: ignore[no-untyped-def]
    keys = {"humaneval_file": str(path), "allow_code_execution": True, "code_timeout_s": 120.0}
    return section("evaluation", **(keys | values))


def answer(prompt: str) -> str:
    return next(text for name, text in RIGHT.items() if f"def {name}(" in prompt)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 3, 2)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_completion(
    n: int, c: int, k: int
) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert estimate_pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_more_than_there_are_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3 of 2 completions"):
        estimate_pass_at_k(2, 1, 3)


def test_a_completion_ends_where_it_leaves_the_function() -> None:
    assert cut_completion("    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert cut_completion("    x = 'def'\n    # mine\n    return x") == (
        "    x = 'def'\n    # mine\n    return x"
    )
    assert cut_completion("    return 1\nprint(f(2))\nclass A: pass") == "    return 1"


@needs_sandbox
def test_right_solutions_pass_and_wrong_ones_fail(problems: Path, tmp_path: Path) -> None:
    keys = {"humaneval_completions": 3, "humaneval_pass_at": (1, 3)}
    turns = itertools.cycle([True, False, False])

    def complete(prompts: list[str]) -> list[str]:
        wrong = "    return None\n"
        return [
            answer(p) if next(turns) and "def add(" in p else wrong + "\ndef more(): pass"
            for p in prompts
        ]

    found, attempts = score_humaneval(complete, settings=settings(problems, **keys))
    scores = {row["metric"]: row for row in found["scores"]}
    assert scores["pass@1"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert scores["pass@3"]["value"] == pytest.approx(0.5)
    assert scores["pass@3"]["standard_error"] == pytest.approx(math.sqrt(0.5 / 2))
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
    assert found["scores"][0]["value"] == 1.0, [a for a in attempts if not a.outcome.has_passed]
    assert found["examples"] == found["examples_in_all"] == len(attempts) == 164


@needs_sandbox
@pytest.mark.slow
def test_a_tiny_model_that_tells_stories_solves_nothing(shared_data: Path) -> None:
    folder = str(shared_data / "models" / "stories260K")
    path = shared_data / "benchmarks" / "HumanEval.jsonl.gz"
    keys = {"humaneval_max_new_tokens": 64, "benchmark_limit": 8}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, attempts = run_humaneval(model, load_tokenizer(folder), settings=settings(path, **keys))
    assert found["scores"][0]["value"] == 0.0 and found["examples"] == 8
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


def test_draws_follow_the_seed_and_a_long_prompt_keeps_its_end(tiny_teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_teacher))
    prompts = ["The fox", "word " * 400]  # longer than the context of 128

    def draw(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.0, max_new_tokens=200, seed=seed, batch_size=2)
        return complete_prompts(model, tokenizer, prompts, sampling=sampling)

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b'{"task_id": "x"}\n', "line 1"), (b"\x1f\x8b broken", "cannot be read")],
)
def test_problems_that_are_no_humaneval_are_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / ("problems.jsonl.gz" if content[:1] == b"\x1f" else "problems.jsonl")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as refusal:
        read_problems(path)
    assert str(path) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_code_of_a_model_is_not_run_unasked(problems: Path) -> None:
    with pytest.raises(ValueError, match="allow-code-execution"):
        run_humaneval(None, None, settings=settings(problems, allow_code_execution=False))  # type: ignore[arg-type]


def test_one_problem_has_no_standard_error(problems: Path) -> None:
    from retort.evaluation.humaneval import Attempt
    from retort.evaluation.sandbox import Outcome

    scores = score_attempts([Attempt("a", "", Outcome(True))], [1])
    assert scores == {"pass@1": {"value": 1.0, "standard_error": None}}
