"""The workarounds for the installed SLURM plugin: what they patch is there and used, and they change what it does."""

import logging
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retort.cluster.slurm import (
    PLUGIN,
    TESTED_VERSION,
    cancel_jobs,
    find_plugin,
    patch_plugin,
    refuse_placeholders,
)

plugin = pytest.importorskip("snakemake_executor_plugin_slurm")
logger = logging.getLogger("retort.test")


def write_command(folder: Path, name: str, body: str) -> Path:
    """Write a shell script in place of one of SLURM's commands, which records its arguments; return that file."""
    script, asked = folder / name, folder / f"{name}.asked"
    script.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{body}\n')
    script.chmod(0o755)
    return asked


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed plugin, which is as before after the test."""
    monkeypatch.setattr(plugin, "get_min_job_age", plugin.get_min_job_age)
    pause = plugin.Executor.next_seconds_between_status_checks
    monkeypatch.setattr(plugin.Executor, "next_seconds_between_status_checks", pause)
    return plugin


def test_the_plugin_uses_what_is_patched() -> None:
    """By the names in its compiled code: a new version that renames one fails here."""
    check = plugin.Executor.check_active_jobs.__code__
    assert {"get_min_job_age", "next_seconds_between_status_checks"} <= set(check.co_names)
    assert plugin.Executor.check_active_jobs.__globals__ is vars(plugin)
    assert isinstance(plugin.Executor.next_seconds_between_status_checks, property)
    assert "run_uuid" in plugin.Executor.__post_init__.__code__.co_names
    # The run's id is the name of its jobs, by which they are found and cancelled.
    assert {"run_uuid", "slurm_logdir"} <= set(plugin.Executor.run_job.__code__.co_names)


def test_the_installed_plugin_is_the_tested_one(caplog: pytest.LogCaptureFixture) -> None:
    assert metadata.version(PLUGIN).startswith(f"{TESTED_VERSION}.")
    assert find_plugin(logger) is plugin
    assert caplog.messages == []


@pytest.mark.parametrize("version", ["2.9.0", "2.80.1", "3.0", "1.8.2"])
def test_another_version_is_left_as_it_is_with_a_warning(
    version: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.cluster.slurm.metadata.version", lambda _: version)
    assert find_plugin(logger) is None
    (warning,) = caplog.messages
    assert f"is version {version}, but Retort is tested with {TESTED_VERSION}" in warning
    assert all(
        word in warning for word in ("minutes late", "not reported", "Ctrl-C", "pip install")
    )


def test_without_the_plugin_nothing_is_done(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, plugin.__name__)
    assert find_plugin(logger) is None
    assert caplog.messages == []


def test_the_age_of_jobs_is_asked_once(
    restored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = write_command(tmp_path, "scontrol", "echo 'MinJobAge               = 300 sec'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    patch_plugin(restored, logger)
    (tmp_path / "scontrol").unlink()  # the controller is away
    assert [restored.get_min_job_age() for _ in range(3)] == [300, 300, 300]
    assert asked.read_text() == "show config\n"


def test_a_controller_that_is_away_at_the_start_is_asked_again(
    restored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    patch_plugin(restored, logger)
    assert restored.get_min_job_age() is None
    write_command(tmp_path, "scontrol", "echo 'MinJobAge = 120'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert restored.get_min_job_age() == 120


def test_pauses_are_short_and_stuck_jobs_are_reported_before_them(
    restored: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = write_command(tmp_path, "squeue", "echo '5|rule_train_1|JobHeldAdmin'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    patch_plugin(restored, logger)
    executor = object.__new__(restored.Executor)
    executor.run_uuid = "a-run"
    for set_to, found in ((20, 20), (30, 30), (180, 30)):
        executor.next_seconds_between_status_checks = set_to
        assert executor.next_seconds_between_status_checks == found
    assert asked.read_text().count("--name a-run ") == 1
    (warning,) = caplog.messages
    assert warning.startswith("SLURM job 5 (rule_train_1) will not start by itself")


def test_all_jobs_of_a_run_are_cancelled_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = write_command(tmp_path, "scancel", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cancel_jobs(SimpleNamespace(run_uuid="a-run"))
    assert asked.read_text() == "--name a-run\n"
    monkeypatch.setenv("PATH", "/nowhere")
    cancel_jobs(SimpleNamespace(run_uuid="a-run"))


def test_a_profile_as_shipped_is_refused() -> None:
    jobs: list[dict[str, Any]] = [
        {"slurm_account": "CHANGE_ME", "slurm_partition": "gpu", "mem_mb": 8000},
        {"slurm_account": "CHANGE_ME", "slurm_partition": "CHANGE_ME"},
    ]
    with pytest.raises(ValueError, match="slurm_account and slurm_partition still say CHANGE_ME"):
        refuse_placeholders(jobs)
    refuse_placeholders([{"slurm_account": "mine"}])
