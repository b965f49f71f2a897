"""The config: read by the schema's types, refused with one clear sentence, the same as flags."""

import argparse
import datetime
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from snakemake.cli import parse_config  # type: ignore[import-untyped]

from retort.config.flags import add_section_flags, section_flags, section_from_args
from retort.config.load import identity, load_runs
from retort.config.reference import readme
from retort.config.schema import (
    _MOVED,
    ConfigError,
    Schema,
    fill_defaults,
    is_section,
    leaves,
    load_schema,
    merge,
    read_value,
    section_schema,
)
from retort.config.sections import SECTIONS, Config, Generation, Teacher, build_section, freeze

REPOSITORY = Path(__file__).resolve().parents[3]
STUDENT = {"student": {"config": "config/students/llama_demo.json"}}
KEYS = [pytest.param(path, schema, id=".".join(path)) for path, schema in leaves()]


def load(*overrides: Mapping[str, Any]) -> Config:
    """Load one run: the demo's student with overrides."""
    raw: dict[str, Any] = STUDENT
    for override in overrides:
        raw = merge(raw, override)
    return load_runs(raw)["student"]


def nested(key: str, value: Any) -> dict[str, Any]:
    """Write a dotted key as a config would."""
    for step in reversed(key.split(".")):
        value = {step: value}
    return typing.cast(dict[str, Any], value)


def find(config: Config, key: str) -> Any:
    """Return a dotted key's value from a loaded config."""
    value: Any = config
    for step in key.split("."):
        value = getattr(value, step)
    return value


def refusal(raw: Mapping[str, Any]) -> str:
    """Return the one sentence that refuses a config."""
    with pytest.raises(ConfigError) as caught:
        load_runs(raw)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# The schema, the records and the README are one.


def test_the_schema_is_a_valid_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(load_schema())


@pytest.mark.parametrize("path, schema", KEYS)
def test_every_key_has_a_type_a_description_and_a_legal_default(
    path: tuple[str, ...], schema: Schema
) -> None:
    assert schema["description"].endswith(".") and "type" in schema
    read = read_value(path, schema["default"])
    assert (type(read), read) == (type(schema["default"]), schema["default"])


@pytest.mark.parametrize("section", SECTIONS)
def test_a_record_has_exactly_the_schemas_keys_in_its_order(section: str) -> None:
    assert [f.name for f in fields(SECTIONS[section])] == list(
        section_schema(section)["properties"]
    )
    assert section_schema(section)["additionalProperties"] is False


def test_a_config_has_exactly_the_schemas_sections_in_its_order() -> None:
    assert [f.name for f in fields(Config)] == [
        s for s in load_schema()["properties"] if s != "runs"
    ]


@pytest.mark.parametrize("path, schema", KEYS)
def test_a_field_has_the_types_of_its_schema(path: tuple[str, ...], schema: Schema) -> None:
    hint = typing.get_type_hints(SECTIONS[".".join(path[:-1])])[path[-1]]
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    found = {names.get(kind, "array") for kind in union}
    assert found == ({schema["type"]} if isinstance(schema["type"], str) else set(schema["type"]))


def test_runs_may_override_every_section_but_output() -> None:
    runs = load_schema()["properties"]["runs"]["additionalProperties"]["properties"]
    assert set(runs) == set(load_schema()["properties"]) - {"runs", "output"}


def test_the_committed_readme_is_the_generated_one() -> None:
    command = "python -m retort.config.reference > config/README.md"
    committed = (REPOSITORY / "config" / "README.md").read_text(encoding="utf-8")
    assert committed == readme(), f"run: {command}"


def test_the_readme_names_every_key() -> None:
    assert [key for key, _ in leaves() if f"| `{key[-1]}` |" not in readme()] == []


def test_reading_a_config_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'h5py'}"
    code = f"import sys, retort.config.load; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Reading values.


def test_an_empty_config_but_for_a_student_is_the_demo_with_every_default() -> None:
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
def test_a_value_is_read_by_the_keys_type(key: str, text: Any, value: Any) -> None:
    found = find(load(nested(key, text)), key)
    assert (type(found), found) == (type(value), value)


