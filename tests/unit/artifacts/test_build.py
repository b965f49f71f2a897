"""What an artifact is made from changes its id, and nothing else does."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.artifacts.build import build_project, training_keys
from retort.artifacts.project import Project
from retort.config.config_files import locate, read_files
from retort.config.load import load_runs
from retort.config.schema import merge
from retort.config.sections import Evaluation, Training, key_paths
from retort.config.sweeps import nest
from retort.io.fingerprints import TokenizerIdentity, fingerprint_tokenizer, fingerprint_weights
from support.records import make_teacher_record

Build = Callable[..., Project]
KINDS = {"corpora", "teachers", "tokens", "logits", "validations", "run", "evaluation"}
TEACHER = {"teachers", "tokens", "logits", "validations", "run", "evaluation"}


@pytest.fixture
def raw(
    tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path, tiny_student: Path
) -> dict[str, Any]:
    """A config of copies of the tiny teacher, corpus and student, which tests may change."""
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    shutil.copy(tiny_corpus, tmp_path / "corpus.jsonl")
    shutil.copy(tiny_student, tmp_path / "student.json")
    return {
        "output": {"results_dir": str(tmp_path / "results")},
        "dataset": {"name": "json", "data_files": str(tmp_path / "corpus.jsonl")},
        "teacher": {"model_path": str(tmp_path / "teacher")},
        "student": {"config": str(tmp_path / "student.json")},
    }


@pytest.fixture
def build(raw: dict[str, Any]) -> Build:
    """A function from overrides of the config to its project."""
    return lambda **overrides: build_project(load_runs(merge(raw, overrides)))


def ids(project: Project) -> dict[str, Any]:
    """All ids of a project with one run."""
    (run,) = project.runs.values()
    kinds = ("corpora", "teachers", "tokens", "logits", "validations")
    found: dict[str, Any] = {kind: sorted(getattr(project, kind)) for kind in kinds}
    return found | {"run": run.id, "evaluation": run.evaluation_id}


def changed(before: Project, after: Project) -> set[str]:
    """The kinds of artifact whose ids differ."""
    one, other = ids(before), ids(after)
    return {kind for kind in one if one[kind] != other[kind]}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"training": {"alpha": 0.3}}, {"run"}),
        ({"training": {"temperature": 1.0}}, {"run"}),
        ({"training": {"max_steps": 7}}, {"run"}),
        ({"training": {"distillation_type": "logit"}}, {"run"}),
        ({"training": {"use_cached_logits": False}}, {"run", "logits"}),
        ({"cache": {"top_k": 8}}, {"logits", "run"}),
        ({"cache": {"temperatures": [1.0, 2.0, 4.0]}}, {"logits", "run"}),
        ({"teacher": {"generation": {"batch_size": 2}}}, {"logits", "run"}),
        ({"teacher": {"dtype": "bfloat16"}}, TEACHER - {"tokens"}),
        ({"teacher": {"generation": {"force_regenerate": "monday"}}}, TEACHER),
        ({"dataset": {"max_length": 64}}, KINDS - {"corpora", "teachers"}),
        ({"dataset": {"append_eos": False}}, KINDS - {"corpora", "teachers"}),
        ({"dataset": {"max_samples": 50}}, KINDS - {"teachers"}),
        ({"dataset": {"seed": 1}}, KINDS - {"teachers"}),
        ({"evaluation": {"max_positions": 99}}, {"validations", "evaluation"}),
        ({"training": {"divergence": "skew_forward_kl"}}, {"run"}),
        ({"training": {"divergence": "skew_forward_kl", "skew": 0.2}}, {"run"}),
        ({"training": {"position_weights": "teacher_entropy"}}, {"run"}),
        ({"training": {"alpha_end": 0.1}}, {"run"}),
        ({"training": {"temperature_end": 1.0}}, {"run"}),
        ({"training": {"eval_steps": 7, "load_best_model_at_end": True}}, {"run"}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_setting_changes_the_ids_of_what_is_made_from_it_and_no_others(
    build: Build, overrides: dict[str, Any], expected: set[str]
) -> None:
    assert changed(build(), build(**overrides)) == expected


def test_a_mixture_of_teachers_has_the_caches_of_each_alone(
    build: Build, raw: dict[str, Any], tmp_path: Path
) -> None:
    one, other = str(tmp_path / "teacher"), str(tmp_path / "other")
    shutil.copytree(one, other)
    generation = {"batch_size": 2}
    runs: dict[str, Any] = {
        "one": {},
        "other": {"teacher": {"model_path": other, "dtype": "float32"}},
        "both": {"teacher": {"mix": [{}, {"model_path": other, "dtype": "float32", "weight": 2}]}},
        "alone": {"teacher": {"mix": [{"weight": 3}]}},
        "text": {
            "teacher": {"mix": [{"model_path": other, "dtype": "float32", "weight": 2}, {}]},
            "training": {"distillation_type": "output"},
        },
    }
    found = build(dataset={"tokenizer": one}, teacher={"generation": generation}, runs=runs).runs
    parts = {name: [logits.id for logits in run.logits] for name, run in found.items()}
    assert parts["both"] == parts["one"] + parts["other"] and len({*parts["both"]}) == 2
    assert parts["alone"] == parts["one"] and found["alone"].id == found["one"].id
    both, text = found["both"], found["text"]
    assert both.features == found["one"].features + found["other"].features
    assert text.features == both.features and text.evaluation_id == both.evaluation_id
    assert len({run.id for run in found.values()}) == 4
    assert [path.name for path in both.signals] == ["manifest.json"] * 2
    halves = merge(
        runs["both"], {"teacher": {"mix": [{}, {"model_path": other, "dtype": "float32"}]}}
    )
    again = build(
        dataset={"tokenizer": one}, teacher={"generation": generation}, runs={"both": halves}
    ).runs["both"]
    assert again.id != both.id and again.evaluation_id != both.evaluation_id
    assert [logits.id for logits in again.logits] == parts["both"]


def expected_of_evaluation(*key: str) -> set[str]:
    """Return what a key of `evaluation` changes: by its section, so that a new key is in no other artifact's id."""
    if key in (("batch_size",), ("benchmarks", "teacher"), ("humaneval", "allow_code_execution")):
        return set()
    if len(key) == 1 or key[0] == "samples":
        return {"validations", "evaluation"}
    if key[0] == "humaneval":
        return {"humaneval"}
    return {"animals"} if key == ("benchmarks", "tasks_dir") else {"animals", "humaneval"}


