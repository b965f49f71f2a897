"""Every script can be run by hand, with the flags that Snakemake prints."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from retort.evaluation.records import Metrics
from support.place import REPOSITORY, Place, sha256

SCRIPTS = sorted((REPOSITORY / "workflow" / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_help(script: Path, tmp_path: Path) -> None:
    done = Place(tmp_path).execute([sys.executable, str(script), "--help"])
    assert done.returncode == 0, done.output
    assert f"workflow/scripts/{script.name}" in done.output, "the exact command"
    # stage downloads into the cache of the Hub's library.
    assert "--output" in done.output or script.stem == "stage"


def read_commands(place: Place) -> dict[str, list[str]]:
    """Return the command of every job as a dry run prints it, without the log, by script and wildcard."""
    said = place.snakemake("-n", "-p", "--forceall")
    commands = {}
    for line in re.findall(r"^Shell command: (.* >> .*)$", said, flags=re.MULTILINE):
        words = shlex.split(line.rpartition(" >> ")[0])
        variant = [words[words.index(flag) + 1] for flag in ("--shard", "--name") if flag in words]
        commands[" ".join([Path(words[1]).stem, *variant])] = words
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
    metrics = Metrics.read(type_in("evaluate", "mine/metrics.json"))
    assert metrics.scores == Metrics.read(original("evaluate")).scores
    report = type_in("report", "mine/report.html")
    assert "hard" in report.with_name("summary.txt").read_text()
