"""Values are read in the types of their keys; one wrong key or value is refused with the fix."""

import datetime
from typing import Any

import pytest
import yaml
from snakemake.cli import parse_config

from retort.config.load import find_problems, load_runs, read_key
from retort.config.schema import ConfigError, merge
from retort.config.sections import key_paths, section_at
from support.configs import STUDENT, find, load, nested, refusal


def test_a_config_with_only_a_student_is_the_demo_with_all_defaults() -> None:
    runs = load_runs(STUDENT)
    assert list(runs) == ["student"]
    assert runs["student"].dataset.name == runs["student"].teacher.model_path == "demo"
    assert runs["student"].cache.temperatures == (1.0, 2.0)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("dataset.max_samples", "10", 10),
        ("dataset.max_samples", "1e3", 1000),
        ("dataset.max_samples", 1000.0, 1000),
        ("dataset.max_samples", "null", None),
        ("dataset.max_samples", "None", None),
        ("dataset.append_eos", "False", False),
        ("dataset.append_eos", "true", True),
        ("dataset.append_eos", "no", False),
        ("dataset.config_name", "", None),
        ("dataset.config_name", 20231101, "20231101"),
        ("dataset.data_files", None, None),
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.learning_rate", "5.E-05", 5e-5),
        ("training.temperature", 2, 2.0),
        ("cache.temperatures", "[1.0, 2]", (1.0, 2.0)),
        ("cache.temperatures", ["1", "2.0"], (1.0, 2.0)),
        ("cache.top_k", "full", "full"),
        ("cache.top_k", "64", 64),
        ("teacher.generation.gpus", 0, "0"),
        ("teacher.generation.gpus", "0,1", "0,1"),
        ("teacher.generation.gpus", [1, "2,3"], ("1", "2,3")),
        ("teacher.generation.gpus", "['1', '2,3']", ("1", "2,3")),
        ("teacher.generation.force_regenerate", "False", False),
        ("teacher.generation.force_regenerate", "7", 7),
        ("teacher.generation.force_regenerate", "2026-05-31", "2026-05-31"),
        ("teacher.generation.force_regenerate", datetime.date(2026, 5, 31), "2026-05-31"),
        ("teacher.revision", "1e5", "1e5"),
    ],
)
def test_a_value_is_read_in_its_keys_type(key: str, text: Any, value: Any) -> None:
    found = find(load(nested(key, text)), key)
    assert (type(found), found) == (type(value), value)


def test_an_exponent_without_a_dot_is_a_number_though_yaml_reads_text() -> None:
    raw = yaml.safe_load("training: {learning_rate: 3e-4}")
    assert isinstance(raw["training"]["learning_rate"], str)
    assert load(raw).training.learning_rate == 3e-4


def test_config_on_the_command_line_is_read_like_a_file() -> None:
    typed = parse_config(
        [
            "dataset={max_samples: 10, streaming: False}",
            "cache={temperatures: [1.0, 4], top_k: full}",
            "training={temperature: 4, max_steps: null, learning_rate: 1e-3}",
            "teacher={generation: {gpus: '0,1', gpus_per_model: 2}}",
        ]
    )
    config = load(typed)
    assert (config.dataset.max_samples, config.dataset.streaming) == (10, False)
    assert config.cache.temperatures == (1.0, 4.0) and config.cache.top_k == "full"
    assert (config.training.temperature, config.training.max_steps) == (4.0, None)
    assert config.training.learning_rate == 1e-3
    assert config.teacher.generation.gpus == "0,1"


def test_a_whole_section_given_as_text_is_read() -> None:
    assert load({"dataset": "{max_samples: 10}"}).dataset.max_samples == 10


@pytest.mark.parametrize("nothing", [None, "", {}])
def test_a_section_without_keys_has_its_defaults(nothing: Any) -> None:
    assert load({"training": nothing, "runs": nothing}) == load()


def test_reading_twice_changes_nothing() -> None:
    for path in key_paths():
        section = section_at(path[:-1])
        assert section is not None
        default = section.model_fields[path[-1]].default
        for value in ("10", "null", "True", "1e3", "full", "[1, 2]", default):
            try:
                once = read_key(path, value)
            except ConfigError:
                continue
            assert read_key(path, once) == once