@pytest.mark.parametrize(
    "key", [k for k in key_paths(Evaluation) if k != ("benchmarks", "tasks")], ids=".".join
)
def test_each_key_of_evaluation_changes_what_its_section_is_about(
    build: Build, key: tuple[str, ...], tmp_path: Path
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for place in (tmp_path / name / "problems", tmp_path / f"{name}.gz"):
            place.write_text(name)
    given: dict[str, Any] = {
        "benchmarks": {"tasks": ["animals", "humaneval"], "tasks_dir": str(tmp_path / "one")},
        "humaneval": {"file": str(tmp_path / "one.gz"), "allow_code_execution": True},
    }
    given["humaneval"] |= {"completions": 2, "temperature": 1.0}
    others: dict[str, Any] = {
        "tasks_dir": str(tmp_path / "other"),
        "file": str(tmp_path / "other.gz"),
    }
    others |= {"allow_code_execution": True, "prompts": ["x"], "pass_at": [1, 2]}
    other = others.get(key[-1], 3)
    other = True if key == ("benchmarks", "teacher") else other
    before = build(evaluation=given)
    after = build(evaluation=merge(given, nest(key, other)))
    found = changed(before, after)
    of_tasks = [
        {task.name: task.id for task in next(iter(p.runs.values())).tasks} for p in (before, after)
    ]
    found |= {name for name in of_tasks[0] if of_tasks[0][name] != of_tasks[1][name]}
    assert found == expected_of_evaluation(*key)


@pytest.mark.parametrize(
    "overrides",
    [
        {"teacher": {"generation": {"num_workers": 5}}},
        {"teacher": {"generation": {"gpus": "0,1", "gpus_per_model": 2}}},
        {"teacher": {"device": "cpu"}},
        {"dataset": {"num_proc": 1}},
        {"dataset": {"streaming_buffer_size": 7, "shuffle": False}},
        {"training": {"save_steps": 3, "save_total_limit": 9, "logging_steps": 2}},
        {"training": {"eval_steps": 3, "eval_sequences": 9, "metric_for_best_model": "eval_kl"}},
        {"training": {"device": "cpu", "dataloader_num_workers": 2}},
        {"evaluation": {"batch_size": 3}},
        {"tracking": {"use_tensorboard": True}},
        {"output": {"results_dir": "elsewhere"}},
        {"output": {"cache_dir": "scratch"}},
        {"output": {"cache_dir": "s3://bucket/scratch"}},
    ],
    ids=json.dumps,
)
def test_settings_of_how_and_where_work_is_done_change_no_id(
    build: Build, overrides: dict[str, Any]
) -> None:
    assert changed(build(), build(**overrides)) == set()


def test_a_key_at_its_default_changes_no_id(build: Build) -> None:
    written = build(
        training={"alpha": 0.5, "temperature": 2, "learning_rate": 1e-4},
        cache={"top_k": 64, "temperatures": [1, 2]},
        dataset={"max_length": 2048},
    )
    assert changed(build(), written) == set()


def test_large_files_are_in_the_cache_folder_and_records_in_the_results_folder(
    build: Build,
) -> None:
    project = build(output={"results_dir": "results", "cache_dir": "scratch"})
    # Teachers too: results folders that share a cache must share its teacher.
    for found in (project.teachers, project.tokens, project.logits, project.validations):
        assert all(item.folder.parts[0] == "scratch" for item in found.values())
    assert all(r.metrics_path.parts[0] == "results" for r in project.runs.values())


def test_a_corpus_counts_by_its_bytes_not_by_its_path_or_date(build: Build, tmp_path: Path) -> None:
    before = build()
    corpus = tmp_path / "corpus.jsonl"
    os.utime(corpus, (1, 1))
    assert changed(before, build()) == set()
    moved = tmp_path / "below" / "renamed.jsonl"
    moved.parent.mkdir()
    corpus.rename(moved)
    assert changed(before, build(dataset={"data_files": str(moved)})) == set()
    assert (
        changed(before, build(dataset={"data_files": [str(tmp_path / "*" / "*.jsonl")]})) == set()
    )
    content = moved.read_bytes()
    moved.write_bytes(content.replace(b"a", b"b", 1))
    after = build(dataset={"data_files": str(moved)})
    assert changed(before, after) == KINDS - {"teachers"}


def test_held_out_files_count_by_their_bytes(build: Build, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("held-a.jsonl", "held-b.jsonl")]
    for path in paths:
        path.write_text(json.dumps({"text": path.name}) + "\n")
    trained = str(tmp_path / "corpus.jsonl")

    def hold_out(*files: Path, train: tuple[Path, ...] = ()) -> Project:
        named = {"data_files": [trained, *map(str, train)], "validation_files": [*map(str, files)]}
        return build(dataset=named)

    before = hold_out(*paths)
    assert changed(build(), before) == KINDS - {"teachers"}
    assert changed(hold_out(paths[1], train=(paths[0],)), before) == KINDS - {"teachers"}
    moved = paths[1].rename(tmp_path / "moved.jsonl")
    assert changed(before, hold_out(paths[0], moved)) == set()
    moved.write_text(json.dumps({"text": "edited"}) + "\n")
    assert changed(before, hold_out(paths[0], moved)) == KINDS - {"teachers"}


def test_a_mixture_counts_by_its_files_weights_and_labels(build: Build, tmp_path: Path) -> None:
    paths = [tmp_path / "corpus.jsonl", tmp_path / "other.jsonl"]
    paths[1].write_text(json.dumps({"text": "another"}) + "\n")

    def mixed(*changes: dict[str, Any]) -> Project:
        sources = [{"name": "json", "data_files": str(path)} for path in paths]
        mix = [source | change for source, change in zip(sources, changes, strict=True)]
        return build(dataset={"name": None, "data_files": None, "mix": mix})

    before = mixed({}, {})
    corpus = KINDS - {"teachers"}
    assert changed(build(), before) == corpus
    assert changed(before, mixed({}, {"weight": 1.0, "label": "other.jsonl"})) == set()
    for change in ({"weight": 2}, {"label": "b"}, {"text_column": "body"}):
        assert changed(before, mixed({}, change)) == corpus
    (tmp_path / "below").mkdir()
    paths[1] = paths[1].rename(tmp_path / "below" / "other.jsonl")
    assert changed(before, mixed({}, {})) == set()
    paths[1].write_text(json.dumps({"text": "edited"}) + "\n")
    assert changed(before, mixed({}, {})) == corpus


def test_the_order_of_a_corpuss_files_counts(build: Build, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("one.jsonl", "other.jsonl")]
    for path in paths:
        Path(path).write_text(json.dumps({"text": path}) + "\n")
    projects = [build(dataset={"data_files": files}) for files in (paths, paths[::-1], paths[:1])]
    assert len({ids(p)["corpora"][0] for p in projects}) == 3


def test_other_files_of_a_hub_dataset_are_another_corpus(build: Build) -> None:
    def hub(files: str) -> Project:
        return build(dataset={"name": "owner/texts", "data_files": files})

    assert "corpora" in changed(hub("a.parquet"), hub("b.parquet"))


def test_a_student_counts_by_its_parsed_config(build: Build, tmp_path: Path) -> None:
    before = build()
    path = tmp_path / "student.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert changed(before, build()) == set()
    shutil.copy(path, tmp_path / "copy.json")
    assert changed(before, build(student={"config": str(tmp_path / "copy.json")})) == set()
    path.write_text(json.dumps(content | {"hidden_size": 12}))
    assert changed(before, build()) == {"run"}


def test_a_student_checkpoint_counts_by_its_weights(build: Build, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(tmp_path / "teacher", copy)
    shutil.copytree(tmp_path / "teacher", other)
    flip_a_weight(other)
    projects = [
        build(student={"config": None, "model_path": str(folder)})
        for folder in (tmp_path / "teacher", copy, other)
    ]
    assert changed(projects[0], projects[1]) == set()
    assert changed(projects[0], projects[2]) == {"run"}


def test_a_checkpoint_to_start_from_counts_by_its_files(build: Build, tmp_path: Path) -> None:
    """Another checkpoint at the same path is another start; the same one at another path is not."""
    one, copy = tmp_path / "checkpoint-4", tmp_path / "copy"
    one.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (one / name).write_text(name)
    shutil.copytree(one, copy)

    def start(folder: Path) -> Project:
        return build(training={"resume_from_checkpoint": str(folder)})

    before = start(one)
    assert changed(build(), before) == {"run"}
    assert changed(before, start(copy)) == set()
    (one / "optimizer.pt").write_text("another")
    assert changed(before, start(one)) == {"run"}
    (run,), (other,) = before.runs.values(), start(one).runs.values()
    assert run.student != other.student, "so that a job started before the change refuses it"


def flip_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "does not exist"), ("{", "is not JSON"), ("[1]", "model_type"), ("{}", "model_type")],
)
def test_a_file_that_is_not_a_student_config_is_refused_by_path(
    build: Build, tmp_path: Path, text: str | None, says: str
) -> None:
    path = tmp_path / "none.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        build(student={"config": str(path)})
    assert str(path) in str(caught.value)


