"""A corpus that a model writes, in the workflow: from prompts to a student, a kill, and the rules that run."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.evaluation.records import Metrics
from support.place import REPOSITORY, Place, merge, tiny

EXAMPLE = REPOSITORY / "config" / "examples" / "code_student_from_prompts.yaml"
# Small enough for a minute on two cores; everything else is the example's.
SMALL = {
    "dataset": {"max_length": 128, "validation_fraction": 0.3, "num_proc": 1},
    "synthesis": {"num_examples": 24, "max_tokens": 40, "keep_truncated": True, "batch_size": 4},
    "teacher": {"device": "cpu", "generation": {"num_workers": 1}},
    "student": {"config": "student.json"},
    "training": {"max_steps": 6, "batch_size": 4, "device": "cpu"},
}


@pytest.fixture
def place(fresh: Place) -> Place:
    (fresh.path / "config").symlink_to(REPOSITORY / "config")
    return fresh


def example(teacher: Path) -> dict[str, Any]:
    config = merge(yaml.safe_load(EXAMPLE.read_text()), SMALL)
    return merge(config, {"teacher": {"model_path": str(teacher)}})


@pytest.mark.slow
def test_the_example_runs_from_prompts_to_a_report_offline(place: Place, shared_data: Path) -> None:
    config = example(shared_data / "models" / "stories260K")
    place.write_config(config)
    assert place.plan()["synthesize"] == 1
    place.snakemake()
    (record,) = place.results.rglob("synthesis.json")
    rows = [json.loads(line) for line in (record.parent / "responses.jsonl").open()]
    assert len(rows) == 24 and {row["language"] for row in rows} == {"python", "javascript", "bash"}
    (metrics,) = place.results.rglob("metrics.json")
    assert Metrics.read(metrics).scores.student.metrics["loss"].value > 0
    assert "synthesize" not in place.plan()
    # Another number of examples makes another corpus, but asks no prompt: the journal stays as it is.
    (journal,) = place.results.rglob("journal.jsonl")
    before = journal.read_bytes()
    place.write_config(merge(config, {"synthesis": {"num_examples": 20}}))
    place.snakemake("--until", "synthesize")
    assert journal.read_bytes() == before and len(list(place.results.rglob("synthesis.json"))) == 2


@pytest.mark.slow
def test_a_killed_synthesis_resumes_with_the_missing_prompts(
    place: Place, shared_data: Path
) -> None:
    config = example(shared_data / "models" / "stories260K")
    config["synthesis"] |= {"num_examples": 400, "max_tokens": 64}
    place.write_config(config)
    running = place.start("--until", "synthesize")
    deadline = time.monotonic() + 600
    journals: list[Path] = []
    while not (journals := list(place.results.rglob("journal.jsonl"))) or not _answers(journals[0]):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kept = _answers(journals[0])
    assert 0 < len(kept) < 400
    place.snakemake("--unlock")
    place.snakemake("--until", "synthesize")
    lines = _answers(journals[0])
    assert lines[: len(kept)] == kept, "answers are kept as they are"
    numbers = [json.loads(line)["index"] for line in lines]
    assert len(numbers) == len(set(numbers)), "nothing is answered twice"


def _answers(journal: Path) -> list[bytes]:
    return journal.read_bytes().split(b"\n")[:-1]


def ask_one_prompt(place: Place) -> dict[str, Any]:
    """Return a config whose corpus is a server's response to one prompt."""
    (place.path / "prompts.jsonl").write_text('{"prompt": "One?"}\n')
    synthesis = {"provider": "openai", "model": "m", "prompts": "prompts.jsonl"}
    config = tiny(synthesis=synthesis)
    config["dataset"] = {k: v for k, v in config["dataset"].items() if k != "data_files"}
    config["dataset"]["name"] = "synthesis"
    return config


def test_a_server_is_asked_by_a_local_rule_and_a_local_model_on_gpus(place: Place) -> None:
    config = ask_one_prompt(place)
    place.write_config(config)
    planned = place.plan()
    assert planned["synthesize_online"] == 1 and "synthesize" not in planned
    place.write_config(merge(config, {"synthesis": {"provider": "local", "model": None}}))
    planned = place.plan()
    assert planned["synthesize"] == 1 and "synthesize_online" not in planned


def test_a_missing_key_is_refused_before_anything_runs(place: Place) -> None:
    place.write_config(ask_one_prompt(place))
    bare = Place(place.path, without=("OPENAI_API_KEY",))
    refused = bare.try_snakemake("--quiet", "rules")
    assert refused.returncode != 0 and "OPENAI_API_KEY is not in the environment" in refused.output
    assert "Traceback" not in refused.output
    assert not list(place.results.rglob("journal.jsonl"))
