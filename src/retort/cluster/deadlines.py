"""The time limit of a job: a worker that knows it ends between two parts shortly before, instead of being killed."""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable

RESUMABLE = (
    75  # exit status: neither done nor failed, the same command goes on (EX_TEMPFAIL of sysexits.h)
)
OUT_OF_TIME = "stopped before the job's time limit"
_MARGIN_S = 20.0  # to end in
# As squeue writes it: [[days-]hours:]minutes:seconds.
_TIME_LEFT = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")


def ask_scheduler() -> float | None:
    """Return the seconds that SLURM leaves this job, inf without a limit; None where there is no job or no answer."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_time_left(found.stdout.strip())


def read_time_left(said: str) -> float | None:
    """Return the seconds in what squeue says of the time left; None where it says nothing of it.

    Of a job that is beyond its limit it says INVALID.
    """
    if said in ("UNLIMITED", "INVALID"):
        return math.inf if said == "UNLIMITED" else 0.0
    found = _TIME_LEFT.fullmatch(said)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class Deadline:
    """When the scheduler will end this job, with a margin for an orderly end before."""

    def __init__(self, ask: Callable[[], float | None] = ask_scheduler) -> None:
        """`ask` returns the seconds left, or None; without any answer there is no deadline."""
        self._ask = ask
        self._end = math.inf
        self._look()

    @property
    def left(self) -> float:
        """The seconds left until an orderly end must begin."""
        return self._end - _MARGIN_S - time.monotonic()

    def forbids(self, seconds: float) -> bool:
        """Say whether there is no time for so many seconds of work; a limit may have been moved meanwhile."""
        if seconds > self.left:
            self._look()
        return seconds > self.left

    def _look(self) -> None:
        found = self._ask()
        if found is not None:
            self._end = time.monotonic() + found