def test_yaml_reads_an_exponent_without_a_dot_as_text_and_we_as_a_number() -> None:
    raw = yaml.safe_load("training: {learning_rate: 3e-4}")
    assert isinstance(raw["training"]["learning_rate"], str)
    assert load(raw).training.learning_rate == 3e-4


def test_config_on_the_command_line_is_read_as_a_file_would_be() -> None:
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
def test_a_section_whose_keys_are_all_commented_out_is_at_its_defaults(nothing: Any) -> None:
    assert load({"training": nothing, "runs": nothing}) == load()


def test_reading_twice_changes_nothing() -> None:
    for path, schema in leaves():
        for value in ("10", "null", "True", "1e3", "full", "[1, 2]", schema["default"]):
            try:
                once = read_value(path, value)
            except ConfigError:
                continue
            assert read_value(path, once) == once


# One wrong key.


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
        ({"num_workers": 4}, "num_workers", "teacher.generation.num_workers: 4"),
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
        ({"runs": {"a": {"runs": {}}}}, "runs.a.runs", "config/README.md"),
        ({"runs": {"a": {"output_dir": "x"}}}, "runs.a.output_dir", "as output.results_dir: 'x'"),
        ({"runs": {"a": {"trainig": {}}}}, "runs.a.trainig", "runs.a.training?"),
        ({"qwertz": 1}, "qwertz", "config/README.md"),
        ({"qwertz": {"asdf": 1}}, "qwertz", "config/README.md"),
    ],
)
def test_an_unknown_key_is_refused_with_the_place_it_was_meant_for(
    raw: dict[str, Any], found: str, hint: str
) -> None:
    message = refusal(merge(STUDENT, raw))
    assert message.startswith(f"{found} is no key of the config. ") and hint in message


def test_the_places_of_old_names_exist() -> None:
    keys = {".".join(path) for path, _ in leaves()}
    assert {place for places in _MOVED.values() for place in places} <= keys


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
        ("training.batch_size", None, ["is null", "an integer >= 1"]),
        ("training.batch_size", {"a": 1}, ['is {"a": 1}', "an integer >= 1"]),
        ("training.seed", 2**32, ["is 4294967296", "an integer from 0 to 4294967295"]),
        ("training.distillation_type", "hybird", ["one of output, logit, hybrid", "mean hybrid?"]),
        ("training.save_total_limit", 1, ["is 1", "an integer >= 2", "torn"]),
        ("dataset.max_length", 1, ["is 1", "an integer >= 2"]),
        ("dataset.max_samples", 0, ["is 0", "an integer >= 1 or null"]),
        ("dataset.validation_fraction", 1, ["is 1.0", "a number >= 0 and < 1"]),
        ("dataset.streaming", "maybe", ["is 'maybe'", "true or false"]),
        ("dataset.streaming", 1, ["is 1", "true or false"]),
        ("dataset.name", None, ["is null", "text"]),
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
        ("teacher.generation.force_regenerate", None, ["is null", "true or false"]),
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


@pytest.mark.parametrize("key", ["output.cache_dir", "dataset.text_column"])
def test_two_dashes_are_refused_since_argparse_would_drop_them(key: str) -> None:
    assert "is '--', which no command line can hand on" in refusal(
        merge(STUDENT, nested(key, "--"))
    )
    assert find(load(nested(key, "./--")), key) == "./--"


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"training": 3}, ["training is 3", "a section of 'key: value' lines", "alpha"]),
        ({"teacher": "gpt2"}, ["teacher is 'gpt2'", "teacher.model_path: gpt2?"]),
        ({"dataset": "wikitext"}, ["dataset.name: wikitext?"]),
        ({"runs": ["a"]}, ['runs is ["a"]', "one entry per student"]),
        ({"runs": {"a": 0.5}}, ["runs.a is 0.5", "a section of 'key: value' lines"]),
        ({"runs": {"a": {"training": "x"}}}, ["runs.a.training is 'x'"]),
    ],
)
def test_a_section_that_is_none_is_refused(raw: dict[str, Any], words: list[str]) -> None:
    message = refusal(merge(STUDENT, raw))
    assert [w for w in words if w not in message] == [], message


