"""Every script can be run by hand: with the command that Snakemake prints, a config of one's own, or a config.json."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from retort.config.load import load_runs
from retort.evaluation.records import Metrics
from retort.io.files import read_json
from support.place import REPOSITORY, Place, sha256, tiny

SCRIPTS = sorted((REPOSITORY / "workflow" / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_help(script: Path, tmp_path: Path) -> None:
    done = Place(tmp_path).execute([sys.executable, str(script), "--help"])
    assert done.returncode == 0, done.output
    assert f"workflow/scripts/{script.name}" in done.output, "the exact command"
    # stage downloads into the cache of the Hub's library; the others are about a config or a result.
    after = ("estimate", "export", "export_parquet", "publish", "ls", "gc", "show", "diff")
    assert "--output" in done.output or script.stem in ("stage", *after)
    takes_one_run = script.stem not in ("check_inputs", "stage", "report", "import", *after)
    assert ("--set KEY=VALUE" in done.output) == takes_one_run
    assert ("config/README.md" in done.output) == takes_one_run


def read_commands(place: Place) -> dict[str, list[str]]:
    """Return the command of every job as a dry run prints it, without the log, by script and wildcard."""
    said = place.snakemake("-n", "-p", "--forceall")
    commands = {}
    for line in re.findall(r"^Shell command: (.* >> .*)$", said, flags=re.MULTILINE):
        words = shlex.split(line.rpartition(" >> ")[0])
        shard = [words[words.index("--shard") + 1]] if "--shard" in words else []
        run = re.findall(r'"run": "(\w+)"', words[words.index("--config") + 1])
        commands[" ".join([Path(words[1]).stem, *shard, *run])] = words
    return commands


def with_output(command: list[str], path: str) -> list[str]:
    """Return the command with another output."""
    place = command.index("--output") + 1
    return [*command[:place], path, *command[place + 1 :]]


def test_the_commands_of_the_rules_can_be_run_by_hand(done: Place) -> None:
    commands = read_commands(done)

    def type_in(name: str, output: str) -> Path:
        finished = done.execute(with_output(commands[name], output))
        assert finished.returncode == 0, finished.output
        return done.path / output

    def original(name: str) -> Path:
        return done.path / commands[name][commands[name].index("--output") + 1]

    shard = type_in("tokenize_shard 00000", "mine/shard_00000.h5")
    assert sha256(shard) == sha256(original("tokenize_shard 00000"))
    index = type_in("index_tokens", "mine/index.json")
    assert sha256(index) == sha256(original("index_tokens"))
    training = type_in("train hard", "mine/training.json")
    weights = training.parent / "final" / "model.safetensors"
    assert sha256(weights) == sha256(original("train hard").parent / "final" / "model.safetensors")
    metrics = Metrics.read(type_in("evaluate hard", "mine/metrics.json"))
    assert metrics.scores == Metrics.read(original("evaluate hard")).scores
    report = type_in("report", "mine/report.html")
    assert "hard" in report.with_name("summary.txt").read_text()


def find_results(place: Place, run: str) -> dict[str, str]:
    """Return the paths that train.py takes for a run of the finished workflow."""
    (training,) = place.results.glob(f"runs/{run}/*/training.json")
    (index,) = place.results.glob("tokens/*/index.json")
    return {
        "run": str(training.parent),
        "index": str(index),
        "manifest": str(place.cache / "manifest.json"),
        "cache": str(place.cache / "teacher_logits.h5"),
    }


def train(place: Place, name: str, *words: str) -> tuple[str, str]:
    """Train by hand into a folder; return the digest of the student and what was said."""
    script = str(REPOSITORY / "workflow" / "scripts" / "train.py")
    output = f"{name}/training.json"
    done = place.execute([sys.executable, script, *words, "--output", output])
    weights = place.path / name / "final" / "model.safetensors"
    return (sha256(weights) if done.returncode == 0 else "refused"), done.output


def test_a_config_and_the_config_json_of_a_result_make_its_student(done: Place) -> None:
    made = find_results(done, "both")
    whole = sha256(Path(made["run"]) / "final" / "model.safetensors")
    kept = Path(made["run"]) / "config.json"
    content = read_json(kept)
    assert content.keys() == {"run", "source", "config"}
    assert (content["run"], content["source"]) == ("both", "tiny.yaml")
    index = ("--index", made["index"])
    again, said = train(done, "again", "--config", str(kept), *index, "--signal", made["manifest"])
    assert again == whole, said
    assert read_json(done.path / "again" / "config.json") == content
    typed = ("--config", "tiny.yaml", *index, "--signal", made["cache"])
    mine, said = train(done, "mine", *typed, "--run", "both")
    assert mine == whole, said
    assert read_json(done.path / "mine" / "config.json") == content
    keys = ("--set", "training.alpha=0.3", "--set", "training.max_steps=3")
    other, said = train(done, "other", *typed, "--run", "both", *keys)
    assert other not in (whole, "refused"), said
    training = read_json(done.path / "other" / "training.json")
    assert (training["run"], training["alpha"]) == ("both", 0.3)
    _, said = train(done, "refused", *typed)
    assert "tiny.yaml has 2 runs, which differ in training: choose one with --run." in said
    assert "Its runs: hard, both." in said and said.count("\n") == 1
    assert not (done.path / "refused").exists()


def test_every_result_of_a_workflow_has_the_config_that_it_was_made_with(done: Place) -> None:
    outputs = ["index.json", "fingerprint.json", "manifest.json", "training.json", "metrics.json"]
    outputs += ["teacher_validation.safetensors", "report.html", "inputs.json"]
    folders = {p.parent for name in outputs for p in done.results.glob(f"*/**/{name}")}
    assert len(folders) == 10
    assert all((folder / "config.json").exists() for folder in folders), folders
    cache = {"top_k": 8, "temperatures": [1.0]}
    expected = {"source": "tiny.yaml", "config": {"teacher": tiny()["teacher"], "cache": cache}}
    assert read_json(done.cache / "config.json") == expected
    (report,) = done.results.glob("reports/*/config.json")
    whole = read_json(report)  # its scalars as they are written
    assert load_runs(whole) == load_runs(tiny()) and whole.keys() == tiny().keys()


def test_a_live_teacher_is_run_by_hand(done: Place) -> None:
    made = find_results(done, "both")
    (fingerprint,) = done.results.glob("teachers/*/fingerprint.json")
    words = ["--config", "tiny.yaml", "--run", "both", "--set", "training.max_steps=2"]
    words += ["--index", made["index"], "--signal", str(fingerprint)]
    student, said = train(done, "live", *words)
    assert student != "refused", said
    assert "logit cache" not in (done.path / "live" / "final" / "README.md").read_text()
