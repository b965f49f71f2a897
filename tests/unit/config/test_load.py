"""Runs with their overrides, and the keys that ids are made of."""

import pytest
import yaml

from retort.config.load import identity, load_runs
from retort.config.schema import merge
from retort.config.sections import Config
from support.configs import OUTPUT, STUDENT, load, refusal


def test_a_run_is_the_whole_config_with_its_overrides_in_order() -> None:
    base = merge(
        STUDENT, {"training": {"seed": 3, "alpha": 0.2}, "cache": {"temperatures": [1, 2]}}
    )
    runs = {
        "b": {"training": {"alpha": None, "distillation_type": "logit"}},
        "a": {"cache": {"temperatures": [1, 2, 3]}, "teacher": {"generation": {"batch_size": 9}}},
        "c": None,
    }
    configs = load_runs(base | {"runs": runs})
    assert list(configs) == ["b", "a", "c"]
    assert [c.training.alpha for c in configs.values()] == [0.0, 0.2, 0.2]
    assert [c.training.seed for c in configs.values()] == [3, 3, 3]
    assert configs["a"].cache.temperatures == (1.0, 2.0, 3.0)
    assert configs["a"].teacher.generation.batch_size == 9
    assert configs["c"] == load(base)


def test_a_run_may_set_what_the_base_lacks() -> None:
    configs = load_runs({"runs": {"a": STUDENT, "b": {"student": {"model_path": "x"}}}})
    assert (configs["a"].student.model_path, configs["b"].student.model_path) == (None, "x")


@pytest.mark.parametrize("empty", [None, "", "~", "null"])
def test_an_empty_section_of_a_run_changes_nothing(empty: str | None) -> None:
    base = merge(STUDENT, {"training": {"seed": 3}, "teacher": {"model_path": "x"}})
    run = {"training": empty, "teacher": {"generation": empty}, "dataset": empty}
    (config,) = load_runs(base | {"runs": {"a": run}}).values()
    assert config == load(base)


def test_a_contradiction_in_a_run_names_the_run() -> None:
    runs = {"good": {}, "bad": {"training": {"temperature": 8}}}
    assert refusal(STUDENT | {"runs": runs}).startswith("In run 'bad': training.temperature is 8.0")


def test_runs_share_their_folders() -> None:
    message = refusal(STUDENT | {"runs": {"a": {"output": {"results_dir": "x"}}}})
    assert message.startswith("runs.a.output is set") and "top of the config" in message


@pytest.mark.parametrize("name", ["a b", "../up", ".hidden", "-x", "", "a/b", "a\n", "\u00e9"])
def test_a_run_whose_name_cannot_be_a_folder_is_refused_with_a_better_name(name: str) -> None:
    message = refusal(STUDENT | {"runs": {name: {}}})
    proposed = message.rsplit("instance to '", 1)[1].rstrip("'.")
    assert list(load_runs(STUDENT | {"runs": {proposed: {}}})) == [proposed]


def test_a_run_may_be_named_by_a_number() -> None:
    assert list(load_runs(STUDENT | {"runs": yaml.safe_load("{1: {}, v1.0-b: {}}")})) == [
        "1",
        "v1.0-b",
    ]


def test_the_default_config_has_an_empty_identity() -> None:
    config = load(OUTPUT, {"training": {"distillation_type": "hybrid"}})
    assert identity(config.dataset) == identity(config.teacher) == identity(config.cache) == {}
    assert identity(config.training) == {"alpha": 0.5}


def test_identity_has_changed_keys_as_json_values() -> None:
    config = load(
        {
            "cache": {"top_k": 8, "temperatures": [1, 2, 3]},
            "teacher": {"generation": {"cpu_threads": 2}},
        }
    )
    assert identity(config.cache) == {"top_k": 8, "temperatures": [1.0, 2.0, 3.0]}
    assert identity(config.teacher) == {"generation": {"cpu_threads": 2}}


def test_a_number_has_one_identity_however_it_is_written() -> None:
    ways = [load({"training": {"temperature": t}}) for t in (1, 1.0, "1", "1.0", "1e0")]
    assert {repr(identity(c.training)) for c in ways} == {"{'alpha': 0.5, 'temperature': 1.0}"}


def test_zero_is_not_false_where_both_are_valid() -> None:
    config = load({"teacher": {"generation": {"force_regenerate": 0}}})
    assert identity(config.teacher.generation) == {"force_regenerate": 0}


def test_machine_settings_are_not_in_the_identity() -> None:
    config = load(
        {
            "output": {"results_dir": "elsewhere"},
            "dataset": {"num_proc": 9},
            "teacher": {"device": "cuda", "generation": {"gpus": "0,1", "gpus_per_model": 2}},
            "training": {"device": "cpu", "logging_steps": 1, "save_steps": 5, "alpha": 0.5},
            "evaluation": {"batch_size": 1},
            "tracking": {"use_tensorboard": True},
        }
    )
    named = [identity(getattr(config, section)) for section in Config.model_fields]
    assert [n for n in named if n] == [
        {"config": "config/students/llama_demo.json"},
        {"alpha": 0.5},
    ]
