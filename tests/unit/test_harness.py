"""Tasks of lm-evaluation-harness: a local file on a real model, offline; what is missing is said in one sentence."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import section
from transformers import AutoModelForCausalLM

from retort.benchmarks import check_benchmarks
from retort.tokens import load_tokenizer

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


def settings(tasks_dir: Path | None, *names: str):  # type: ignore[no-untyped-def]
    where = str(tasks_dir) if tasks_dir else None
    return section("evaluation", benchmarks=list(names), benchmark_tasks_dir=where)


def test_a_missing_harness_is_said_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="hellaswag of lm-evaluation-harness") as refusal:
        check_benchmarks(settings(None, "hellaswag"))
    assert f"{sys.executable} -m pip install 'lm-eval>=" in str(refusal.value)


def test_a_local_task_scores_what_the_model_itself_finds_likelier(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from retort.harness import run_tasks

    wanted = settings(write_task(tmp_path / "tasks"), "animals")
    assert check_benchmarks(wanted) == ["benchmark animals: 4 examples"]
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(tiny_teacher))
    found = run_tasks("animals", model, tokenizer, settings=wanted.of_benchmark("animals"))
    right = 0
    for question, choices, answer in ROWS:
        sums = []
        for choice in choices:
            start = tokenizer(question)["input_ids"]
            ids = tokenizer(question + choice)["input_ids"]
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(start), len(ids))
            sums.append(sum(float(logprobs[p - 1, ids[p]]) for p in places))
        right += sums.index(max(sums)) == answer
    (score,) = found["scores"]
    assert (score["task"], score["metric"]) == ("animals", "acc")
    assert score["value"] == pytest.approx(right / len(ROWS))
    assert found["examples"] == found["examples_in_all"] == 4


def test_a_task_that_runs_code_in_the_open_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = write_task(tmp_path / "tasks", unsafe_code=True)
    with pytest.raises(ValueError, match="without a sandbox"):
        check_benchmarks(settings(folder, "animals"))


def test_data_that_are_not_there_are_said_before_any_job(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = write_task(tmp_path / "tasks")
    (folder / "animals.jsonl").unlink()
    with pytest.raises(ValueError, match="benchmark 'animals' cannot be loaded") as refusal:
        check_benchmarks(settings(folder, "animals"))
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.slow  # the harness reads the names of 14,000 tasks
def test_an_unknown_benchmark_is_refused_with_the_nearest_names() -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    with pytest.raises(ValueError, match="'helaswag', which is none of") as refusal:
        check_benchmarks(settings(None, "helaswag"))
    assert "Did you mean 'hellaswag'" in str(refusal.value)
