"""Tasks of lm-evaluation-harness: a local task on a real model, offline; clear errors for what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from retort.config.sections import Evaluation
from retort.evaluation.tasks import check_tasks
from retort.tokens.tokenizer import load_tokenizer
from support.hub import NAME, serve
from support.sections import section

ROWS = [
    ("the cat is", [" red", " green"], 0),
    ("a dog and a", [" fox", " house by the hill"], 1),
    ("over the", [" hill", " mountain now"], 0),
    ("fish eat", [" bread", " fruit in the garden"], 1),
]


def write_task(folder: Path, **keys: object) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / "animals.jsonl"
    names = ("question", "choices", "answer")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    data.write_text("\n".join(lines) + "\n")
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "animals.yaml").write_text(yaml.safe_dump(task | keys))
    return folder


def settings(tasks_dir: Path | None, *names: str) -> Evaluation:
    where = str(tasks_dir) if tasks_dir else None
    found: Evaluation = section("evaluation", benchmarks={"tasks": list(names), "tasks_dir": where})
    return found


def test_a_missing_harness_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="hellaswag of lm-evaluation-harness") as refusal:
        check_tasks(settings(None, "hellaswag"))
    assert f"{sys.executable} -m pip install 'lm-eval>=" in str(refusal.value)


@pytest.mark.slow
def test_a_local_task_scores_the_choices_that_the_model_finds_likelier(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from retort.evaluation.harness import run_harness_task

    wanted = settings(write_task(tmp_path / "tasks"), "animals")
    assert check_tasks(wanted) == ["benchmark animals: 4 examples"]
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_teacher))
    found = run_harness_task("animals", model, tokenizer, settings=wanted.of_benchmark("animals"))
    num_right = 0
    for question, choices, answer in ROWS:
        sums = []
        for choice in choices:
            start = tokenizer(question)["input_ids"]
            ids = tokenizer(question + choice)["input_ids"]
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            answer_positions = range(len(start), len(ids))
            sums.append(sum(float(logprobs[p - 1, ids[p]]) for p in answer_positions))
        num_right += sums.index(max(sums)) == answer
    (score,) = found.scores
    assert (score.task, score.metric) == ("animals", "acc")
    assert score.value == pytest.approx(num_right / len(ROWS))
    assert found.examples == found.examples_in_all == 4


def test_a_task_that_runs_code_without_a_sandbox_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = write_task(tmp_path / "tasks", unsafe_code=True)
    with pytest.raises(ValueError, match="without a sandbox"):
        check_tasks(settings(folder, "animals"))


def test_data_that_are_not_there_are_said_before_any_job(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = write_task(tmp_path / "tasks")
    (folder / "animals.jsonl").unlink()
    with pytest.raises(ValueError, match="benchmark 'animals' cannot be loaded") as refusal:
        check_tasks(settings(folder, "animals"))
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.slow  # the harness reads the names of 14,000 tasks
def test_an_unknown_benchmark_is_refused_with_the_nearest_names() -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    with pytest.raises(ValueError, match="'helaswag', which is none of") as refusal:
        check_tasks(settings(None, "helaswag"))
    assert "Did you mean 'hellaswag'" in str(refusal.value)


FROM_HUB = """
import json, sys
from support.sections import section
from retort.evaluation.tasks import check_tasks
print(json.dumps(check_tasks(section("evaluation", benchmarks={"tasks": ["animals"], "tasks_dir": sys.argv[1]}))))
"""


@pytest.mark.slow
def test_the_check_fetches_data_from_a_hub_so_that_later_runs_are_offline(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    data = tmp_path / "hub"
    tasks = write_task(tmp_path / "tasks", dataset_path=NAME, dataset_kwargs={})
    data.mkdir()
    (tasks / "animals.jsonl").rename(data / "test.jsonl")

    def check(**environment: str) -> "subprocess.CompletedProcess[str]":
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        known = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": paths}
        return subprocess.run(
            [sys.executable, "-c", FROM_HUB, str(tasks)],
            env=known | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    offline = check(HF_HUB_OFFLINE="1")
    assert "benchmark 'animals' cannot be loaded" in offline.stderr
    with serve(data) as hub:
        online = check(**hub.environment)
        assert online.returncode == 0, online.stderr
        assert json.loads(online.stdout.splitlines()[-1]) == ["benchmark animals: 4 examples"]
        assert hub.requests["test.jsonl"] == 1
    staged = check(HF_HUB_OFFLINE="1")
    assert staged.returncode == 0, staged.stderr
    assert json.loads(staged.stdout.splitlines()[-1]) == ["benchmark animals: 4 examples"]
