"""Prompts, filters, the journal, names and refusals of a synthesis: all that needs no server."""

import asyncio
import json
import os
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from retort.artifacts.plan import plan_project
from retort.artifacts.syntheses import refuse_other_responses
from retort.config.flags import section_flags
from retort.config.load import load_runs
from retort.config.schema import ConfigError, fill_defaults, section_schema
from retort.config.sections import Evaluation, Synthesis, build_section
from retort.synthesis.client import wait_before_retry
from retort.synthesis.contamination import Runs, read_benchmarks
from retort.synthesis.filters import (
    Sieve,
    detect_language,
    has_broken_code,
    is_refusal,
    require_filters,
)
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import Prompt, read_prompts
from retort.synthesis.providers import (
    Answer,
    Lost,
    TurnedAway,
    open_provider,
    read_key,
    read_retry_after,
)
from retort.synthesis.run import Task, check_synthesis, keep_examples, synthesize
from support.hub import NAME, serve

SCRIPT = Path(__file__).resolve().parents[3] / "workflow" / "scripts" / "synthesize.py"
PROSE = "The weather in the mountains changes quickly, so take a warm coat and enough to drink with you."
PROSE_DE = "Das Wetter in den Bergen wechselt schnell, also nimm einen warmen Mantel und genug zu trinken mit."


def section(**over: Any) -> Synthesis:
    values = {"provider": "openai", "model": "m", "prompts": "prompts.jsonl"} | over
    made: Synthesis = build_section("synthesis", fill_defaults(values, section_schema("synthesis")))
    return made


def evaluation(**over: Any) -> Evaluation:
    made: Evaluation = build_section(
        "evaluation", fill_defaults(over, section_schema("evaluation"))
    )
    return made


def answer(text: str, finish: str = "stop") -> Answer:
    return Answer(text, finish, input_tokens=3, output_tokens=5, model="m-1")


# Prompts.


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prompts_keep_their_order_and_labels_and_none_is_asked_twice(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say it.", "category": "a", "language": "en"},
        {"prompt": "  say IT. "},
        {"prompt": " "},
        {"prompt": "Say more.", "language": "python"},
    ]
    path = write(tmp_path, "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(section(prompts=path))
    assert found.prompts == [Prompt("Say it.", "a", "en"), Prompt("Say more.", None, "python")]
    assert (found.twice, found.empty) == (1, 1)


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "One?\n\nTwo?\nThree?")
    assert [p.text for p in read_prompts(section(prompts=path)).prompts] == [
        "One?",
        "Two?",
        "Three?",
    ]


def test_a_mark_of_the_byte_order_is_no_letter_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (("p.txt", "One?\r\nTwo?\r\n"), ("p.csv", "prompt\r\nOne?\r\nTwo?\r\n")):
        path = write(tmp_path, name, "\ufeff" + text)
        assert [p.text for p in read_prompts(section(prompts=path)).prompts] == ["One?", "Two?"]


def test_half_a_character_is_refused_before_anything_is_paid(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "Whole."}\n{"prompt": "Half \\ud83d."}\n')
    with pytest.raises(ValueError, match=r"prompt 2 of .* half a character") as raised:
        read_prompts(section(prompts=path))
    str(raised.value).encode()  # can be printed


def test_files_that_are_missing_or_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "prompts.jsonl", '{"prompt": "x"}')
    with pytest.raises(ValueError, match=r"does not exist .* Did you mean"):
        read_prompts(section(prompts=str(tmp_path / "prompt.jsonl")))
    with pytest.raises(ValueError, match="no known ending"):
        read_prompts(section(prompts=write(tmp_path, "p.docx", "x")))
    with pytest.raises(ValueError, match=r"'question' is not in .* synthesis\.prompt_column"):
        read_prompts(section(prompts=str(tmp_path / "prompts.jsonl"), prompt_column="question"))


