"""Sweeps: the runs that they become, and their names."""

from typing import Any

import pytest
from snakemake.cli import parse_config
from snakemake.utils import update_config

from retort.artifacts.build import build_project
from retort.config.load import load_runs
from retort.config.schema import ConfigError
from retort.config.sweeps import expand_runs, prefer_command_line

STUDENT = {"student": {"config": "config/students/llama_demo.json"}}


def names(**runs: Any) -> list[str]:
    return [run.name for run in expand_runs(runs)[0]]


def test_a_list_becomes_a_run_for_each_value() -> None:
    runs = load_runs(STUDENT | {"runs": {"both": {"training": {"alpha": [0.2, 0.8], "seed": 3}}}})
    assert {name: run.training.alpha for name, run in runs.items()} == {
        "both-alpha_0.2": 0.2,
        "both-alpha_0.8": 0.8,
    }
    assert {run.training.seed for run in runs.values()} == {3}


def test_several_lists_become_all_combinations_in_the_configs_order() -> None:
    found = names(soft={"training": {"temperature": [1.0, 2], "seed": [0, 1]}}, hard={})
    assert found == [
        "soft-temperature_1-seed_0",
        "soft-temperature_1-seed_1",
        "soft-temperature_2-seed_0",
        "soft-temperature_2-seed_1",
        "hard",
    ]


@pytest.mark.parametrize(
    ("values", "temperatures"),
    [
        ([1.0, 2.0], [("one", (1.0, 2.0))]),  # the key's own list
        (
            [[1.0], [1.0, 2.0]],
            [("one-temperatures_1", (1.0,)), ("one-temperatures_1_2", (1.0, 2.0))],
        ),
    ],
)
def test_for_a_key_that_takes_a_list_a_list_of_lists_is_a_sweep(
    values: list[Any], temperatures: list[Any]
) -> None:
    one = {"cache": {"temperatures": values}, "training": {"temperature": 1.0}}
    runs = load_runs(STUDENT | {"runs": {"one": one}})
    assert [(name, run.cache.temperatures) for name, run in runs.items()] == temperatures


def test_keys_with_the_same_last_part_are_named_in_full() -> None:
    run = {"teacher": {"model_path": ["a/b", "c"]}, "student": {"model_path": ["d"]}}
    assert names(x=run) == [
        "x-teacher.model_path_a_b-student.model_path_d",
        "x-teacher.model_path_c-student.model_path_d",
    ]


def test_adding_a_value_adds_a_run_and_renames_none() -> None:
    def plan(*alphas: float) -> dict[str, str]:
        config = STUDENT | {"runs": {"both": {"training": {"alpha": list(alphas)}}}}
        return {name: run.id for name, run in build_project(load_runs(config)).runs.items()}

    before, after = plan(0.2, 0.8), plan(0.1, 0.2, 0.8)
    assert before.items() < after.items() and len(after) == 3


def test_a_sweep_on_the_command_line_is_the_same() -> None:
    """Snakemake parses only the outermost level: --config runs="{both: {training: {alpha: [0.2, 0.80]}}}"."""
    for runs in (
        "{both: {training: {alpha: [0.2, 0.80]}}}",
        {"both": "{training: {alpha: [0.2, 0.80]}}"},
        {"both": {"training": "{alpha: [0.2, 0.80]}"}},
        {"both": {"training": {"alpha": "[0.2, 0.80]"}}},
    ):
        found = load_runs(STUDENT | {"runs": runs})
        assert [(name, run.training.alpha) for name, run in found.items()] == [
            ("both-alpha_0.2", 0.2),
            ("both-alpha_0.8", 0.8),
        ]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"a": {"training": {"alpha": []}}}, r"runs\.a\.training\.alpha is \[\], a sweep without"),
        ({"a": {"training": {"seed": [1, 1.0]}}}, r"has 1 and 1, .*same name \('1'\)"),
        (
            {"a": {"teacher": {"model_path": ["x/y", "x y"]}}},
            r"has 'x/y' and 'x y', .* same name \('x_y'\)",
        ),
        ({"a": {"training": {"seed": [1]}}, "a-seed_1": {}}, r"two runs named 'a-seed_1'"),
        ({"a": {"training": {"alpha": [0.5, 2]}}}, r"runs\.a-alpha_2\.training\.alpha is 2\.0"),
        ({"a": {"training": {"alhpa": [0.5, 2]}}}, r"Unknown config key runs\.a\.training\.alhpa"),
        ({"a": {"training": [0.5]}}, r"runs\.a\.training is \[0\.5\], but a section"),
        ({"a b": {"training": {"seed": [1]}}}, "not a valid name"),
    ],
)
def test_bad_sweeps_are_refused(runs: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_runs(STUDENT | {"runs": runs})


def test_the_command_line_wins_over_runs_and_their_sweeps() -> None:
    given = parse_config(["training={max_steps: 10}", "teacher={generation: {batch_size: 2}}"])
    runs = {
        "own": {"training": {"max_steps": 500, "alpha": 0.2}},
        "swept": "{training: {max_steps: [20, 30], seed: [1, 2]}}",
        "nested": {"teacher": {"generation": {"batch_size": 9, "packing": True}}},
        "none": None,
    }
    raw: dict[str, Any] = STUDENT | {"runs": runs}
    update_config(raw, given)
    configs = load_runs(prefer_command_line(raw, given))
    assert list(configs) == ["own", "swept-seed_1", "swept-seed_2", "nested", "none"]
    assert {c.training.max_steps for c in configs.values()} == {10}
    assert {c.teacher.generation.batch_size for c in configs.values()} == {2}
    assert configs["own"].training.alpha == 0.2 and configs["nested"].teacher.generation.packing


def test_runs_of_the_command_line_are_its_own() -> None:
    given = parse_config(["training={max_steps: 10}", "runs={a: {training: {max_steps: 20}}}"])
    raw: dict[str, Any] = dict(STUDENT)
    update_config(raw, given)
    assert load_runs(prefer_command_line(raw, given))["a"].training.max_steps == 20