# Keys that contradict each other.

STREAM = {"dataset": {"name": "org/corpus", "streaming": True}}
LOGIT = {"training": {"distillation_type": "logit"}}
OUTPUT = {"training": {"distillation_type": "output"}}


@pytest.mark.parametrize(
    "raw, found, advice",
    [
        (STREAM, "dataset.max_samples is null", "Set dataset.max_samples"),
        (
            merge(STREAM, {"dataset": {"max_samples": 9, "sharding": "contiguous"}}),
            "dataset.sharding is contiguous",
            "Use dataset.sharding: interleaved",
        ),
        (
            {"dataset": {"sharding": "files"}},
            "dataset.sharding is files, but dataset.name is 'demo'",
            "Use dataset.sharding: interleaved",
        ),
        (
            {"dataset": {"name": "org/corpus", "sharding": "files"}},
            "dataset.sharding is files and dataset.name is 'org/corpus'",
            "Set dataset.streaming: true",
        ),
        (
            {"dataset": {"name": "json"}},
            "dataset.name is 'json'",
            "Set dataset.data_files to a path",
        ),
        (
            {"dataset": {"data_files": "a.jsonl"}},
            "dataset.data_files is 'a.jsonl'",
            "Set dataset.name to the loader of your files: one of text, json, parquet, csv",
        ),
        (
            {"dataset": {"prompt_column": "q"}},
            "dataset.prompt_column is 'q', but dataset.response_column is null",
            "Set dataset.response_column too",
        ),
        (
            {"dataset": {"response_column": "a"}},
            "dataset.response_column is 'a', but dataset.prompt_column is null",
            "Set dataset.prompt_column too",
        ),
        (
            {"dataset": {"prompt_column": "q", "response_column": "a", "text_column": "body"}},
            "dataset.text_column is 'body' and dataset.prompt_column is 'q'",
            "Remove one of the two",
        ),
        (
            {"dataset": {"validation_fraction": 0}},
            "dataset.validation_fraction is 0",
            "Set dataset.validation_fraction above 0",
        ),
        (
            {"dataset": {"validation_split": "train"}},
            "dataset.validation_split is 'train', the same as dataset.split",
            "Name another split",
        ),
        (
            {"dataset": {"validation_split": "test", "validation_fraction": 0.2}},
            "dataset.validation_fraction is 0.2 and dataset.validation_split is 'test'",
            "Remove dataset.validation_fraction",
        ),
        (
            merge(LOGIT, {"teacher": {"model_path": None}}),
            "training.distillation_type is logit",
            "Set teacher.model_path to a model",
        ),
        (
            {"teacher": {"model_path": None}},
            "training.distillation_type is hybrid",
            "training.distillation_type: output",
        ),
        (
            merge(OUTPUT, {"teacher": {"model_path": None}}),
            "teacher.model_path and dataset.tokenizer are both null",
            "Set dataset.tokenizer",
        ),
        (
            {"dataset": {"tokenizer": "gpt2"}},
            "dataset.tokenizer is 'gpt2', but teacher.model_path is 'demo'",
            "Set dataset.tokenizer: null",
        ),
        (
            {"teacher": {"generation": {"gpus": "0,1,2", "gpus_per_model": 4}}},
            "teacher.generation.gpus_per_model is 4, but teacher.generation.gpus lists 3: 0,1,2",
            "List at least 4 GPUs, or lower teacher.generation.gpus_per_model",
        ),
        (
            {"teacher": {"generation": {"gpus": ["0,1", "2,3"], "gpus_per_model": 2}}},
            "gpus_per_model is 2, but teacher.generation.gpus is",
            "Remove teacher.generation.gpus_per_model",
        ),
        (
            {"teacher": {"generation": {"gpus": "0,1,1"}}},
            "GPU 1 stands more than once",
            "List every GPU once",
        ),
        (
            {"teacher": {"generation": {"gpus": ["0,1", "1"]}}},
            "GPU 1 stands more than once",
            "List every GPU once",
        ),
        (
            {"teacher": {"generation": {"gpus": "0;1"}}},
            "where '0;1' is no GPU id",
            'such as "0,1,2,3"',
        ),
        ({"teacher": {"generation": {"gpus": "0,"}}}, "where '' is no GPU id", "Write ids"),
        (
            {"teacher": {"device": "cpu", "generation": {"gpus": "0"}}},
            "teacher.device is cpu, but teacher.generation.gpus is '0'",
            "Remove teacher.generation.gpus",
        ),
        (
            {"cache": {"min_probability": 0.1}},
            "cache.min_probability is 0.1, but cache.method is top_k",
            "Remove cache.min_probability, or set cache.method: top_p",
        ),
        (
            {"cache": {"head_probability": 0.1}},
            "cache.head_probability is 0.1, but cache.method is top_k",
            "Remove cache.head_probability, or set cache.method: sampled",
        ),
        (
            {"cache": {"method": "top_p", "top_k": 8}},
            "cache.top_k is 8, but cache.method is top_p",
            "Remove cache.top_k, or set cache.method: top_k",
        ),
        (
            {"student": {"config": None}},
            "student.config and student.model_path are both null",
            "Set student.config to a transformers config",
        ),
        (
            {"student": {"model_path": "gpt2"}},
            "student.model_path is 'gpt2'",
            "Set one of the two to null",
        ),
        (
            merge(OUTPUT, {"training": {"alpha": 0.5}}),
            "training.alpha is 0.5, but training.distillation_type is output",
            "Set training.alpha: null, or training.distillation_type: hybrid",
        ),
        (
            merge(LOGIT, {"training": {"alpha": 0.5}}),
            "training.alpha is 0.5, but training.distillation_type is logit",
            "training.distillation_type: hybrid to learn from both",
        ),
        (
            {
                "cache": {"method": "sampled", "temperatures": [1.0, 4.0]},
                "training": {"temperature": 1.0},
            },
            "cache.temperatures is [1.0, 4.0], but cache.method is 'sampled'",
            "Leave cache.temperatures out",
        ),
        (
            {
                "cache": {"method": "sampled"},
                "training": {"temperature": 1.0, "divergence": "reverse_kl"},
            },
            "training.divergence is 'reverse_kl', but cache.method is 'sampled'",
            "Use training.divergence: forward_kl, or cache.method: top_p",
        ),
        (
            {"training": {"temperature": 3}},
            "training.temperature is 3.0",
            "cache.temperatures: [1.0, 2.0, 3.0] (a new cache is made), or use one of [1.0, 2.0]",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    raw: dict[str, Any], found: str, advice: str
) -> None:
    message = refusal(merge(STUDENT, raw))
    assert found in message and advice in message, message


@pytest.mark.parametrize(
    "raw",
    [
        merge(STREAM, {"dataset": {"max_samples": 9}}),
        {"training": {"temperature": 3.0, "use_cached_logits": False}},
        {"training": {"temperature": 3.0}, "cache": {"top_k": "full"}},
        merge(OUTPUT, {"training": {"temperature": 3.0, "alpha": 1.0}}),
        merge(LOGIT, {"training": {"alpha": 0.0}}),
        {"dataset": {"validation_split": "test", "validation_fraction": 0}},
        {"dataset": {"name": "org/corpus", "data_files": "en/*.parquet"}},
        {"teacher": {"generation": {"gpus": "1, 3,5", "gpus_per_model": 2}}},
        {"teacher": {"generation": {"gpus": "GPU-8f2c,MIG-GPU-8f2c/1/0"}}},
        {"training": {"max_steps": 5, "num_epochs": 2}},
        {"tracking": {"use_wandb": True, "wandb_project": "p", "use_tensorboard": True}},
    ],
)
def test_what_is_no_contradiction_is_accepted(raw: dict[str, Any]) -> None:
    load(raw)


@pytest.mark.parametrize("kind, alpha", [("output", 1.0), ("logit", 0.0), ("hybrid", 0.5)])
def test_alpha_follows_the_distillation_type_and_is_never_null(kind: str, alpha: float) -> None:
    assert load({"training": {"distillation_type": kind}}).training.alpha == alpha


def test_ranks_that_could_not_share_a_step_or_a_student_are_refused_before_any_job() -> None:
    message = refusal(merge(STUDENT, {"training": {"gpus": 3, "batch_size": 4}}))
    assert "training.gpus x training.nodes is 3" in message and "is 4 sequences a step" in message
    message = refusal(merge(STUDENT, {"training": {"strategy": "fsdp", "device": "cpu"}}))
    assert "training.strategy is 'fsdp' and training.device is 'cpu'" in message


# Runs.


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


def test_a_run_may_bring_what_the_base_lacks() -> None:
    configs = load_runs({"runs": {"a": STUDENT, "b": {"student": {"model_path": "x"}}}})
    assert (configs["a"].student.model_path, configs["b"].student.model_path) == (None, "x")


def test_a_contradiction_in_a_run_names_the_run() -> None:
    runs = {"good": {}, "bad": {"training": {"temperature": 8}}}
    assert refusal(STUDENT | {"runs": runs}).startswith("In run 'bad': training.temperature is 8.0")


def test_runs_share_their_folders() -> None:
    message = refusal(STUDENT | {"runs": {"a": {"output": {"results_dir": "x"}}}})
    assert message.startswith("runs.a.output is set") and "top of the config" in message


@pytest.mark.parametrize("name", ["a b", "../up", ".hidden", "-x", "", "a/b", "a\n", "\u00e9"])
def test_a_run_that_cannot_be_a_folder_is_refused_with_a_better_name(name: str) -> None:
    message = refusal(STUDENT | {"runs": {name: {}}})
    proposed = message.rsplit("instance to '", 1)[1].rstrip("'.")
    assert list(load_runs(STUDENT | {"runs": {proposed: {}}})) == [proposed]


def test_a_run_named_by_a_number_is_a_run() -> None:
    assert list(load_runs(STUDENT | {"runs": yaml.safe_load("{1: {}, v1.0-b: {}}")})) == [
        "1",
        "v1.0-b",
    ]


# Identity.


def test_the_default_config_has_an_empty_identity() -> None:
    config = load(OUTPUT, {"training": {"distillation_type": "hybrid"}})
    assert identity(config.dataset) == identity(config.teacher) == identity(config.cache) == {}
    assert identity(config.training) == {"alpha": 0.5}


def test_identity_holds_what_was_changed_ready_for_json() -> None:
    config = load(
        {
            "cache": {"top_k": 8, "temperatures": [1, 2, 3]},
            "teacher": {"generation": {"cpu_threads": 2}},
        }
    )
    assert identity(config.cache) == {"top_k": 8, "temperatures": [1.0, 2.0, 3.0]}
    assert identity(config.teacher) == {"generation": {"cpu_threads": 2}}


def test_a_number_counts_the_same_however_it_is_written() -> None:
    ways = [load({"training": {"temperature": t}}) for t in (1, 1.0, "1", "1.0", "1e0")]
    assert {repr(identity(c.training)) for c in ways} == {"{'alpha': 0.5, 'temperature': 1.0}"}


def test_zero_is_not_false_where_both_are_legal() -> None:
    config = load({"teacher": {"generation": {"force_regenerate": 0}}})
    assert identity(config.teacher.generation) == {"force_regenerate": 0}


def test_machine_settings_name_nothing() -> None:
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
    named = [identity(getattr(config, section.name)) for section in fields(Config)]
    assert [n for n in named if n] == [
        {"config": "config/students/llama_demo.json"},
        {"alpha": 0.5},
    ]


# Flags.


def values_of(schema: Schema) -> st.SearchStrategy[Any]:
    """Draw values as a person would write them, most of them legal."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "accepts" in schema:
        words = ["full", "interleaved", "contiguous", "my.module:deal"]
        return st.sampled_from(words) | st.integers(1, 99)
    texts = st.text(min_size=1, max_size=9) | st.sampled_from(["-x", "--flag", "a b", "%s", "[a]"])
    drawn = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(schema.get("minimum", 0), schema.get("maximum", 2**40)),
        "number": st.floats(0, 1e6, allow_subnormal=False),
        "string": texts,
        "array": st.deferred(lambda: st.lists(values_of(schema["items"]), max_size=3)),
    }
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return st.one_of([drawn[kind] for kind in kinds])


@st.composite
def records(draw: st.DrawFn, section: str) -> Any:
    """Draw a section's record: some keys at their default, others at any legal value."""
    schema = section_schema(section)
    values = fill_defaults({}, schema)
    for key, sub in schema["properties"].items():
        if is_section(sub) or (section, key) == ("teacher.generation", "num_workers"):
            continue
        if draw(st.booleans()):
            try:
                path = (*section.split("."), key)
                values[key] = freeze(read_value(path, draw(values_of(sub))))
            except ConfigError:
                continue
    return build_section(section, values)


@pytest.mark.parametrize("section", SECTIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flags_read_back_are_the_section(section: str, data: st.DataObject) -> None:
    record = data.draw(records(section))
    parser = argparse.ArgumentParser()
    add_section_flags(parser, section)
    assert section_from_args(parser.parse_args(section_flags(record)), section) == record


def test_a_section_at_its_defaults_needs_no_flags() -> None:
    config = load()
    assert section_flags(config.dataset) == section_flags(config.teacher.generation) == []
    assert section_flags(config.training) == ["--alpha", "0.5"]


def test_a_teacher_takes_its_generation_from_flags_where_there_are_any() -> None:
    config = load({"teacher": {"model_path": "m", "generation": {"batch_size": 9}}})
    teacher = config.teacher
    parser = argparse.ArgumentParser()
    add_section_flags(parser, "teacher")
    alone = section_from_args(parser.parse_args(section_flags(teacher)), "teacher")
    add_section_flags(parser, "teacher.generation")
    flags = section_flags(teacher) + section_flags(teacher.generation)
    assert section_from_args(parser.parse_args(flags), "teacher") == teacher
    defaults = fill_defaults({}, section_schema("teacher.generation"))
    assert alone == Teacher(**{**vars(teacher), "generation": Generation(**defaults)})


@pytest.mark.parametrize(
    "sections",
    [
        ("student", "training", "tracking", "teacher"),
        ("teacher", "teacher.generation", "evaluation"),
        ("teacher", "teacher.generation", "cache", "dataset"),
    ],
)
def test_sections_that_one_script_takes_have_flags_of_different_names(
    sections: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    for section in sections:
        add_section_flags(parser, section)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "Default:" in capsys.readouterr().out


def test_a_worker_is_not_told_the_number_of_workers_by_its_section() -> None:
    config = load({"teacher": {"generation": {"num_workers": 5}}})
    assert section_flags(config.teacher.generation) == []


def test_flags_have_the_names_that_users_know(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    for section in ("student", "training", "teacher", "dataset", "cache", "tracking"):
        add_section_flags(parser, section)
    argv = ["--distillation-type", "logit", "--alpha", "null", "--temperature", "1"]
    argv += ["--student-config", "s.json", "--no-use-mixed-precision", "--num-workers", "2"]
    argv += ["--teacher-model-path", "m", "--dataset-max-samples", "5", "--cache-top-k", "full"]
    argv += ["--cache-temperatures", "[1, 4]", "--use-wandb", "--max-steps", "7"]
    args = parser.parse_args(argv)
    training = section_from_args(args, "training")
    assert (training.distillation_type, training.alpha) == ("logit", None)
    assert (training.use_mixed_precision, training.dataloader_num_workers) == (False, 2)
    assert section_from_args(args, "cache").temperatures == (1.0, 4.0)
    assert section_from_args(args, "tracking").use_wandb
    with pytest.raises(SystemExit):
        parser.parse_args(["--alpha", "2"])
    assert "training.alpha is 2.0, but a number from 0 to 1" in capsys.readouterr().err