@pytest.mark.parametrize(
    "raw, found, hint",
    [
        ({"training": {"alhpa": 0.1}}, "training.alhpa", "training.alpha"),
        ({"trainig": {"alpha": 0.1}}, "trainig", "training"),
        ({"cahce": None}, "cahce", "cache"),
        ({"alpha": 0.1}, "alpha", "training.alpha: 0.1"),
        ({"training": {"top_k": 4}}, "training.top_k", "cache.top_k: 4"),
        ({"distillation": {"alpha": 0.1}}, "distillation", "alpha -> training.alpha"),
        ({"distillation": {"temperature": 2}}, "distillation", "training.temperature"),
        ({"distillation": {"type": "logit"}}, "distillation", "training.distillation_type"),
        ({"teacher_logits": {"top_k": 4}}, "teacher_logits", "cache.top_k"),
        ({"teacher_logits": "{top_k: 4}"}, "teacher_logits", "cache.top_k"),
        ({"teacher_logits": {"output_dir": "x"}}, "teacher_logits", "output.cache_dir"),
        ({"teacher_model": "gpt2"}, "teacher_model", "teacher.model_path: 'gpt2'"),
        ({"device": "cpu"}, "device", "teacher.device or training.device"),
        ({"devices": "0,1"}, "devices", "teacher.generation.gpus"),
        ({"worker_id": 1}, "worker_id", "teacher.generation.num_workers"),
        ({"total_workers": 4}, "total_workers", "teacher.generation.num_workers: 4"),
        (
            {"num_workers": 4},
            "num_workers",
            "teacher.generation.num_workers or training.dataloader",
        ),
        ({"train_data": "a"}, "train_data", "dataset.data_files"),
        ({"student_config": "a"}, "student_config", "student.config"),
        ({"output_dir": "a"}, "output_dir", "output.results_dir"),
        ({"teacher": {"generation": {"top_k": 4}}}, "teacher.generation.top_k", "cache.top_k"),
        ({"teacher": {"batch_size": 4}}, "teacher.batch_size", "teacher.generation.batch_size"),
        ({"training": {"num_workers": 2}}, "training.num_workers", "dataloader_num_workers"),
        ({"dataset": {"max_seq_length": 5}}, "dataset.max_seq_length", "dataset.max_length"),
        ({"training": {"max_seq_length": 5}}, "training.max_seq_length", "dataset.max_length: 5"),
        (
            {"runs": {"a": {"training": {"max_seq_length": 5}}}},
            "runs.a.training.max_seq_length",
            "dataset.max_length: 5",
        ),
        ({"runs": {"a": {"alpha": 0.1}}}, "runs.a.alpha", "runs.a.training.alpha"),
        ({"runs": {"a": {"training": {"lr": 0.1}}}}, "runs.a.training.lr", "learning_rate"),
        ({"runs": {"a": {"runs": {}}}}, "runs.a.runs", "at the top of the config"),
        ({"runs": {"a": {"output_dir": "x"}}}, "runs.a.output_dir", "as output.results_dir: 'x'"),
        ({"runs": {"a": {"trainig": {}}}}, "runs.a.trainig", "runs.a.training?"),
        (
            {"evaluation": {"num_samples": 2}},
            "evaluation.num_samples",
            "as evaluation.samples.num_samples: 2",
        ),
        (
            {"evaluation": {"benchmark_limit": 2}},
            "evaluation.benchmark_limit",
            "as evaluation.benchmarks.limit: 2",
        ),
        (
            {"runs": {"a": {"evaluation": {"humaneval_file": "x"}}}},
            "runs.a.evaluation.humaneval_file",
            "as runs.a.evaluation.humaneval.file: 'x'",
        ),
        ({"qwertz": 1}, "qwertz", "config/README.md"),
        ({"qwertz": {"asdf": 1}}, "qwertz", "config/README.md"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(
    raw: dict[str, Any], found: str, hint: str
) -> None:
    message = refusal(merge(STUDENT, raw))
    assert message.startswith(f"Unknown config key {found}. ") and hint in message


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("training.alpha", 2, ["is 2.0", "a number from 0 to 1 or null", "default (null)"]),
        ("training.alpha", "half", ["is 'half'", "a number from 0 to 1"]),
        ("training.learning_rate", 0, ["is 0.0", "a number > 0", "default (0.0001)"]),
        ("training.learning_rate", float("nan"), ["is NaN", "a number > 0"]),
        ("training.learning_rate", "1e999", ["is Infinity", "a number > 0"]),
        ("training.max_steps", 0, ["is 0", "an integer >= 1 or null"]),
        ("training.batch_size", 2.5, ["is 2.5", "an integer >= 1", "default (8)"]),
        ("training.batch_size", True, ["is true", "an integer >= 1"]),
        ("training.batch_size", {"a": 1}, ['is {"a": 1}', "an integer >= 1"]),
        ("training.seed", 2**32, ["is 4294967296", "an integer from 0 to 4294967295"]),
        ("training.distillation_type", "hybird", ["one of output, logit, hybrid", "mean hybrid?"]),
        ("training.save_total_limit", 1, ["is 1", "an integer >= 2", "incomplete"]),
        ("dataset.max_length", 1, ["is 1", "an integer >= 2"]),
        ("dataset.max_samples", 0, ["is 0", "an integer >= 1 or null"]),
        ("dataset.validation_fraction", 1, ["is 1.0", "a number >= 0 and < 1"]),
        ("dataset.streaming", "maybe", ["is 'maybe'", "true or false"]),
        ("dataset.streaming", 1, ["is 1", "true or false"]),
        ("dataset.name", "", ["is ''", "text"]),
        ("dataset.sharding", "random", ["is 'random'", "interleaved, contiguous, files or module"]),
        ("dataset.data_files", [], ["is []", "a list of texts (at least one)"]),
        ("cache.top_k", "ful", ["is 'ful'", "an integer >= 1 or full", "default (64)"]),
        ("cache.top_k", 0, ["is 0", "an integer >= 1 or full"]),
        ("cache.temperatures", [1.0, 0], ["cache.temperatures[1] is 0.0", "a number > 0"]),
        ("cache.temperatures", [1.0, "x"], ["cache.temperatures[1] is 'x'", "a number > 0"]),
        ("cache.temperatures", [2, 2.0], ["is [2.0, 2.0]", "none twice"]),
        ("cache.temperatures", 2.0, ["is 2.0", "a list of numbers > 0", "default ([1.0, 2.0])"]),
        ("teacher.dtype", "bf16", ["is 'bf16'", "one of auto, float32, bfloat16, float16"]),
        ("teacher.generation.num_workers", 0, ["is 0", "an integer >= 1 or null"]),
        ("dataset.data_files", ["a", ""], ["dataset.data_files[1] is ''", "text is expected"]),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_expected(
    key: str, value: Any, words: list[str]
) -> None:
    for prefix in ("", "runs.mine."):
        message = refusal(merge(STUDENT, nested(prefix + key, value)))
        assert message.startswith(prefix + key), message
        assert [w for w in words if w not in message] == [], message
        assert "leave the key out for its default" in message


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"training": 3}, ["training is 3", "a section of 'key: value' lines", "alpha"]),
        ({"teacher": "gpt2"}, ["teacher is 'gpt2'", "teacher.model_path: gpt2?"]),
        ({"dataset": "wikitext"}, ["dataset.name: wikitext?"]),
        (
            {"evaluation": {"benchmarks": ["piqa"]}},
            ["evaluation.benchmarks is", 'evaluation.benchmarks.tasks: ["piqa"]?'],
        ),
        ({"runs": ["a"]}, ['runs is ["a"]', "one entry per student"]),
        ({"runs": {"a": 0.5}}, ["runs.a is 0.5", "a section of 'key: value' lines"]),
        ({"runs": {"a": {"training": "x"}}}, ["runs.a.training is 'x'"]),
    ],
)
def test_a_value_in_place_of_a_section_is_refused(raw: dict[str, Any], words: list[str]) -> None:
    message = refusal(merge(STUDENT, raw))
    assert [w for w in words if w not in message] == [], message