def test_all_missing_files_are_told_at_once_each_with_its_line(
    build: Build, tmp_path: Path, raw: dict[str, Any]
) -> None:
    path = tmp_path / "mine.yaml"
    missing = {
        "dataset": {"data_files": str(tmp_path / "corpsu.jsonl"), "tokenizer": "./words"},
        "teacher": {"model_path": str(tmp_path / "techer")},
        "student": {"config": str(tmp_path / "none.json")},
        "runs": {"a": {"training": {"seed": 1}}, "b": {"evaluation": {"max_positions": 9}}},
    }
    path.write_text(yaml.safe_dump(merge(raw, missing), sort_keys=False))
    source = read_files([path], {})
    assert source is not None
    with pytest.raises(ValueError) as caught:
        build(**missing)
    head, *lines = locate(caught.value, source).splitlines()
    assert head == "The config has 4 mistakes:"
    told = sorted(line.split(" ")[1] for line in lines)
    assert told == [
        "dataset.data_files",
        "dataset.tokenizer",
        "student.config",
        "teacher.model_path",
    ]
    assert all(re.match(rf"{re.escape(str(path))}:\d+: ", line) for line in lines), lines


RUNS = {
    "hard": {"training": {"distillation_type": "output"}},
    "soft": {"training": {"distillation_type": "logit"}},
    "both": {"training": {"distillation_type": "hybrid", "alpha": 0.3}},
}


