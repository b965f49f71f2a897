"""A synthesis in the config: contradictions, ids, and the checks before anything is asked."""

from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.build import build_project
from retort.config.load import load_runs
from retort.config.schema import ConfigError
from retort.synthesis.run import check_synthesis_inputs
from support.synthesis import write_rows

CONFIG: dict[str, Any] = {
    "dataset": {"name": "synthesis"},
    "synthesis": {"provider": "openai", "model": "m", "prompts": "prompts.jsonl"},
    "teacher": {"model_path": "some/teacher"},
}


@pytest.fixture
def raw(tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path, [{"prompt": "One?"}, {"prompt": "Two?"}])
    return {**CONFIG, "student": {"config": str(tiny_student)}}


def over(raw: dict[str, Any], section: str, /, **values: Any) -> dict[str, Any]:
    return {**raw, section: raw.get(section, {}) | values}


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("dataset", {"name": "demo"}, "responses would not be used"),
        ("synthesis", {"provider": None}, "synthesis.provider is null"),
        ("synthesis", {"provider": "gpt"}, "openai, anthropic or local"),
        ("synthesis", {"model": None}, "synthesis.model is null"),
        ("synthesis", {"provider": "local", "base_url": "http://x/v1"}, "uses no server"),
        ("synthesis", {"engine": "vllm"}, "chooses its engine"),
        ("synthesis", {"prompts": None}, "both null"),
        ("synthesis", {"templates": "t.yaml"}, "both set"),
        ("synthesis", {"base_url": "http://me:secret@host/v1"}, "do not belong in a config"),
        ("synthesis", {"base_url": "localhost:8000"}, "a URL is expected"),
        ("synthesis", {"model": "sk-abcdef123456"}, "looks like an API key"),
        (
            "synthesis",
            {"api_key": "abcdef123456"},
            "Unknown config key synthesis.api_key. API keys",
        ),
        ("synthesis", {"api_key_variable": "sk-abcdef123456"}, "the name of a variable"),
        ("synthesis", {"max_tokens": "sk-abcdef123456"}, "an integer"),
        ("synthesis", {"my_key": "sk-abcdef123456"}, "API keys do not belong in a config"),
        ("synthesis", {"max_cost": 3.0}, "no price is known"),
        ("synthesis", {"tokens_per_minute": 1000}, "no request would fit"),
        ("synthesis", {"max_characters": 5, "min_characters": 9}, "no response would be kept"),
        ("dataset", {"data_files": "x.jsonl"}, "Remove dataset.data_files"),
        ("dataset", {"streaming": True, "max_samples": 3}, "one local file"),
        ("dataset", {"sharding": "files"}, "one local file"),
        ("teacher", {"model_path": "demo"}, "cannot answer prompts"),
    ],
)
def test_contradictions_are_refused_in_one_sentence_without_secrets(
    raw: dict[str, Any], name: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_runs(over(raw, name, **values))
    assert "secret" not in str(raised.value) and "abcdef" not in str(raised.value)


def ids_of(raw: dict[str, Any]) -> tuple[str, str]:
    (plan,) = build_project(load_runs(raw)).syntheses.values()
    return plan.answers_id, plan.id


def test_answers_are_named_by_the_requests_and_a_synthesis_also_by_its_filters(
    raw: dict[str, Any],
) -> None:
    first = ids_of(raw)
    assert first[0].startswith("api-")
    unnamed = {
        "concurrency": 3,
        "max_total_tokens": 10**6,
        "base_url": "http://x/v1",
        "output": "o",
    }
    assert ids_of(over(raw, "synthesis", **unnamed)) == first
    for filters in ({"num_examples": 2}, {"min_characters": 9}, {"near_duplicates": None}):
        answers, synthesis = ids_of(over(raw, "synthesis", **filters))
        assert answers == first[0] and synthesis != first[1]
    for asked in ({"temperature": 0.0}, {"system_prompt": "x"}, {"model": "n"}, {"seed": 4}):
        assert ids_of(over(raw, "synthesis", **asked))[0] != first[0]
    Path("moved.jsonl").write_bytes(Path("prompts.jsonl").read_bytes())
    assert ids_of(over(raw, "synthesis", prompts="moved.jsonl")) == first, "content, not paths"
    Path("prompts.jsonl").write_text('{"prompt": "Three?"}\n')
    assert ids_of(raw)[0] != first[0]


def test_another_benchmark_changes_the_filters_and_not_the_answers(raw: dict[str, Any]) -> None:
    first = ids_of(raw)
    more = over(raw, "evaluation", benchmarks={"tasks": ["arc_easy"]})
    assert ids_of(more)[0] == first[0] and ids_of(more)[1] != first[1]
    off = over(
        over(more, "synthesis", decontaminate=False), "evaluation", benchmarks={"tasks": ["piqa"]}
    )
    assert ids_of(off) == ids_of(over(raw, "synthesis", decontaminate=False))


def test_the_inputs_are_checked_before_anything_is_asked(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def check(**values: Any) -> list[str]:
        (config,) = load_runs(over(raw, "synthesis", **values)).values()
        return check_synthesis_inputs(config)

    with pytest.raises(ValueError, match="num_examples is 3, but there are 2 different prompts"):
        check(num_examples=3)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not in the environment"):
        check()
    with pytest.raises(ValueError, match=r"127.0.0.1:9/v1 does not answer .* start the server"):
        check(base_url="http://127.0.0.1:9/v1")
