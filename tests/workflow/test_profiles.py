"""The profiles: they name existing rules, set every resource that SLURM needs, and can be planned without SLURM."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from support.place import REPOSITORY, Place

PROFILE = REPOSITORY / "profiles" / "slurm" / "config.yaml"
RULES = {
    rule: block
    for path in (REPOSITORY / "workflow" / "rules").glob("*.smk")
    for rule, block in re.findall(
        r"^(?:use rule \w+ as|rule) (\w+).*\n((?:(?:    .*)?\n)+)", path.read_text(), flags=re.M
    )
}
LOCAL = {rule for rule, block in RULES.items() if "    localrule: True\n" in block}
SUBMITTED = RULES.keys() - LOCAL
SLURM_COMMANDS = ("sbatch", "squeue", "sacct", "sacctmgr", "scontrol", "sinfo", "srun", "scancel")


class Resources(dict[str, Any]):
    """A job's resources, as Snakemake gives them to the plugin."""

    __getattr__ = dict.__getitem__


def read_profile(text: str | None = None) -> dict[str, Any]:
    """Read the SLURM profile as Snakemake does."""
    yte = pytest.importorskip("yte")
    profile: dict[str, Any] = yte.process_yaml(text or PROFILE.read_text(), require_use_yte=True)
    return profile


def test_the_slurm_profile_names_exactly_the_submitted_rules() -> None:
    """Snakemake ignores resources of a rule that does not exist."""
    assert set(read_profile()["set-resources"]) == SUBMITTED


@pytest.mark.parametrize("rule", sorted(SUBMITTED))
def test_every_submitted_rule_has_time_memory_and_cpus(rule: str) -> None:
    given = read_profile()["set-resources"][rule]
    assert {"runtime", "mem_mb"} <= given.keys()
    assert {"cpus_per_task", "cpus_per_gpu"} & given.keys()
    assert "attempt" in f"{given['runtime']} {given['mem_mb']}", "a retry gets more of something"


def test_one_type_of_gpu_is_asked_for_by_every_job_that_may_use_one_and_by_no_other() -> None:
    """By what the plugin makes of it for sbatch."""
    plugin = pytest.importorskip("snakemake_executor_plugin_slurm.utils")
    text = PROFILE.read_text()
    assert "gpu_model" not in str(read_profile(text)["set-resources"])
    given = read_profile(text.replace("gpu_model: null", "gpu_model: a100"))
    uses_gpu = {rule for rule in SUBMITTED if re.search(r"\n        gpu=", RULES[rule])}
    uses_gpu.add("benchmark_teacher")  # with the resources of `benchmark`
    for rule, resources in given["set-resources"].items():
        gpus = {"gpu": 4} if rule in uses_gpu else {}
        job = SimpleNamespace(resources=Resources(resources | gpus))
        assert plugin.set_gres_string(job) == (" --gpus=a100:4" if gpus else ""), rule
    assert "gpu_model" not in given["default-resources"], "jobs without a GPU would ask for one"


def test_every_key_of_the_slurm_profile_has_a_comment() -> None:
    lines = PROFILE.read_text().splitlines()
    keys = [line for line in lines if re.match(r" *[\w-]+:", line)]
    sections = [line for line in keys if line.endswith(":")]
    assert sections == ["__variables__:", "default-resources:", "set-resources:"]
    assert all(" # " in line for line in keys if line not in sections)


def test_the_default_profile_is_executor_neutral() -> None:
    default = yaml.safe_load((REPOSITORY / "profiles" / "default" / "config.yaml").read_text())
    assert not [key for key in default if re.search("executor|slurm|resources|jobs|retries", key)]
    assert not default.keys() & read_profile().keys(), "the default profile overrides key by key"


@pytest.fixture
def no_slurm(fresh: Place, tmp_path: Path) -> Place:
    """A fresh clone's config, on a machine without SLURM's commands."""
    (fresh.path / "config").symlink_to(REPOSITORY / "config")
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in reversed(os.get_exec_path()):
        for tool in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if tool.name not in SLURM_COMMANDS:
                (tools / tool.name).unlink(missing_ok=True)
                (tools / tool.name).symlink_to(tool)
    return Place(fresh.path, env={"PATH": str(tools)})


def test_the_slurm_profile_as_shipped_can_be_planned_without_slurm(no_slurm: Place) -> None:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    profile = str(PROFILE.parent)
    assert no_slurm.plan("--profile", profile, config=None) == no_slurm.plan(config=None)


def test_a_slurm_profile_with_placeholders_submits_nothing(no_slurm: Place) -> None:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    refused = no_slurm.try_snakemake("--profile", str(PROFILE.parent))
    assert refused.returncode != 0
    sentence = "Nothing was submitted: slurm_account and slurm_partition still say CHANGE_ME."
    assert sentence in refused.output
    assert "Traceback" not in refused.output
    assert not no_slurm.results.exists() or not list(no_slurm.results.rglob("*.*"))