def test_runs_that_differ_in_their_loss_share_everything_before_it(build: Build) -> None:
    project = build(runs=RUNS)
    kinds = ("corpora", "teachers", "tokens", "logits", "validations")
    assert {kind: len(getattr(project, kind)) for kind in kinds} == dict.fromkeys(kinds, 1)
    assert len({run.id for run in project.runs.values()}) == 3
    assert not project.runs["hard"].logits


def test_two_caches_share_tokens_and_validation(build: Build) -> None:
    project = build(runs={"few": {"cache": {"top_k": 4}}, "many": {"cache": {"top_k": 16}}})
    assert (len(project.logits), len(project.tokens), len(project.validations)) == (2, 1, 1)


def test_two_corpora_share_the_teacher(build: Build, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    project = build(runs={"one": {}, "two": {"dataset": {"data_files": str(other)}}})
    assert (len(project.teachers), len(project.corpora), len(project.tokens)) == (1, 2, 2)


def test_two_teachers_share_the_corpus_and_with_a_named_tokenizer_the_tokens(
    build: Build, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "teacher", other)
    runs = {"one": {}, "two": {"teacher": {"model_path": str(other)}}}
    own = build(runs=runs)
    assert (len(own.teachers), len(own.corpora), len(own.tokens)) == (2, 1, 2)
    named = build(runs=runs, dataset={"tokenizer": str(other)})
    assert (len(named.teachers), len(named.tokens), len(named.logits)) == (2, 1, 2)


def test_a_run_without_teacher_ignores_what_only_a_teacher_needs(build: Build) -> None:
    def output(**training: Any) -> Project:
        return build(training={"distillation_type": "output", **training})

    assert changed(output(), output(temperature=1.0)) == set()
    assert changed(output(), output(use_cached_logits=False)) == set()
    assert changed(output(), output(seed=1)) == {"run"}


def test_the_id_of_the_demo_teacher_covers_its_text(build: Build) -> None:
    def demo(**dataset: Any) -> Project:
        empty = {"name": "demo", "data_files": None}
        return build(teacher={"model_path": "demo"}, dataset=empty | dataset)

    (teacher,) = demo().teachers.values()
    assert teacher.id.startswith("demo-")
    assert teacher.model_path == str(teacher.folder / "model")
    assert changed(demo(), demo(max_samples=7)) == KINDS
    for key, value in {"append_eos": False, "long_documents": "truncate"}.items():
        assert "teachers" in changed(demo(), demo(**{key: value})), key
    assert changed(demo(), demo(streaming_chunk_size=7)) == {*TEACHER} - {"teachers"}
    assert changed(demo(), demo(num_proc=1)) == set()


def test_checkpoints_count_the_keys_that_the_id_of_a_run_counts() -> None:
    output = Training(distillation_type="output", alpha=1.0, temperature=1.5)
    assert training_keys(output) == training_keys(output.model_copy(update={"temperature": 2.0}))
    logit = Training(distillation_type="logit", alpha=0.0, temperature=1.5)
    assert training_keys(logit)["temperature"] == 1.5


def test_where_the_best_step_is_the_student_the_sample_is_in_its_id(build: Build) -> None:
    best = {"eval_steps": 7, "load_best_model_at_end": True}
    before = build(training=best)
    for key, other in (
        ("eval_steps", 8),
        ("eval_sequences", 8),
        ("metric_for_best_model", "eval_kl"),
    ):
        assert changed(before, build(training=best | {key: other})) == {"run"}, key
    positions = build(training=best, evaluation={"max_positions": 99})
    assert changed(before, positions) == {"run", "validations", "evaluation"}


def test_a_run_is_watched_beside_its_teacher_if_it_learns_from_one(build: Build) -> None:
    def find(**training: Any) -> bool:
        (run,) = build(training=training).runs.values()
        return bool(run.watched_features)

    assert find() and find(eval_steps=4) and not find(eval_steps=None)
    assert not find(distillation_type="output")


def record(project: Project) -> None:
    """Record the weights and the tokenizer of the project's teacher, as resolve_teacher does."""
    (teacher,) = project.teachers.values()
    teacher.folder.mkdir(parents=True)
    model = Path(teacher.model_path)
    tokenizer = TokenizerIdentity(fingerprint=fingerprint_tokenizer(model), size=300)
    found = make_teacher_record(weights=fingerprint_weights(model), tokenizer=tokenizer)
    found.write(teacher.folder / "fingerprint.json")


def test_other_weights_at_the_same_path_are_refused_until_force_regenerate_changes(
    build: Build, tmp_path: Path
) -> None:
    before = build()
    record(before)
    recorded = fingerprint_weights(tmp_path / "teacher")
    assert changed(before, build()) == set()
    flip_a_weight(tmp_path / "teacher")
    found = fingerprint_weights(tmp_path / "teacher")
    with pytest.raises(ValueError, match="holds other weights than before") as caught:
        build()
    for word in (recorded, found, str(tmp_path / "teacher"), "force_regenerate"):
        assert word in str(caught.value)
    renewed = build(teacher={"generation": {"force_regenerate": "2026-01-01"}})
    assert changed(before, renewed) == TEACHER
    record(renewed)
    build(teacher={"generation": {"force_regenerate": "2026-01-01"}})
    flip_a_weight(tmp_path / "teacher")
    assert changed(before, build()) == set()


def test_another_tokenizer_at_the_same_path_is_refused(build: Build, tmp_path: Path) -> None:
    record(build())
    path = tmp_path / "teacher" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="holds other tokenizer files than before"):
        build()
    again = build(teacher={"generation": {"force_regenerate": 1}})
    record(again)
    assert build(teacher={"generation": {"force_regenerate": 1}}).tokens == again.tokens


