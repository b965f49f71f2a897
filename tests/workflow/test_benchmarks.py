"""Benchmarks in the workflow: made once for each model and name, shown in the report, refused early."""

import gzip
import json
import shutil
from typing import Any

import pytest
import yaml

from retort.evaluation.records import BenchmarkRecord
from support.place import Place, merge, tiny


def write_inputs(place: Place) -> None:
    """Write a task file and two problems into a place."""
    tasks = place.path / "tasks"
    tasks.mkdir()
    rows = [{"question": "the cat is", "choices": [" red", " green hills"], "answer": 0}] * 3
    data = tasks / "animals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "animals.yaml").write_text(yaml.safe_dump(task))
    problem = {
        "task_id": "Own/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    }
    (place.path / "problems.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))


def asking(*names: str, **keys: Any) -> dict[str, Any]:
    """Return the tiny config with benchmarks."""
    benchmarks = {"tasks": list(names), "tasks_dir": "tasks"}
    return tiny(evaluation=merge({"benchmarks": benchmarks}, keys))


HUMANEVAL = {
    "benchmarks": {"teacher": True},
    "humaneval": {
        "file": "problems.jsonl.gz",
        "max_new_tokens": 8,
        "allow_code_execution": True,
    },
}


def read_benchmarks(place: Place) -> list[BenchmarkRecord]:
    return [BenchmarkRecord.read(path) for path in place.results.glob("*/**/benchmark.json")]


def test_benchmarks_are_added_to_a_finished_run_and_re_run_nothing_else(done: Place) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap here")
    write_inputs(done)
    done.write_config(asking("animals"))
    again = {"check_inputs": 1, "report": 1}
    assert done.plan() == again | {"benchmark": 2}
    done.write_config(asking("animals", "humaneval", **HUMANEVAL))
    assert done.plan() == again | {"benchmark": 4, "benchmark_teacher": 2}
    done.snakemake()
    assert sorted((b.task, str(b.run or b.teacher)) for b in read_benchmarks(done)) == [
        *(("animals", name) for name in ("both", "hard", "teacher")),
        *(("humaneval", name) for name in ("both", "hard", "teacher")),
    ]
    logs = [path.read_text() for path in done.path.glob("logs/benchmark/*.log")]
    assert len(logs) == 6
    assert all(len(log.splitlines()) <= 3 for log in logs), logs
    page = (done.results / "report.html").read_text()
    summary = (done.results / "summary.txt").read_text()
    assert "humaneval, pass@1" in page and "animals, acc" in page
    assert "humaneval, pass@1: teacher teacher 0.000, hard 0.000, both 0.000" in summary
    assert done.plan() == {}
    done.write_config(asking("animals"))
    assert done.plan() == {"report": 1}  # other results are there


REFUSED = {
    "code without consent": (
        asking("humaneval", humaneval={"file": "problems.jsonl.gz"}),
        ["evaluation.humaneval.allow_code_execution: true", "bubblewrap"],
    ),
    "humaneval without problems": (
        asking("humaneval", humaneval={"allow_code_execution": True}),
        ["evaluation.humaneval.file is null", "github.com/openai/human-eval"],
    ),
    "problems that are not there": (
        asking("humaneval", **merge(HUMANEVAL, {"humaneval": {"file": "problems.json.gz"}})),
        ["'problems.json.gz' does not exist", "Did you mean 'problems.jsonl.gz'"],
    ),
    "more k than completions": (
        asking("humaneval", **merge(HUMANEVAL, {"humaneval": {"pass_at": [1, 10]}})),
        ["humaneval.pass_at is [1, 10]", "humaneval.completions is 1"],
    ),
    "the same completion many times": (
        asking("humaneval", **merge(HUMANEVAL, {"humaneval": {"completions": 5}})),
        ["humaneval.temperature is 0", "0.2 for pass@1"],
    ),
    "task files that are not there": (
        asking("animals", benchmarks={"tasks_dir": "task"}),
        ["evaluation.benchmarks.tasks_dir 'task' is not a folder", "Did you mean 'tasks'"],
    ),
    "a name that is none": (asking("an/imal"), ["evaluation.benchmarks.tasks"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_when_the_config_is_read(fresh: Place, case: str) -> None:
    write_inputs(fresh)
    config, words = REFUSED[case]
    fresh.write_config(config)
    done = fresh.try_snakemake("-n")
    assert done.returncode != 0 and "Traceback" not in done.output, done.output
    assert any(all(word in line for word in words) for line in done.output.splitlines()), (
        done.output
    )
