"""Pending SLURM jobs that will never start by themselves. Snakemake sees pending jobs, and keeps waiting for them."""

import re
import subprocess
import time
from collections.abc import Callable

_FORMAT = (
    "%i|%k|%r"  # the job's id, its comment (by Snakemake), and SLURM's reason why it is pending
)
# Of the reasons in squeue's manual, those that do not pass with time.
_HELD = re.compile(r"held", re.IGNORECASE)
_REFUSED = re.compile(
    r"Partition(Time|Node)Limit|(Assoc|QOS)\w*PerJob\w*|BadConstraints|(Account|QOS)NotAllowed|Invalid(Account|QOS)"
)


def describe_stuck(listing: str) -> dict[str, str]:
    """Return a message for each job of squeue's listing that will not start by itself, by job id."""
    found = {}
    for line in listing.splitlines():
        job, name, reason = line.split("|", 2)
        if _HELD.search(reason):
            step = (
                f"Type: scontrol release {job}. If it is held again, a node may be broken: ask the cluster's "
                "administrators."
            )
        elif _REFUSED.fullmatch(reason):
            step = (
                "It asks for more than its partition or account allows: press Ctrl-C, fix "
                "profiles/slurm/config.yaml (docs/slurm.md), and rerun the same command."
            )
        else:
            continue
        found[job] = f"SLURM job {job} ({name}) will not start by itself: {reason}. {step}"
    return found


class StuckJobs:
    """Asks squeue at most once per interval, and reports each job once."""

    def __init__(
        self, *, interval_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._reported: set[str] = set()
        self._next_s = clock()

    def find_new(self, run: str) -> list[str]:
        """Return messages about stuck jobs not reported yet; `run` is the name of all SLURM jobs of a Snakemake."""
        if self._clock() < self._next_s:
            return []
        self._next_s = self._clock() + self._interval_s
        command = ["squeue", "--me", "--name", run, "--noheader", "--states=PD", "-o", _FORMAT]
        try:
            listing = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            return []
        new = [
            message for message in describe_stuck(listing).values() if message not in self._reported
        ]
        self._reported.update(new)
        return new
