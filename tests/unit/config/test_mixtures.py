"""Mixtures in a config: a list of sections, whose mistakes are told with their places."""

from typing import Any

from retort.config.load import complete, differences, find_problems, load_runs
from retort.config.schema import merge
from support.configs import STUDENT

MIX: list[dict[str, Any]] = [
    {"name": "json", "data_files": "a.jsonl", "weight": 2},
    {"name": "owner/texts"},
]


def require_said(raw: dict[str, Any], said: dict[str, str]) -> int:
    """Require a part of the message about each key; return how many keys have one."""
    found = {".".join(place): message for place, message in find_problems(merge(STUDENT, raw))[1]}
    assert {key: text in found[key] for key, text in said.items()} == dict.fromkeys(said, True)
    return len(found)


def test_all_mistakes_of_a_mixture_are_told_at_once_with_their_places() -> None:
    raw: dict[str, Any] = {
        "dataset": {
            "name": "json",
            "data_files": "a.jsonl",
            "sharding": "files",
            "mix": [
                {"name": "json", "data_files": "a.jsonl", "wieght": 2},
                {"name": "owner/texts", "weight": 0, "validation_files": "b.jsonl"},
                {"name": "json", "prompt_column": "q"},
                {"name": "text", "data_files": "sub/a.jsonl"},
                {"label": "nothing"},
            ],
        }
    }
    said = {
        "dataset.name": "but dataset.mix lists sources, each with its own keys",
        "dataset.data_files": "Move it to the source that it is of",
        "dataset.sharding": "Use dataset.sharding: interleaved",
        "dataset.mix.0.wieght": "Unknown config key dataset.mix[0].wieght. Did you mean",
        "dataset.mix.1.weight": "dataset.mix[1].weight is 0.0, but a number > 0 is expected",
    }
    require_said(raw, said)
    del raw["dataset"]["mix"][0]["wieght"], raw["dataset"]["mix"][1]["weight"]
    said = {
        "dataset.mix.1.validation_files": "or name a dataset.mix[1].validation_split",
        "dataset.mix.2.name": "but dataset.mix[2].data_files is null",
        "dataset.mix.2.prompt_column": "Set dataset.mix[2].response_column too",
        "dataset.mix.3.label": "and so is that of dataset.mix[0]",
        "dataset.mix.4.name": "'demo', which cannot be mixed. Name a Hub id, or a loader",
    }
    assert require_said(raw, said) == 8


def test_a_mixture_may_be_of_one_run() -> None:
    raw = merge(STUDENT, {"runs": {"one": {}, "other": {"dataset": {"mix": MIX}}}})
    configs = load_runs(raw)
    assert [len(config.dataset.mix) for config in configs.values()] == [0, 2]
    again = complete({"dataset": differences(configs["other"].dataset)})
    assert again.dataset == configs["other"].dataset
    assert [s.name for s in again.dataset.sources] == ["json", "owner/texts"]
    raw["runs"]["other"]["dataset"]["mix"] = [{**MIX[0], "weight": -1}]
    (problem,) = find_problems(raw)[1]
    assert problem.path == ("runs", "other", "dataset", "mix", "0", "weight")
    assert problem.message.startswith("runs.other.dataset.mix[0].weight is -1.0")