TEMPLATES = {
    "categories": {"do": 0.7, "say": 0.3},
    "languages": {"python": 0.6, "bash": 0.4},
    "templates": {"do": ["Do {topic} in {language}."], "say": ["Say {topic}.", "Tell {topic}."]},
    "topics": [f"thing {i}" for i in range(200)],
}


def write_templates(folder: Path, **over: Any) -> str:
    return write(folder, "t.yaml", yaml.safe_dump(TEMPLATES | over))


@pytest.mark.parametrize("count", [10, 50, 137])
def test_every_beginning_of_filled_templates_has_the_proportions(
    tmp_path: Path, count: int
) -> None:
    asked = section(prompts=None, templates=write_templates(tmp_path), num_examples=9)
    found = read_prompts(asked).prompts[:count]
    shares = Counter((p.category, p.language) for p in found)
    for category, part in TEMPLATES["categories"].items():  # type: ignore[attr-defined]
        for language, of_it in TEMPLATES["languages"].items():  # type: ignore[attr-defined]
            assert abs(shares[category, language] - part * of_it * count) <= 2
    assert len({p.text for p in found}) == count


def test_another_seed_asks_in_another_order_and_the_same_one_in_the_same(tmp_path: Path) -> None:
    asked = section(prompts=None, templates=write_templates(tmp_path), num_examples=9)
    first = read_prompts(asked).prompts
    assert read_prompts(asked).prompts == first
    assert read_prompts(replace(asked, seed=1)).prompts != first