def test_a_shared_cache_checks_its_teacher_for_every_results_folder(
    build: Build, tmp_path: Path
) -> None:
    shared = {"cache_dir": str(tmp_path / "cache")}
    record(build(output=shared | {"results_dir": str(tmp_path / "one")}))
    flip_a_weight(tmp_path / "teacher")
    with pytest.raises(ValueError, match="than before"):
        build(output=shared | {"results_dir": str(tmp_path / "other")})


def test_a_local_tokenizer_counts_by_its_content(build: Build, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "teacher", tmp_path / "mine")
    chosen = {"tokenizer": str(tmp_path / "mine")}
    before = build(dataset=chosen)
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert changed(before, build(dataset={"tokenizer": str(tmp_path / "moved")})) == set()
    path = tmp_path / "moved" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    edited = build(dataset={"tokenizer": str(tmp_path / "moved")})
    assert changed(before, edited) == TEACHER - {"teachers"}


def test_a_corpus_stamp_changes_with_every_write_and_is_in_no_id(
    build: Build, tmp_path: Path
) -> None:
    (before,) = build().corpora.values()
    os.utime(tmp_path / "corpus.jsonl", (1, 1))
    (after,) = build().corpora.values()
    assert (before.id, before.folder) == (after.id, after.folder)
    assert before.stamp != after.stamp


