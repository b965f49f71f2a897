"""The Snakemake workflow catalog's file is the same workflow, and says how it is used."""

import re
from pathlib import Path

import yaml

from support.place import REPOSITORY, Place

CATALOG = yaml.safe_load((REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]


def read_commands(said: str) -> list[str]:
    """The shell commands of a dry run, in an order of their own."""
    return sorted(re.findall(r"^Shell command: (.*)$", said, flags=re.MULTILINE))


def test_the_workflow_of_the_catalog_runs_the_same_commands(fresh: Place) -> None:
    expected = read_commands(fresh.snakemake("-n", "-p"))
    command = fresh.command("-n", "-p")
    command[command.index("-s") + 1] = str(REPOSITORY / "workflow" / "Snakefile")
    done = fresh.execute(command)
    assert done.returncode == 0, done.output
    assert read_commands(done.output) == expected
    scripts = set(re.findall(r"\S+/workflow/scripts/\w+\.py", "\n".join(expected)))
    assert len(scripts) > 5 and all(Path(script).exists() for script in scripts)


def test_flags_of_the_catalog_are_those_of_the_default_profile() -> None:
    profile = yaml.safe_load((REPOSITORY / "profiles" / "default" / "config.yaml").read_text())
    flags = []
    for key, value in profile.items():
        flags += [f"--{key}", *([] if value is True else value)]
    assert CATALOG["mandatory-flags"]["flags"].split() == flags


def test_what_the_catalog_requires_is_there() -> None:
    assert (REPOSITORY / "config" / "README.md").exists()
    assert set(CATALOG["software-stack-deployment"]) == {
        *("conda", "apptainer", "apptainer+conda", "report")
    }
