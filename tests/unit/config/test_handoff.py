"""What scripts are given: by a rule, by a person with a config, and by the config.json of a result."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.config.handoff import CONFIG_FILE, SECTIONS, Job, job_parser, read_job, read_runs
from retort.io.files import read_json
from support.jobs import make_job
from support.sections import section

CONFIG: dict[str, Any] = {
    "dataset": {"name": "json", "data_files": "text.jsonl", "max_length": 64},
    "teacher": {"model_path": "models/teacher"},
    "student": {"config": "student.json"},
    "training": {"max_steps": 9, "temperature": 1.0},
    "runs": {
        "hard": {"training": {"distillation_type": "output"}},
        "soft": {"training": {"alpha": 0.2}},
        "swept": {"training": {"seed": [0, 1]}},
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return path


def read(kind: str, *words: Any) -> Job:
    return read_job(job_parser("", kind).parse_args([str(word) for word in words]))


def refusal(kind: str, *words: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read(kind, *words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_json_has_only_the_sections_asked_for_and_what_differs_from_defaults() -> None:
    job = make_job(
        run="soft",
        expected={"student": "abc"},
        training=section("training", alpha=0.5, gpus=2),  # which changes no id
        dataset=section("dataset", max_length=64),
        # 0 is not the default, which is false.
        teacher=section("teacher", generation={"batch_size": 3, "force_regenerate": 0}),
    )
    assert job.to_json(("training", "teacher", "student")) == {
        "run": "soft",
        "expected": {"student": "abc"},
        "config": {
            "training": {"alpha": 0.5, "gpus": 2},
            "teacher": {"generation": {"batch_size": 3, "force_regenerate": 0}},
        },
    }


def test_a_run_of_a_config_is_chosen_by_name(config: Path) -> None:
    job = read("run", "--config", config, "--run", "soft")
    assert (job.run, job.source) == ("soft", "mine.yaml")
    assert (job.config.training.alpha, job.config.training.max_steps) == (0.2, 9)
    assert read("run", "--config", config, "--run", "hard").config.training.alpha == 1.0
    assert read("run", "--config", config, "--run", "swept-seed_1").config.training.seed == 1


def test_a_run_is_needed_only_where_the_scripts_sections_differ(config: Path) -> None:
    for kind in ("tokens", "logits", "validation", "teacher"):
        job = read(kind, "--config", config)
        assert job.run is None and job.source == "mine.yaml"
    message = refusal("run", "--config", config)
    assert "mine.yaml has 4 runs, which differ in training: choose one with --run" in message
    assert message.endswith("Its runs: hard, soft, swept-seed_0, swept-seed_1.")


def test_an_unknown_run_is_refused_with_the_names(config: Path) -> None:
    message = refusal("run", "--config", config, "--run", "sofd")
    assert message.startswith("mine.yaml has no run 'sofd'. Did you mean 'soft'? Its runs: hard,")


def test_a_config_without_runs_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "runs"}))
    assert read("run", "--config", path).run == "student"
    assert "none, so leave --run out" in refusal("run", "--config", path, "--run", "soft")


def test_set_wins_over_runs_and_is_read_by_the_type_of_its_key(config: Path) -> None:
    words = ["--set", "training.alpha=0.3", "--set", "cache.temperatures=[1, 4]"]
    words += ["--set", "training.use_mixed_precision=false", "--set", "training.max_steps=null"]
    words += ["--set", "teacher.model_path=a=b", "--set", "training.alpha=0.4"]
    job = read("run", "--config", config, "--run", "soft", *words)
    training = job.config.training
    assert (training.alpha, training.max_steps) == (0.4, None)
    assert training.use_mixed_precision is False
    assert job.config.cache.temperatures == (1.0, 4.0)
    assert job.config.teacher.model_path == "a=b"
    # A sweep keeps its runs: a key that is set there is another value of each.
    job = read("run", "--config", config, "--run", "swept-seed_1", "--set", "training.seed=7")
    assert (job.run, job.config.training.seed) == ("swept-seed_1", 7)


def test_set_decides_whether_runs_differ(config: Path) -> None:
    words = ("--set", "dataset.max_length=32")
    assert read("tokens", "--config", config, *words).config.dataset.max_length == 32


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.alpha=2", "training.alpha is 2.0, but a number from 0 to 1"),
        ("training.alhpa=0.3", "Unknown config key training.alhpa. Did you mean training.alpha?"),
        ("alpha=0.3", "--set 'alpha=0.3' should be KEY=VALUE, with a key of a section"),
        ("training.alpha", "--set 'training.alpha' should be KEY=VALUE"),
        ("runs.soft.training.alpha=0.3", "should be KEY=VALUE, with a key of a section"),
    ],
)
def test_a_mistake_in_set_is_one_sentence(word: str, message: str, config: Path) -> None:
    assert message in refusal("run", "--config", config, "--run", "soft", "--set", word)
    assert message in refusal("run", "--set", word)


def test_checks_across_keys_see_what_is_set(config: Path) -> None:
    message = refusal("run", "--config", config, "--run", "hard", "--set", "training.alpha=0.5")
    assert "training.alpha is 0.5, but training.distillation_type is output" in message


def test_without_a_config_keys_have_their_defaults() -> None:
    job = read("teacher", "--set", "teacher.model_path=gpt2")
    assert (job.run, job.source, job.teacher_path) == (None, None, "gpt2")
    no_teacher = read("teacher", "--set", "teacher.model_path=null")
    assert "teacher.model_path is null" in _raised(lambda: no_teacher.teacher_path)


def test_the_config_json_of_a_result_gives_its_job_back(config: Path, tmp_path: Path) -> None:
    job = read("run", "--config", config, "--run", "soft")
    named = job.model_copy(update={"expected": {"student": "0123"}})
    named.write(tmp_path, "run")
    assert read_json(tmp_path / CONFIG_FILE).keys() == {"run", "source", "config"}
    kept = read("run", "--config", tmp_path / CONFIG_FILE)
    assert kept.to_json(SECTIONS["run"]) == job.to_json(SECTIONS["run"])
    changed = read("run", "--config", tmp_path / CONFIG_FILE, "--set", "training.alpha=0.9")
    assert (changed.run, changed.config.training.alpha) == ("soft", 0.9)
    assert "is of run 'soft'" in refusal("run", "--config", tmp_path / CONFIG_FILE, "--run", "hard")


def test_config_json_is_there_before_the_output_and_replaced_after_it(
    config: Path, tmp_path: Path
) -> None:
    parser = job_parser("", "run")
    parser.add_argument("--output", type=Path)
    kept = tmp_path / "result" / CONFIG_FILE

    def read_alpha(*words: str) -> float:
        command = ["--config", str(config), "--output", str(kept.with_name("training.json"))]
        read_job(parser.parse_args([*command, *words]))
        found: float = read_json(kept)["config"]["training"]["alpha"]
        return found

    assert read_alpha("--run", "soft", "--set", "training.alpha=0.3") == 0.3
    assert read_alpha("--run", "soft", "--set", "training.alpha=0.4") == 0.4
    kept.with_name("training.json").touch()
    assert read_alpha("--run", "soft", "--set", "training.alpha=0.6") == 0.4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: [", "wrong.yaml:1: the brackets of 'a: [' do not match"),
        ("- a", "wrong.yaml is a list, but lines of 'key: value' are expected"),
        (
            "student: {config: s}\nteacher: {model: x}",
            "wrong.yaml:2: Unknown config key teacher.model",
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    if content is not None:
        path.write_text(content)
    assert message in refusal("teacher", "--config", path)


@pytest.mark.parametrize("text", ['{"config": {"training": {"alpha": 3}}}', '{"config":', "{}x"])
def test_a_wrong_json_is_refused(text: str) -> None:
    assert re.search("training.alpha is 3|cannot be read", refusal("run", "--config", text))


def test_what_only_a_workflow_makes_is_refused_by_hand(tmp_path: Path) -> None:
    demo = {**CONFIG, "teacher": {"model_path": "demo"}, "runs": {"a": {}}}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(demo))
    job = read("tokens", "--config", tmp_path / "demo.yaml")
    message = _raised(lambda: job.tokenizer)
    assert "teacher.model_path is 'demo', which the workflow trains" in message
    found = read("tokens", "--config", tmp_path / "demo.yaml", "--set", "teacher.model_path=here")
    assert found.tokenizer == ("here", None)
    written = read("tokens", "--set", "dataset.name=synthesis")
    assert "which the workflow writes" in _raised(lambda: written.dataset)


def test_the_tokenizer_is_that_of_the_dataset_else_the_teachers() -> None:
    teacher = section("teacher", model_path="t", revision="r")
    assert make_job(teacher=teacher).tokenizer == ("t", "r")
    both = make_job(teacher=teacher, dataset=section("dataset", tokenizer="own"))
    assert both.tokenizer == ("own", None)
    assert "teacher.model_path is 'demo'" in _raised(lambda: make_job().tokenizer)


def test_a_whole_config_is_read_from_a_file_or_as_json(config: Path) -> None:
    assert read_runs(str(config)) == read_runs(json.dumps(CONFIG))
    assert list(read_runs(str(config))) == ["hard", "soft", "swept-seed_0", "swept-seed_1"]


def _raised(work: Any) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    return str(caught.value)
