"""Filters: why an answer is dropped, and what only looks like it."""

import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest

from retort.synthesis.contamination import ProblemNgrams, read_benchmarks
from retort.synthesis.filters import (
    AnswerFilter,
    detect_language,
    has_broken_code,
    is_refusal,
    require_filters,
)
from retort.synthesis.prompts import LabeledPrompt
from retort.synthesis.providers import Answer
from support.synthesis import (
    NO_PROBLEMS,
    evaluation_section,
    make_answer,
    synthesis_section,
    write_rows,
)

PROSE = "The weather in the mountains changes quickly, so take a warm coat and enough to drink with you."
PROSE_DE = "Das Wetter in den Bergen wechselt schnell, also nimm einen warmen Mantel und genug zu trinken mit."


@pytest.mark.parametrize(
    "reason, answer, over",
    [
        ("empty", make_answer(" \n"), {}),
        ("refused", make_answer("I'm sorry, but I can't help with that request."), {}),
        ("refused", make_answer("", "refusal"), {}),
        ("truncated", make_answer(PROSE, "length"), {}),
        ("too_short", make_answer("Yes."), {"min_characters": 10}),
        ("too_long", make_answer(PROSE), {"max_characters": 20}),
        ("wrong_language", make_answer(PROSE_DE), {}),
        ("broken_code", make_answer("Here:\n```python\ndef f(:\n    pass\n```\n"), {}),
        ("contaminated", make_answer("so: the quick brown fox jumps over it"), {}),
        ("duplicate", make_answer("The first  answer."), {}),
    ],
)
def test_an_answer_is_dropped_for_its_reason_and_kept_without_that_filter(
    reason: str, answer: Answer, over: dict[str, Any]
) -> None:
    off: dict[str, dict[str, Any]] = {
        "refused": {"keep_refusals": True},
        "truncated": {"keep_truncated": True},
        "too_short": {"min_characters": 1},
        "too_long": {"max_characters": None},
        "wrong_language": {"check_language": False},
        "broken_code": {"check_code": False},
        "duplicate": {"keep_duplicates": True},
    }
    problems = ProblemNgrams(["The quick brown fox jumps"], length=13)

    def check(**values: Any) -> tuple[str | None, dict[str, int]]:
        answer_filter = AnswerFilter(
            synthesis_section(**values), problems if reason == "contaminated" else NO_PROBLEMS
        )
        first = LabeledPrompt("One.", None, "en")
        assert answer_filter.check(0, first, make_answer("The first answer.")) is None
        found = answer_filter.check(1, LabeledPrompt("Go.", None, "english"), answer)
        return found, answer_filter.counts

    found, counts = check(**over)
    assert found == reason and counts[reason] == 1 == sum(counts.values())
    if reason in off and answer.text:
        assert check(**over | off[reason])[0] is None


def test_near_duplicates_are_dropped_above_the_threshold() -> None:
    words = [f"word{i}" for i in range(60)]
    similar = make_answer(" ".join([*words[:58], "changed", "end"]))
    other = make_answer("Something else altogether, and longer.")
    for threshold, expected in ((0.8, "near_duplicate"), (0.99, None), (None, None)):
        answer_filter = AnswerFilter(synthesis_section(near_duplicates=threshold), NO_PROBLEMS)
        assert answer_filter.check(0, LabeledPrompt("p"), make_answer(" ".join(words))) is None
        assert answer_filter.check(1, LabeledPrompt("p"), similar) == expected
        assert answer_filter.check(2, LabeledPrompt("q"), other) is None


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I\u2019m sorry, but I can\u2019t assist with this.",
        "As an AI language model, I don't have opinions.",
        "I apologize, but I am unable to do so.",
        "Sorry, but I won't write that.",
    ],
)
def test_refusals_are_known_by_their_beginning(text: str) -> None:
    assert is_refusal(make_answer(text))
    assert not is_refusal(make_answer(f"She said: {text}"))


@pytest.mark.parametrize(
    "text",
    [
        "I can help: add the two.",
        "Sorry is a word of 5 letters.",
        "I am able to run.",
        "I cannot stress this enough: test.",
    ],
)
def test_what_only_looks_like_a_refusal_is_kept(text: str) -> None:
    assert not is_refusal(make_answer(text))


