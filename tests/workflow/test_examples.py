"""Every example and transcript, by the commands that stand in it, from the ids on the Hub that it names to its report.

The Hub is one on this machine, with models and datasets of the same families, layouts and columns, made small
(tests/support/published.py). The machine has the GPUs that an example asks for, pretended: torch cannot use them.
Commands run as they are written, with the lines of the example's trial; what is laid over these is in `SMALLER`.
"""

import json
import os
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from retort.config.sweeps import expand_runs
from support.hub import Hub
from support.place import REPOSITORY, Once, Place, merge
from support.published import DATASETS, MODELS, write_dataset, write_local_files, write_model

TRANSCRIPTS = (REPOSITORY / "docs" / "transcripts.md").read_text().split("\n## ")[1:]
EXAMPLES = sorted((REPOSITORY / "config" / "examples").glob("*.yaml"))
# In `make test`; the others in `make test-slow`.
QUICK = ("wikitext_one_gpu",)
NVIDIA_SMI = """#!/bin/sh
for i in $PRETENDED_GPUS; do
    if [ "$1" = -L ]; then echo "GPU $i: Pretend (UUID: GPU-$i$i$i$i)"; else echo $i; fi
done
"""
STUDENT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 4096,
}
SMALLER: dict[str, Any] = {
    "dataset": {"num_shards": 2, "num_proc": 1},
    "evaluation": {"samples": {"num_samples": 2, "max_new_tokens": 8}},
}
SMALLER_STUDENT = {"student": {"config": "student.json"}}
SMALLER_OF: dict[str, dict[str, Any]] = {
    "benchmarks": {"evaluation": {"humaneval": {"max_new_tokens": 8, "completions": 10}}},
    # A random teacher does not end what it writes.
    "code_student_from_prompts": {"synthesis": {"max_tokens": 60, "keep_truncated": True}},
}
TASKS = {"benchmarks": "Rowan/hellaswag allenai/ai2_arc"}  # the data of its tasks


@pytest.fixture
def place(once: Once, hub: Hub, tmp_path: Path) -> Place:
    """A folder with the files that the examples name, on a machine with GPUs that sees the Hub.

    What the Hub has is written when a test asks for it.
    """
    root = once("published", lambda folder: write_local_files(folder / "data")).path
    names = [f"models/{name}" for name in MODELS] + [f"datasets/{name}" for name in DATASETS]
    hub.repositories = {name: root / name for name in names}
    programs, path = tmp_path / "programs", tmp_path / "project"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(NVIDIA_SMI)
    (programs / "nvidia-smi").chmod(0o755)
    shutil.copytree(root / "data", path / "data")
    (path / "config").symlink_to(REPOSITORY / "config")
    (path / "student.json").write_text(json.dumps(STUDENT))
    env = hub.environment | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RETORT_LOCK_DIR": str(tmp_path / "locks"),
        "RETORT_SIMULATED_GPUS": "1",
    }
    return Place(path, env=env, without=("CUDA_VISIBLE_DEVICES",))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
        for path in EXAMPLES
    ],
)
def test_an_example_runs_to_its_report(path: Path, place: Place, once: Once) -> None:
    if path.stem == "benchmarks":
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
        if shutil.which("bwrap") is None:
            pytest.skip("no bubblewrap here")
    text = path.read_text()
    publish(text + TASKS.get(path.stem, ""), once)
    config = yaml.safe_load(text)
    over = merge(SMALLER, SMALLER_OF.get(path.stem, {}))
    over |= SMALLER_STUDENT if "config" in config["student"] else {}
    words, trial = read_commands(text)
    place.env["PRETENDED_GPUS"] = list_gpus(words, config)
    done = place.execute([*complete(words, place), "--config", *write_words(merge(trial, over))])
    assert done.returncode == 0, done.output
    names = {run.name for run in expand_runs(config.get("runs"))[0]} or {"student"}
    measured = place.results.glob("runs/*/*/evaluation/*/metrics.json")
    assert {path.parts[-5] for path in measured} == names
    assert "held-out positions" in (place.results / "summary.txt").read_text()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=text.splitlines()[0], marks=[pytest.mark.slow] if number else [])
        for number, text in enumerate(TRANSCRIPTS)
    ],
)
def test_a_transcript_is_what_its_command_prints(text: str, place: Place, once: Once) -> None:
    publish(text, once)
    config, console = re.findall(r"^```(?:yaml|console)\n(.*?)^```$", text, re.M | re.S)
    command, *shown = console.splitlines()
    _, program, action, name, *options = command.split()
    assert config.startswith(f"# {name}\n") and program == "retort"
    (place.path / name).write_text(config)
    done = place.execute([sys.executable, "-m", program, action, name, *options])
    assert done.returncode == 0, done.output
    said = [mask_numbers(line) for line in done.output.splitlines()]
    assert len(shown) > 5
    for line in shown:
        assert line == "..." or mask_numbers(line) in said, f"{line}\n{done.output}"
        said = said if line == "..." else said[said.index(mask_numbers(line)) + 1 :]


def mask_numbers(line: str) -> str:
    """Return a line without its numbers and ids, and the widths of its columns."""
    return re.sub(r"[ -]+", " ", re.sub(r"-?[0-9][0-9a-f.,:]*", "0", line)).strip()


def publish(text: str, once: Once) -> None:
    """Write what a text names of the Hub."""
    for name in [*MODELS, *DATASETS]:
        if re.search(rf"{re.escape(name)}(?![\w-])", text):
            kind, write = ("models", write_model) if name in MODELS else ("datasets", write_dataset)
            once(f"published/{kind}/{name}", partial(write, name))


def read_commands(text: str) -> tuple[list[str], dict[str, Any]]:
    """Return an example's command, and what the lines of its trial lay over its config."""
    said = "\n".join(re.findall(r"^#  +(.*)$", text, re.M)).replace("\\\n", " ")
    (command,) = re.findall(r"^snakemake .*$", said, re.M)
    (trial,) = re.findall(r"^--config (.*)$", said, re.M)
    sections = (word.split("=", 1) for word in shlex.split(trial))
    return shlex.split(command), {name: yaml.safe_load(text) for name, text in sections}


def list_gpus(words: list[str], config: dict[str, Any]) -> str:
    """Return the ids of the GPUs that an example's machine has; of more than its jobs may use if it names some."""
    named = "gpus" in config.get("teacher", {}).get("generation", {})
    (number,) = re.findall(r"gpu=(\d+)", " ".join(words)) or ["0"]
    return " ".join(map(str, range(8 if named else int(number))))


def complete(words: list[str], place: Place) -> list[str]:
    """Return an example's command with where the workflow is; the profile of a cluster is left out."""
    words = words[1:]
    if "--profile" in words:  # tests/slurm runs it
        words = ["--cores", "8", "--resources", "gpu=8", *words[2:]]
    where = ["-s", str(place.repository / "Snakefile"), "--directory", str(place.path)]
    return [*place.command(config=None)[:3], *words, *where]


def write_words(sections: dict[str, Any]) -> list[str]:
    """Return sections of a config as --config takes them."""
    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}"
        for name, value in sections.items()
    ]