@pytest.mark.parametrize(
    "key, value",
    [("training.batch_size", 3), ("cache.top_k", "full"), ("dataset.append_eos", False)],
)
@pytest.mark.parametrize("null", [None, "null", "~"])
def test_null_sets_an_inherited_key_back_that_does_not_take_null(
    key: str, value: Any, null: Any
) -> None:
    base = merge(STUDENT, nested(key, value))
    runs = load_runs(base | {"runs": {"as_inherited": {}, "back": nested(key, null)}})
    assert find(runs["as_inherited"], key) == value
    assert find(runs["back"], key) == find(load(), key) == find(load(nested(key, null)), key)


def test_all_mistakes_are_found_at_once_each_at_its_key() -> None:
    raw = {
        "student": {"config": "a.json", "model_path": "b"},
        "training": {"alpha": 2, "alhpa": 1, "temperature": 3, "seed": "x"},
        "cache": {"temperatures": [1, "y"]},
        "tracking": 5,
        "runs": {
            "good": {"training": {"alpha": 0.5, "seed": 1}},
            "bad": {"dataset": {"max_length": 1, "streaming": True}},
            "two words": {},
            "sweep": {"training": {"batch_size": [1, "z"]}},
        },
    }
    configs, problems = find_problems(raw)
    assert list(configs) == ["good", "bad", "sweep-batch_size_1", "sweep-batch_size_z"]
    assert sorted(".".join(path) for path, _ in problems) == [
        "cache.temperatures",
        "runs.bad.dataset.max_length",
        "runs.bad.dataset.streaming",
        "runs.sweep.training.batch_size",
        "runs.two words",
        "student.config",
        "tracking",
        "training.alhpa",
        "training.alpha",
        "training.seed",
    ]
    with pytest.raises(ConfigError) as caught:
        load_runs(raw)
    assert caught.value.problems == tuple(problems)
    assert str(caught.value).startswith("The config has 10 mistakes:\n")
    assert [m for _, m in problems if m not in str(caught.value)] == []


def test_a_mistake_that_all_runs_inherit_is_listed_once() -> None:
    runs = {"runs": {"sweep": {"training": {"seed": [0, 1, 2, 3, 4]}}}}
    message = refusal(merge(STUDENT, {"training": {"temperature": 3}} | runs))
    names = "'sweep-seed_0', 'sweep-seed_1', 'sweep-seed_2' and 2 more"
    assert message.startswith(f"In runs {names}: training.temperature is 3.0")