def test_missing_weights_are_refused(build: Build, tmp_path: Path) -> None:
    record(build())
    (tmp_path / "teacher" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model weights"):
        build()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.q4.gguf", "is a GGUF file, the quantized weights of llama.cpp"),
        ("model.safetensors", r"is one file of a model\. Give the folder"),
        ("model.tar.gz", r"is an archive\. Unpack it"),
        ("notes.txt", "is a file, not a model"),
    ],
)
@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_model_path_that_is_a_file_is_told_what_it_is(
    build: Build, tmp_path: Path, section: str, name: str, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"GGUF")
    keys: dict[str, Any] = {"model_path": str(path)} | (
        {"config": None} if section == "student" else {}
    )
    with pytest.raises(ValueError, match=rf"{section}.model_path '.*{name}' {said}") as caught:
        build(**{section: keys})
    assert "Did you mean" not in str(caught.value)


PRINT_IDS = """
import json, sys
from retort.artifacts.build import build_project, training_keys
from retort.config.load import load_runs
p = build_project(load_runs(json.loads(sys.argv[1])))
runs = [[r.name, r.id, r.evaluation_id] for r in p.runs.values()]
print(json.dumps([runs, list(p.logits), list(p.validations), list(p.tokens), p.check_id, p.report_id]))
"""


