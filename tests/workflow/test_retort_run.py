"""`retort run`: what a person reads of a run, of one that has nothing to do, and of one that fails."""

import json
import shutil
import sys

from support.place import Finished, Place, tiny


def run(place: Place, *words: str) -> Finished:
    """Type `retort run` in a place."""
    command = [sys.executable, "-m", "retort", "run", *words]
    return place.execute(command if "--cores" in words else [*command, "--cores", "2"])


def test_a_run_shows_the_plan_and_the_table_and_nothing_of_snakemake(done: Place) -> None:
    shutil.rmtree(done.results / "reports")
    said = run(done, "tiny.yaml")
    assert said.returncode == 0, said.output
    lines = said.output.splitlines()
    assert lines[0] == "Plan, 1 job: report"
    table = (done.results / "summary.txt").read_text().rstrip()
    assert said.output.rstrip().endswith(table), "the table is the last thing"
    assert said.output.count("held-out documents would change") == table.count(
        "held-out documents would change"
    ), "and shown once"
    assert len(lines) <= len(table.splitlines()) + 5, said.output
    again = run(done, "tiny.yaml")
    assert again.output.startswith("Report of this config: results/report.html\nNothing to do: ")
    assert again.output.rstrip().endswith(table) and again.returncode == 0


def test_verbose_is_snakemakes_own_output(done: Place) -> None:
    shutil.rmtree(done.results / "reports")
    said = run(done, "tiny.yaml", "--verbose")
    assert said.returncode == 0 and "Job stats:" in said.output, said.output
    assert "Using workflow specific profile" in said.output


def test_a_dry_run_shows_the_plan_alone(fresh: Place) -> None:
    said = run(fresh, "tiny.yaml", "-n")
    assert said.returncode == 0
    assert said.output.startswith("Plan, 15 jobs: check_inputs, resolve_teacher, 2 tokenize_shard")
    assert len(said.output.splitlines()) == 2, said.output
    assert not fresh.results.exists()


def test_a_wrong_config_is_one_sentence_before_snakemake_starts(fresh: Place) -> None:
    fresh.write_config(tiny(training={"lr": 1}))
    said = run(fresh, "tiny.yaml")
    assert said.returncode == 1
    assert said.output == (
        "error: tiny.yaml:26: Unknown config key training.lr. Write it as training.learning_rate: 1.\n"
    )
    changed = run(fresh, "tiny.yaml", "--config", "training={learning_rate: -1}")
    assert changed.returncode == 1, changed.output
    assert [line.split(" ")[0] for line in changed.output.splitlines()[1:]] == [
        "tiny.yaml:26:",
        "--config:",
    ]
    missing = run(fresh, "other.yaml")
    assert missing.output.startswith("error: The config 'other.yaml' does not exist")
    unknown = run(fresh, "tiny.yaml", "--no-such-option")
    assert unknown.output.startswith("error: unrecognized arguments: --no-such-option")
    assert not (fresh.path / ".snakemake").exists()


def test_a_failing_job_says_why_once(done: Place) -> None:
    shutil.rmtree(done.results / "reports")
    (metrics,) = done.results.glob("runs/both/*/evaluation/*/metrics.json")
    record = json.loads(metrics.read_text())
    metrics.write_text(json.dumps(record)[:-20])
    said = run(done, "tiny.yaml")
    assert said.returncode == 1
    assert said.output.count("Failed: report") == 1, said.output
    log = next((done.path / "logs" / "report").glob("*.log")).read_text()
    reason = [line for line in log.splitlines() if "] error: " in line][-1].split("] error: ")[1]
    assert said.output.count(reason) == 1, said.output
    assert "At least one job" not in said.output and "agreement" not in said.output
    assert len(said.output.splitlines()) <= 10, said.output
