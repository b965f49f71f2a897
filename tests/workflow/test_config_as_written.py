"""`snakemake --configfile mine.yaml`: what YAML 1.1 would change is taken as written, and mistakes have lines."""

import re

import yaml

from support.place import Place, tiny

TRAPS = """
teacher:
  model_path: teacher
  revision: 0123456
dataset:
  name: json
  data_files: documents.jsonl
  text_column: 2024_10
  max_length: 64
  validation_fraction: 0.15
student: {config: student.json}
training: {max_steps: 1_2, temperature: 1.0, learning_rate: 1e-2}
tracking: {wandb_run_name: "{run} {0}"}
runs:
  no: {training: {seed: 1}}
  on: {training: {seed: 2}}
  1: {training: {seed: 3}}
  010: {training: {seed: 4}}
  2026-01-01: {training: {seed: 5}}
  1e5: {training: {seed: [6, 7]}}
"""
RUNS = ["010", "1", "1e5-seed_6", "1e5-seed_7", "2026-01-01", "no", "on"]


def test_what_yaml_would_change_is_taken_as_written(fresh: Place) -> None:
    (fresh.path / "mine.yaml").write_text(TRAPS)
    assert yaml.safe_load(TRAPS)["runs"].keys() & {False, True, 8}, "YAML 1.1 would change it"
    outputs = fresh.outputs(config="mine.yaml")  # braces are no wildcards
    assert sorted({path.split("/")[2] for path in outputs if "/runs/" in path}) == RUNS
    said = fresh.snakemake("-n", "-p", "--until", "check_inputs", config="mine.yaml")
    assert re.search(r'revision\\?"?: \\?"?0123456', said), said
    assert re.search(r'text_column\\?"?: \\?"?2024_10', said), said


def test_mistakes_in_files_and_on_the_command_line_have_their_places(fresh: Place) -> None:
    fresh.write_config(tiny())
    (fresh.path / "more.yaml").write_text("# more\ntraining:\n  alhpa: 0.1\n  seed: x\n  seed: 1\n")
    command = fresh.command("-n", "--config", "cache={top_k: many}")
    at = command.index("--configfile")
    command.insert(at + 2, str(fresh.path / "more.yaml"))
    done = fresh.execute(command)
    assert done.returncode == 1 and "Traceback" not in done.output, done.output
    lines = done.output[done.output.index("Nothing was started.") :].splitlines()
    assert lines[0] == "Nothing was started. The config has 4 mistakes:"
    assert [line.split(" ", 1)[0] for line in lines[1:5]] == [
        "more.yaml:3:",
        "more.yaml:4:",
        "more.yaml:5:",
        "--config:",
    ]


def test_a_missing_file_is_told_with_the_line_that_names_it(fresh: Place) -> None:
    (fresh.path / "mine.yaml").write_text(TRAPS.replace("student.json", "nobody.json"))
    done = fresh.try_snakemake("-n", config="mine.yaml")
    line = TRAPS.splitlines().index("student: {config: student.json}") + 1
    assert f"Nothing was started. mine.yaml:{line}: student.config 'nobody.json'" in done.output


def test_a_long_config_is_in_a_file_while_its_jobs_run(fresh: Place) -> None:
    fresh.write_config(tiny(tracking={"wandb_run_name": "x" * 70_000}))
    folder = fresh.results / ".configs"
    check = ("-p", "--until", "check_inputs")
    assert "--config results/.configs/" in fresh.snakemake("-n", *check)
    assert not folder.exists(), "a dry run writes nothing"
    folder.mkdir(parents=True)
    (folder / "0123456789ab.json").write_text("{}")  # of a run that was killed
    assert "--config results/.configs/" in fresh.snakemake(*check)
    assert not folder.exists()


def test_braces_in_a_folder_of_results_are_refused(fresh: Place) -> None:
    for key in ("results_dir", "cache_dir"):
        fresh.write_config(tiny(output={key: "res {run}"}))
        done = fresh.try_snakemake("-n")
        assert "Nothing was started. tiny.yaml:" in done.output, done.output
        assert f"output.{key} is 'res {{run}}', but Snakemake takes braces" in done.output


def test_a_template_is_filled_in_by_snakemake(fresh: Place) -> None:
    config = {"__use_yte__": True, **tiny(training={"seed": "?1 + 2"}, runs={"three": {}})}
    fresh.write_config(config, "mine.yaml")
    assert fresh.plan(config="mine.yaml")["train"] == 1
    fresh.write_config({**config, "training": {"seed": "?'x' * 2"}}, "mine.yaml")
    done = fresh.try_snakemake("-n", config="mine.yaml")
    assert "\ntraining.seed is 'xx'" in done.output, done.output
