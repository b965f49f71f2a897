"""The time limit of a SLURM job, so that a worker can stop between two parts before it is killed."""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable

RESUMABLE = 75  # exit status: unfinished, rerun to resume (EX_TEMPFAIL of sysexits.h)
OUT_OF_TIME = "stopped before the job's time limit"
_MARGIN_S = 20.0  # for a clean exit
# squeue's format: [[days-]hours:]minutes:seconds.
_TIME_LEFT = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")


def ask_scheduler() -> float | None:
    """Return the seconds left to this SLURM job, inf without a limit; None outside a job or if squeue fails."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_time_left(found.stdout.strip())


def read_time_left(text: str) -> float | None:
    """Return the seconds in squeue's time left; None if it is not a time. INVALID means past the limit."""
    if text in ("UNLIMITED", "INVALID"):
        return math.inf if text == "UNLIMITED" else 0.0
    found = _TIME_LEFT.fullmatch(text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class Deadline:
    """When the scheduler will end this job, minus a margin for a clean exit."""

    def __init__(
        self,
        ask: Callable[[], float | None] = ask_scheduler,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` returns the seconds left, or None for no answer; without any answer there is no deadline."""
        self._ask = ask
        self._clock = clock
        self._end = math.inf
        self._update()

    @property
    def left(self) -> float:
        """Seconds until the exit must begin."""
        return self._end - _MARGIN_S - self._clock()

    def forbids(self, seconds: float) -> bool:
        """Return whether there is no time for so many seconds of work; ask again first, as a limit may be raised."""
        if seconds > self.left:
            self._update()
        return seconds > self.left

    def _update(self) -> None:
        found = self._ask()
        if found is not None:
            self._end = self._clock() + found