@pytest.mark.parametrize(
    "over, words",
    [
        ({"categories": {"do": 0.7, "say": 0.2}}, "categories sum to 0.9"),
        ({"categories": {"do": 1.0}}, "Give each category its templates"),
        ({"templates": {"do": ["{subject}"], "say": ["x"]}}, "cannot be filled"),
        ({"templates": {"do": ["{topic.name}"], "say": ["{topic[name]}"]}}, "cannot be filled"),
        ({"topics": []}, "has no topics"),
        ({"topic": ["x"]}, "has the keys"),
        ({"languages": ["python"]}, "must give each name a proportion"),
    ],
)
def test_templates_that_cannot_be_meant_are_refused(
    tmp_path: Path, over: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        read_prompts(section(prompts=None, templates=write_templates(tmp_path, **over)))


# Filters.


@pytest.mark.parametrize(
    "reason, given, over",
    [
        ("empty", answer(" \n"), {}),
        ("refused", answer("I'm sorry, but I can't help with that request."), {}),
        ("refused", answer("", "refusal"), {}),
        ("truncated", answer(PROSE, "length"), {}),
        ("too_short", answer("Yes."), {"min_characters": 10}),
        ("too_long", answer(PROSE), {"max_characters": 20}),
        ("wrong_language", answer(PROSE_DE), {}),
        ("broken_code", answer("Here:\n```python\ndef f(:\n    pass\n```\n"), {}),
        ("contaminated", answer("so: the quick brown fox jumps over it"), {}),
        ("duplicate", answer("The first  answer."), {}),
    ],
)
def test_an_answer_falls_for_its_reason_and_stays_without_that_filter(
    reason: str, given: Answer, over: dict[str, Any]
) -> None:
    off = {
        "refused": {"keep_refusals": True},
        "truncated": {"keep_truncated": True},
        "too_short": {"min_characters": 1},
        "too_long": {"max_characters": None},
        "wrong_language": {"check_language": False},
        "broken_code": {"check_code": False},
        "duplicate": {"keep_duplicates": True},
    }
    runs = Runs(["The quick brown fox jumps"], length=13)
    prompt = Prompt("Go.", None, "english")

    def sift(**values: Any) -> tuple[str | None, dict[str, int]]:
        sieve = Sieve(section(**values), runs if reason == "contaminated" else Runs([], length=13))
        assert sieve.sift(0, Prompt("One.", None, "en"), answer("The first answer.")) is None
        return sieve.sift(1, prompt, given), sieve.counts

    found, counts = sift(**over)
    assert found == reason and counts[reason] == 1 == sum(counts.values())
    if reason in off and given.text:
        assert sift(**over | off[reason])[0] is None


def test_near_duplicates_fall_and_likeness_has_its_threshold() -> None:
    words = [f"word{i}" for i in range(60)]
    other = [*words[:58], "changed", "end"]
    for threshold, falls in ((0.8, "near_duplicate"), (0.99, None), (None, None)):
        sieve = Sieve(section(near_duplicates=threshold), Runs([], length=13))
        assert sieve.sift(0, Prompt("p"), answer(" ".join(words))) is None
        assert sieve.sift(1, Prompt("p"), answer(" ".join(other))) == falls
        assert sieve.sift(2, Prompt("q"), answer("Something else altogether, and longer.")) is None


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
    assert is_refusal(answer(text))
    assert not is_refusal(answer(f"She said: {text}"))


@pytest.mark.parametrize(
    "text",
    [
        "I can help: add the two.",
        "Sorry is a word of 5 letters.",
        "I am able to run.",
        "I cannot stress this enough: test.",
    ],
)
def test_what_only_looks_like_a_refusal_stays(text: str) -> None:
    assert not is_refusal(answer(text))


def test_languages_are_told_apart_by_prose_alone_and_not_guessed() -> None:
    assert (detect_language(PROSE), detect_language(PROSE_DE)) == ("en", "de")
    assert detect_language("Ja.") is None
    assert detect_language("```\n" + PROSE_DE + "\n```") is None
    assert detect_language(f"{PROSE} \ud83d") == "en", "half a character, cut at max_tokens"


def test_a_language_that_nobody_knows_is_refused_and_not_passed_over() -> None:
    for known in ("en", "German", None):
        require_filters(section(response_language=known))
    with pytest.raises(ValueError, match="response_language is 'engish', but known are arabic"):
        require_filters(section(response_language="engish"))


def test_what_python_would_warn_of_in_a_response_is_said_to_nobody() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not has_broken_code("```python\nimport re\nre.match('\\d', 'x')\n```")
    assert not said


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
    file = write(tmp_path, "h.jsonl", json.dumps(row))
    asked = evaluation(benchmarks=["humaneval", "no_such_task"], humaneval_file=file)
    texts, missing = read_benchmarks(asked)
    assert missing == ["no_such_task"] and "NOT compared" in caplog.messages[0]
    sieve = Sieve(section(), Runs(texts, length=13))
    inside = f"Well: {problem.upper().replace(',', ' ;')} than that"
    assert sieve.sift(0, Prompt(inside), answer("Yes, it does so.")) == "contaminated"
    assert sieve.sift(1, Prompt("Q"), answer(inside)) == "contaminated"
    assert (
        sieve.sift(2, Prompt("Q"), answer("check if in given list of numbers there is a 3")) is None
    )


@pytest.mark.parametrize(
    "problem",
    [
        "\u5c0f\u660e\u6709\u4e09\u4e2a\u82f9\u679c,\u4ed6\u53c8\u4e70\u4e86\u4e94\u4e2a\u82f9\u679c?",
        "L\u00f6se die Gleichung f\u00fcr x und gib die gr\u00f6\u00dfte L\u00f6sung an, wenn es mehrere gibt",
    ],
)
def test_a_problem_is_found_however_its_letters_are_written(problem: str) -> None:
    runs = Runs([problem], length=13)
    hidden = "\u00ad".join(problem)  # a soft hyphen, on no screen
    for text in (problem, unicodedata.normalize("NFD", problem), hidden):
        assert runs.is_in(f"\u9898\u76ee: {text} Answer: 8")
    assert not runs.is_in(problem[:8])


@given(st.permutations(range(12)), st.integers(1, 12))
def test_what_is_kept_depends_on_the_answers_alone(order: list[int], wanted: int) -> None:
    """Whatever the order in which answers come, and wherever the asking was interrupted."""
    texts = [
        f"answer number {i // 2 * 2} is this" if i % 4 == 1 else f"number {i}" for i in range(12)
    ]
    texts[5] = ""
    prompts = [Prompt(f"p{i}") for i in range(12)]

    class Answers:
        def __init__(self) -> None:
            self.answers: dict[int, Answer] = {}

    def keep(already: list[int]) -> tuple[list[int], set[int]]:
        journal, asked = Answers(), set[int]()
        journal.answers = {place: answer(texts[place]) for place in already}

        def ask(places: Any) -> None:
            for place in sorted(places, key=order.index):
                asked.add(place)
                journal.answers[place] = answer(texts[place])

        sieve = Sieve(section(near_duplicates=None), Runs([], length=13))
        kept = keep_examples(section(num_examples=wanted), prompts, journal, sieve, ask)  # type: ignore[arg-type]
        return [row["number"] for row in kept.rows], asked

    whole, asked = keep([])
    again, rest = keep([place for place in order[:6] if place in asked])
    assert again == whole and rest == asked - set(order[:6])


# The journal, and waits.

ASKED = [Prompt(f"p{i}") for i in range(12)]


def test_a_journal_survives_a_torn_line_and_counts_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        for place in (0, 1, 2, 3):
            journal.send(place, (10, 20))
        journal.keep(0, answer("half a \ud83d character"))
        journal.turn_away(1)
        journal.lose(2)
        assert (journal.reserved.tokens, journal.paid.tokens) == (8 + 30 + 30, 8 + 30)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"event":"answer","place":9,"ans')
    for _ in range(2):
        with Journal(path, ASKED) as journal:
            assert list(journal.answers) == [0] and journal.answers[0].text.startswith("half")
            assert (journal.paid.requests, journal.paid.lost_requests) == (
                1,
                2,
            )  # 2, and 3 in flight
        assert path.read_bytes() == whole
    path.write_bytes(b'{"event":"other","place":1}\n' + whole)
    with pytest.raises(ValueError, match="line 1, is no line of a journal"), Journal(path, ASKED):
        pass
    assert path.read_bytes().endswith(whole), "what was paid for is never cut away"


def test_an_answer_stays_with_its_prompt_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, [Prompt(text) for text in ("one", "two", "three")]) as journal:
        for place, text in enumerate(("1", "2", "3")):
            journal.send(place, (10, 20))
            journal.keep(place, answer(text))
        journal.send(1, (10, 20))
    with Journal(path, [Prompt(text) for text in ("new", "three", "one")]) as journal:
        assert {place: a.text for place, a in journal.answers.items()} == {1: "3", 2: "1"}
        assert (journal.paid.requests, journal.paid.lost_requests) == (3, 1), "paid all the same"


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    """As of a synthesis typed by hand into the folder beside another's."""
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED, "greedy") as journal:
        journal.send(1, (10, 20))
        journal.keep(1, answer("One."))
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 1, .* or was asked with other settings"):
        Journal(path, ASKED, "drawn").__enter__()
    with Journal(path, [*ASKED, Prompt("one more")], "greedy") as journal:
        assert journal.answers == {1: answer("One.")}
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_no_bit_of_a_journal_changes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, ASKED) as journal:
        for place in range(2):
            journal.send(place, (10, 20))
            journal.keep(place, answer(f"Answer {place}."))
        written = dict(journal.answers)
    whole = path.read_bytes()
    refused = 0
    for at in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            with Journal(path, ASKED) as journal:
                assert journal.answers.items() <= written.items()
        except ValueError:
            refused += 1
    assert refused >= 8 * len(whole) - 8  # the last line's end: that line counts as torn