def test_languages_are_told_apart_by_prose_alone_and_not_guessed() -> None:
    assert (detect_language(PROSE), detect_language(PROSE_DE)) == ("en", "de")
    assert detect_language("Ja.") is None
    assert detect_language("```\n" + PROSE_DE + "\n```") is None
    assert detect_language(f"{PROSE} \ud83d") == "en", "half a character, cut at max_tokens"


def test_an_unknown_language_is_refused() -> None:
    for known in ("en", "German", None):
        require_filters(synthesis_section(response_language=known))
    with pytest.raises(ValueError, match=r"response_language 'engish'\. Use one of arabic"):
        require_filters(synthesis_section(response_language="engish"))


def test_python_warnings_about_a_response_are_not_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert not has_broken_code("```python\nimport re\nre.match('\\d', 'x')\n```")
    assert not shown


@pytest.mark.parametrize(
    "language, right, wrong",
    [
        ("python", "print(1)", "print(1"),
        ("javascript", "const f = (a) => a + 1;", "const f = (a => {"),
        ("bash", 'for f in *; do echo "$f"; done', "for f in; do do"),
        ("go", "package a\nfunc f() int { return 1 }", "package a\nfunc f( int {"),
        ("rust", "fn f() -> i32 { 1 }", "fn f( -> i32 {"),
        ("java", "class A { int f() { return 1; } }", "class A { int f( {"),
        ("c", "int f(void) { return 1; }", "int f(void { return"),
        ("cpp", "template <class T> T f(T a) { return a; }", "template <class T T f( {"),
    ],
)
def test_code_is_parsed_in_its_language(language: str, right: str, wrong: str) -> None:
    if language != "python":
        pytest.importorskip(f"tree_sitter_{language}")
    assert not has_broken_code(f"So:\n```{language}\n{right}\n```\nand done")
    assert has_broken_code(f"So:\n```{language}\n{wrong}\n```\nand done")
    assert not has_broken_code(f"So:\n```brainfuck\n{wrong}\n```\n")


@pytest.mark.slow
def test_problems_of_benchmarks_are_found_in_prompts_and_responses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problem = "def has_close_elements(numbers, threshold): Check if in given list of numbers, are any two close"
    row = {
        "task_id": "0",
        "prompt": problem,
        "entry_point": "f",
        "test": "def check(candidate): pass",
    }
    file = write_rows(tmp_path, [row])
    evaluation = evaluation_section(
        benchmarks={"tasks": ["humaneval", "no_such_task"]}, humaneval={"file": file}
    )
    texts, missing = read_benchmarks(evaluation)
    assert missing == ["no_such_task"] and "NOT compared" in caplog.messages[0]
    answer_filter = AnswerFilter(synthesis_section(), ProblemNgrams(texts, length=13))
    inside = f"Well: {problem.upper().replace(',', ' ;')} than that"
    shorter = "check if in given list of numbers there is a 3"
    for prompt, text, expected in (
        (inside, "Yes, it does so.", "contaminated"),
        ("Q", inside, "contaminated"),
        ("Q", shorter, None),
    ):
        assert answer_filter.check(0, LabeledPrompt(prompt), make_answer(text)) == expected


@pytest.mark.parametrize(
    "problem",
    [
        "\u5c0f\u660e\u6709\u4e09\u4e2a\u82f9\u679c,\u4ed6\u53c8\u4e70\u4e86\u4e94\u4e2a\u82f9\u679c?",
        "L\u00f6se die Gleichung f\u00fcr x und gib die gr\u00f6\u00dfte L\u00f6sung an, wenn es mehrere gibt",
    ],
)
def test_a_problem_is_found_however_its_letters_are_written(problem: str) -> None:
    problems = ProblemNgrams([problem], length=13)
    hidden = "\u00ad".join(problem)  # with soft hyphens, which are invisible
    for text in (problem, unicodedata.normalize("NFD", problem), hidden):
        assert problems.overlaps(f"\u9898\u76ee: {text} Answer: 8")
    assert not problems.overlaps(problem[:8])