def test_ids_are_the_same_in_every_process(raw: dict[str, Any]) -> None:
    config = json.dumps(raw | {"runs": RUNS})
    found = {
        subprocess.run(
            [sys.executable, "-c", PRINT_IDS, config],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(found) == 1
    assert len(json.loads(found.pop())[0]) == 3


def test_the_order_of_keys_changes_no_id(raw: dict[str, Any]) -> None:
    text = yaml.safe_dump(raw | {"training": {"alpha": 0.3, "seed": 2}}, sort_keys=True)
    other = yaml.safe_load(text)
    reverse = {key: dict(reversed(other[key].items())) for key in reversed(other)}
    assert changed(build_project(load_runs(other)), build_project(load_runs(reverse))) == set()


SHARED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("merge.mode", {}, {"merge": {"mode": "virtual"}}),
    ("teacher.device", {}, {"teacher": {"device": "cpu"}}),
    ("teacher.generation.num_workers", {}, {"teacher": {"generation": {"num_workers": 2}}}),
    ("teacher.generation.gpus_per_model", {}, {"teacher": {"generation": {"gpus_per_model": 2}}}),
    ("dataset.num_proc", {}, {"dataset": {"num_proc": 1}}),
    (
        "evaluation.batch_size",
        {"tasks": ["piqa"], "teacher": True},
        {"evaluation": {"batch_size": 2}},
    ),
]


@pytest.mark.parametrize(("key", "benchmarks", "overrides"), SHARED, ids=[s[0] for s in SHARED])
def test_runs_that_share_an_artifact_agree_on_the_keys_that_its_id_leaves_out(
    build: Build, key: str, benchmarks: dict[str, Any], overrides: dict[str, Any]
) -> None:
    def share(**runs: Any) -> Project:
        return build(runs=runs, evaluation={"benchmarks": benchmarks})

    other = {"training": {"seed": 1}}
    with pytest.raises(
        ValueError, match=f"^runs 'a' and 'b' share a.*, but {key} is .* in 'a' and"
    ):
        share(a={}, b=merge(other, overrides))
    share(a=overrides, b=merge(other, overrides))
    apart = {"dataset": {"seed": 1}, "teacher": {"generation": {"force_regenerate": 1}}}
    share(a={}, b=merge(apart, overrides))


def test_keys_of_one_run_alone_may_differ(build: Build) -> None:
    training = {"save_steps": 3, "device": "cpu", "gpus": 2, "seed": 1}
    build(runs={"a": {}, "b": {"training": training, "evaluation": {"batch_size": 2}}})


def test_report_and_check_ids_cover_all_runs(build: Build) -> None:
    one, other = build(runs=RUNS), build(runs=RUNS | {"again": {"training": {"seed": 5}}})
    assert one.report_id != other.report_id
    assert one.check_id != other.check_id
    assert build(runs=RUNS).report_id == one.report_id


def test_runs_that_start_from_the_same_part_share_it(build: Build, raw: dict[str, Any]) -> None:
    """Whatever the teacher's dtype; the part is that of the teacher, or of student.model_path."""
    raw["student"] = {"from_teacher": {"layers": 1}}
    path = {"model_path": raw["teacher"]["model_path"]}
    runs = {
        "one": {},
        "exact": {"teacher": {"dtype": "float32"}, "training": {"seed": 1}},
        "other": {"student": {"from_teacher": {"layers": 2}}},
        "path": {"student": path},
    }
    project = build(runs=runs)
    found = [run.pruned.id for run in project.runs.values() if run.pruned]
    assert len(project.pruned) == 3 and found[0] == found[1]
    assert len({run.id for run in project.runs.values()}) == 4
    again = build(runs={"one": {"teacher": {"generation": {"force_regenerate": 1}}}})
    assert again.runs["one"].pruned and again.runs["one"].pruned.id not in found


def test_another_model_to_prune_counts_by_its_weights(
    build: Build, raw: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(raw["teacher"]["model_path"], tmp_path / "other")
    raw["student"] = {
        "model_path": str(tmp_path / "other"),
        "from_teacher": {"layers": 1},
    }
    (before,) = build().pruned
    shutil.move(tmp_path / "other", tmp_path / "moved")
    raw["student"]["model_path"] = str(tmp_path / "moved")
    assert [*build().pruned] == [before]
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert [*build().pruned] != [before]


def test_what_is_measured_on_text_counts_with_its_text(build: Build, raw: dict[str, Any]) -> None:
    """And with the number of threads; the number of samples counts only then."""
    raw["student"] = {"from_teacher": {"layers": 1}}
    text = {"dataset": {"max_length": 32}, "teacher": {"generation": {"cpu_threads": 2}}}
    more = {"from_teacher": {"calibration_samples": 9}}
    runs = {"one": {}, "text": text, "samples": {"student": more}}
    assert len(build(runs=runs).pruned) == 1
    raw["student"]["from_teacher"]["intermediate_size"] = 8
    runs |= {"threads": {"teacher": text["teacher"]}, "cpu": {"training": {"seed": 4}}}
    project = build(runs=runs)
    assert len(project.pruned) == 4
    assert all(pruned.tokens for pruned in project.pruned.values())
    runs["cpu"] = {"teacher": {"device": "cpu", "dtype": "float32"}}
    with pytest.raises(ValueError, match=r"share what students start from, but teacher\.device"):
        build(runs=runs)