class Tried:
    """What tenacity says of an attempt."""

    def __init__(self, number: int, error: Exception) -> None:
        self.attempt_number, self.outcome = number, self
        self.error = error

    def exception(self) -> Exception:
        return self.error


def test_waits_double_with_jitter_to_a_minute_and_follow_retry_after() -> None:
    for number in (1, 2, 5, 9, 40):
        longest = min(60.0, 0.5 * 2 ** min(number - 1, 20))
        waits = {wait_before_retry(Tried(number, Lost("x"))) for _ in range(40)}  # type: ignore[arg-type]
        assert all(longest / 2 <= wait <= longest for wait in waits) and len(waits) > 30
    asked = wait_before_retry(Tried(1, TurnedAway("429", 7.0)))  # type: ignore[arg-type]
    assert 7.0 <= asked <= 7.5


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert read_retry_after({"retry-after": "2"}) == 2.0
    assert read_retry_after({"retry-after-ms": "250"}) == 0.25
    assert 20 < (read_retry_after({"retry-after": date}) or 0) <= 30
    assert read_retry_after({}) is read_retry_after({"retry-after": "soon"}) is None


def test_a_key_is_needed_where_the_provider_is_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not in the environment"):
        read_key(section())
    assert read_key(section(base_url="http://localhost:1/v1")) is None
    monkeypatch.setenv("MINE", "se cret")
    with pytest.raises(ValueError, match="MINE holds what cannot be a key") as raised:
        read_key(section(api_key_variable="MINE"))
    assert "se cret" not in str(raised.value)


