"""Workarounds for Snakemake's SLURM plugin, snakemake-executor-plugin-slurm, made for and tested with 2.8.

With another version they do nothing, and a warning says what is missing.
"""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

from retort.cluster.stuck_jobs import StuckJobs

PLUGIN = "snakemake-executor-plugin-slurm"
TESTED_VERSION = "2.8"  # major.minor
PLACEHOLDER = "CHANGE_ME"  # in profiles/slurm/config.yaml as shipped
_MAX_PAUSE_S = 30.0


def refuse_placeholders(resources: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError when the resources of jobs still have placeholders of the shipped SLURM profile."""
    names = {name for job in resources for name, value in job.items() if value == PLACEHOLDER}
    if names:
        raise ValueError(
            f"Nothing was submitted: {' and '.join(sorted(names))} still say {PLACEHOLDER}. Write your own at the top "
            "of profiles/slurm/config.yaml (docs/slurm.md)."
        )


def find_plugin(logger: logging.Logger) -> Any:
    """Return the plugin's module if Snakemake has loaded it and its version is the tested one, else None.

    Log a warning that says what is missing with another version.
    """
    plugin = sys.modules.get(PLUGIN.replace("-", "_"))
    if plugin is None:
        return None
    version = metadata.version(PLUGIN)
    if version.split(".")[:2] == TESTED_VERSION.split("."):
        return plugin
    logger.warning(
        f"{PLUGIN} is version {version}, but Retort is tested with {TESTED_VERSION} and leaves others as they are. So "
        "the end of a job may be noticed minutes late, or never after an outage of SLURM's controller; jobs that will "
        "never start are not reported; and a Ctrl-C may leave jobs running (scancel --me --name with the run's id). "
        f"To avoid this: pip install '{PLUGIN}=={TESTED_VERSION}.*'."
    )
    return None


def patch_plugin(plugin: Any, logger: logging.Logger) -> None:
    """Apply the workarounds for jobs that run: `keep_min_job_age` and `watch_jobs`."""
    keep_min_job_age(plugin)
    watch_jobs(plugin, StuckJobs().find_new, logger)


def keep_min_job_age(plugin: Any) -> None:
    """Let the plugin use one answer to how long SLURM's controller remembers ended jobs (`get_min_job_age`).

    Version 2.8 asks again at every status check. If the controller does not answer, it assumes that ended jobs are
    forgotten at once and asks sacct instead. Without accounting, sacct never reports the end of a job, even after the
    controller is back.
    """
    age = plugin.get_min_job_age()
    if age is not None:
        plugin.get_min_job_age = lambda: age


def watch_jobs(
    plugin: Any, find_stuck: Callable[[str], Iterable[str]], logger: logging.Logger
) -> None:
    """Limit the plugin's pause between status checks to 30 s, and log jobs that will never start before each pause.

    Version 2.8 raises its pause to 180 s while no job ends: it noticed the end of a job of 23 minutes 182 s late.
    `find_stuck` takes the run's id, which is the name of its SLURM jobs, and returns messages.
    """
    executor = plugin.Executor
    pause = executor.next_seconds_between_status_checks

    def set_pause(self: Any, seconds: float) -> None:
        pause.fset(self, min(seconds, _MAX_PAUSE_S))
        for message in find_stuck(self.run_uuid):
            logger.warning(message)

    executor.next_seconds_between_status_checks = pause.setter(set_pause)


def cancel_jobs(executor: Any) -> None:
    """Cancel all SLURM jobs of the plugin's executor, by their name, which is its `run_uuid`.

    Version 2.8 has no jobs in its list while it checks their states, so a Ctrl-C at that moment cancels none.
    """
    with contextlib.suppress(OSError):  # no scancel
        subprocess.run(["scancel", "--name", executor.run_uuid], check=False)
