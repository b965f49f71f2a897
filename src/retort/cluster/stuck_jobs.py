"""SLURM jobs that wait and will never start by themselves. To Snakemake they are jobs that wait, and it waits too."""

import re
import subprocess
import time

_PAUSE_S = 60.0
_FORMAT = "%i|%k|%r"  # number, what Snakemake calls it, and SLURM's reason for which it waits
# Of the reasons in squeue's manual, those that time does not mend.
_HELD = re.compile(r"held", re.IGNORECASE)
_REFUSED = re.compile(
    r"Partition(Time|Node)Limit|(Assoc|QOS)\w*PerJob\w*|BadConstraints|(Account|QOS)NotAllowed|Invalid(Account|QOS)"
)


def describe_stuck(listing: str) -> dict[str, str]:
    """Return a sentence for each job of a listing by squeue that will not start by itself, by its number."""
    found = {}
    for line in listing.splitlines():
        job, name, reason = line.split("|", 2)
        if _HELD.search(reason):
            step = (
                f"Type: scontrol release {job}. Where it is held again, a node may be broken: ask the cluster's "
                "administrators."
            )
        elif _REFUSED.fullmatch(reason):
            step = (
                "It asks for what its partition or account never gives: end this with Ctrl-C, mend "
                "profiles/slurm/config.yaml (docs/slurm.md), and type the same command."
            )
        else:
            continue
        found[job] = f"SLURM job {job} ({name}) will not start by itself: {reason}. {step}"
    return found


class StuckJobs:
    """Looks for them once a minute, and names each once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._next_s = 0.0

    def look(self, run: str) -> list[str]:
        """Return what is new of the waiting jobs of this name, which one Snakemake gives to all of its jobs."""
        if time.monotonic() < self._next_s:
            return []
        self._next_s = time.monotonic() + _PAUSE_S
        command = ["squeue", "--me", "--name", run, "--noheader", "--states=PD", "-o", _FORMAT]
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            return []
        new = [found for found in describe_stuck(told).values() if found not in self._said]
        self._said.update(new)
        return new