def test_a_missing_client_is_said_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retort.synthesis.providers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'anthropic>="):
        open_provider(section(provider="anthropic"))


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_where_nobody_listens_nothing_is_paid(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(provider)
    monkeypatch.setenv("MINE", "abcdef")
    values = {"base_url": "http://127.0.0.1:9", "api_key_variable": "MINE"}
    asked = open_provider(section(provider=provider, **values))
    with pytest.raises(TurnedAway, match="no connection"):
        asyncio.run(asked.answer("x"))


# Config and names.


CONFIG: dict[str, Any] = {
    "dataset": {"name": "synthesis"},
    "synthesis": {"provider": "openai", "model": "m", "prompts": "prompts.jsonl"},
    "teacher": {"model_path": "some/teacher"},
}


@pytest.fixture
def raw(tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "prompts.jsonl", '{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    return {**CONFIG, "student": {"config": str(tiny_student)}}


def over(raw: dict[str, Any], section: str, /, **values: Any) -> dict[str, Any]:
    return {**raw, section: raw.get(section, {}) | values}


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("dataset", {"name": "demo"}, "nobody would read the responses"),
        ("synthesis", {"provider": None}, "nobody answers"),
        ("synthesis", {"provider": "gpt"}, "openai, anthropic or local"),
        ("synthesis", {"model": None}, "synthesis.model is null"),
        ("synthesis", {"provider": "local", "base_url": "http://x/v1"}, "asks no server"),
        ("synthesis", {"engine": "vllm"}, "has an engine of its own"),
        ("synthesis", {"prompts": None}, "both null"),
        ("synthesis", {"templates": "t.yaml"}, "both set"),
        ("synthesis", {"base_url": "http://me:secret@host/v1"}, "must not stand in a config"),
        ("synthesis", {"base_url": "localhost:8000"}, "an address is expected"),
        ("synthesis", {"model": "sk-abcdef123456"}, "looks like an API key"),
        ("synthesis", {"api_key": "abcdef123456"}, "no key of the config. A key never stands"),
        ("synthesis", {"api_key_variable": "sk-abcdef123456"}, "the name of a variable"),
        ("synthesis", {"max_tokens": "sk-abcdef123456"}, "an integer"),
        ("synthesis", {"my_key": "sk-abcdef123456"}, "A key never stands in a config"),
        ("synthesis", {"max_cost": 3.0}, "no price is known"),
        ("synthesis", {"tokens_per_minute": 1000}, "no request would fit"),
        ("synthesis", {"max_characters": 5, "min_characters": 9}, "nothing would be left"),
        ("dataset", {"data_files": "x.jsonl"}, "Remove dataset.data_files"),
        ("dataset", {"streaming": True, "max_samples": 3}, "one local file"),
        ("dataset", {"sharding": "files"}, "one local file"),
        ("teacher", {"model_path": "demo"}, "answers no prompts"),
    ],
)
def test_contradictions_are_refused_in_one_sentence_without_secrets(
    raw: dict[str, Any], name: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        load_runs(over(raw, name, **values))
    assert "secret" not in str(raised.value) and "abcdef" not in str(raised.value)


def name_of(raw: dict[str, Any]) -> tuple[str, str]:
    (plan,) = plan_project(load_runs(raw)).syntheses.values()
    return plan.answers_id, plan.id


def test_what_is_asked_names_answers_and_filters_name_the_synthesis(raw: dict[str, Any]) -> None:
    first = name_of(raw)
    assert first[0].startswith("api-")
    machine = {
        "concurrency": 3,
        "max_total_tokens": 10**6,
        "base_url": "http://x/v1",
        "output": "o",
    }
    assert name_of(over(raw, "synthesis", **machine)) == first
    for filters in ({"num_examples": 2}, {"min_characters": 9}, {"near_duplicates": None}):
        answers, synthesis = name_of(over(raw, "synthesis", **filters))
        assert answers == first[0] and synthesis != first[1]
    for asked in ({"temperature": 0.0}, {"system_prompt": "x"}, {"model": "n"}, {"seed": 4}):
        assert name_of(over(raw, "synthesis", **asked))[0] != first[0]
    Path("moved.jsonl").write_bytes(Path("prompts.jsonl").read_bytes())
    assert name_of(over(raw, "synthesis", prompts="moved.jsonl")) == first, "content, not paths"
    Path("prompts.jsonl").write_text('{"prompt": "Three?"}\n')
    assert name_of(raw)[0] != first[0]


def test_a_benchmark_more_filters_anew_and_asks_nothing_anew(raw: dict[str, Any]) -> None:
    first = name_of(raw)
    more = over(raw, "evaluation", benchmarks=["arc_easy"])
    assert name_of(more)[0] == first[0] and name_of(more)[1] != first[1]
    off = over(over(more, "synthesis", decontaminate=False), "evaluation", benchmarks=["piqa"])
    assert name_of(off) == name_of(over(raw, "synthesis", decontaminate=False))


def test_the_inputs_are_checked_before_anything_is_asked(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def check(**values: Any) -> list[str]:
        (config,) = load_runs(over(raw, "synthesis", **values)).values()
        return check_synthesis(config)

    with pytest.raises(ValueError, match="num_examples is 3, but there are 2 different prompts"):
        check(num_examples=3)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not in the environment"):
        check()
    with pytest.raises(ValueError, match=r"127.0.0.1:9/v1 does not answer .* start the server"):
        check(base_url="http://127.0.0.1:9/v1")


# A local model.


@pytest.fixture
def local(tmp_path: Path, tiny_teacher: Path) -> Task:
    prompts = write(tmp_path, "p.txt", "".join(f"Say {i} times that\n" for i in range(22)))
    asked = section(
        provider="local", model=str(tiny_teacher), prompts=prompts, batch_size=4, max_tokens=12,
        keep_truncated=True, check_language=False, near_duplicates=None,
    )  # fmt: skip
    teacher = build_section("teacher", fill_defaults({"device": "cpu"}, section_schema("teacher")))
    return Task(asked, evaluation(), str(tiny_teacher), teacher)


def run_local(folder: Path, task: Task) -> tuple[bytes, dict[str, Any]]:
    record = folder / "answers" / "mine" / "synthesis.json"
    synthesize(record, task)
    return record.with_name("responses.jsonl").read_bytes(), json.loads(record.read_text())


def test_a_local_model_answers_the_same_wherever_it_was_interrupted(
    tmp_path: Path, local: Task
) -> None:
    whole, record = run_local(tmp_path / "whole", local)
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["number"] for row in rows] == list(range(22)) and len(
        {r["response"] for r in rows}
    ) > 15
    assert record["paid"]["requests"] == 22 and record["responses"]["rows"] == 22
    journal = tmp_path / "whole" / "answers" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for kept in (1, 6, 13):  # in the middle of batches, and a torn line besides
        folder = tmp_path / str(kept)
        (folder / "answers").mkdir(parents=True)
        (folder / "answers" / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
        assert run_local(folder, local)[0] == whole
    fewer, _ = run_local(
        tmp_path / "whole", replace(local, section=replace(local.section, num_examples=7))
    )
    assert whole.startswith(fewer) and fewer.count(b"\n") == 7
    assert journal.read_bytes() == b"".join(lines), "fewer examples ask nothing"


@pytest.mark.slow
def test_prompts_of_a_hub_are_asked_once_however_they_change(tmp_path: Path, local: Task) -> None:
    """Rows of the Hub may change under a name: what was answered stays with its prompt, and only new ones are asked."""
    data, record = tmp_path / "hub", tmp_path / "answers" / "mine" / "synthesis.json"
    data.mkdir()
    asked = replace(local.section, prompts=NAME, prompt_column="question", temperature=0.0)
    command = [sys.executable, str(SCRIPT), "--output", str(record)]
    command += ["--local-model", str(local.local_model), *section_flags(asked)]
    command += section_flags(local.loading)

    def run(prompts: list[str], cache: str) -> tuple[dict[str, str], int]:
        rows = "".join(json.dumps({"question": prompt}) + "\n" for prompt in prompts)
        (data / "train.jsonl").write_text(rows)
        with serve(data) as hub:
            environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path / cache)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = record.with_name("responses.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [row["prompt"] for row in found] == prompts
        paid = json.loads(record.read_text())["paid"]["requests"]
        return {row["prompt"]: row["response"] for row in found}, paid

    first, paid = run(["Say one", "Tell me of two", "And three", "Then four of them"], "before")
    assert paid == 4
    second, paid = run(["Tell me of two", "Now five", "Say one", "Then four of them"], "after")
    assert paid == 5
    assert all(second[prompt] == first[prompt] for prompt in first if prompt in second)


def test_prompts_that_are_used_up_are_said_with_what_fell(tmp_path: Path, local: Task) -> None:
    strict = replace(local, section=replace(local.section, min_characters=10_000, num_examples=5))
    with pytest.raises(
        ValueError, match=r"all 22 prompts are asked, and 0 responses of the 5 .*22 too_short"
    ):
        run_local(tmp_path, strict)


def test_responses_that_were_edited_are_refused(tmp_path: Path, local: Task) -> None:
    run_local(tmp_path, local)
    record = tmp_path / "answers" / "mine" / "synthesis.json"
    refuse_other_responses(record)
    with record.with_name("responses.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="is not what was written"):
        refuse_other_responses(record)


def test_prompts_that_changed_meanwhile_are_refused(tmp_path: Path, local: Task) -> None:
    with pytest.raises(ValueError, match="changed meanwhile"):
        run_local(tmp_path, replace(local, stamp="0" * 12))


@pytest.mark.parametrize(
    "output, words",
    [("answers", "is a folder"), ("p.txt", "is a file of prompts"), ("p.txt/x.jsonl", "be made")],
)
def test_an_output_that_cannot_be_is_said_before_anything_is_asked(
    tmp_path: Path, local: Task, output: str, words: str
) -> None:
    (tmp_path / "answers").mkdir()
    asked = replace(local.section, output=str(tmp_path / output))
    before = (tmp_path / "p.txt").read_bytes()
    with pytest.raises(ValueError, match=words):
        run_local(tmp_path, replace(local, section=asked))
    assert (tmp_path / "p.txt").read_bytes() == before
    assert not (tmp_path / "answers" / "journal.jsonl").exists()
