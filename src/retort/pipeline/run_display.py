"""What a person sees of a run: the plan, how far it is, the table; and when it fails, why.

Fed with Snakemake's log records. On a terminal the progress is one line that is written over; elsewhere it is a line
every few seconds. While the display is open, what jobs write to stderr goes to their logs alone, and the display shows
the last line of the log that was written to last.
"""

import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING, LogRecord
from pathlib import Path
from typing import Any, TextIO

from retort.cli import ATTEMPT, LINE_HEAD

_WIDTH = 100
_TERMINAL_S = 0.5  # between two looks at the logs
_LINE_S = 10.0  # between two lines where there is no terminal, when jobs end
_ALIVE_S = 60.0  # the same, when none does
_TAIL_BYTES = 4096
_NOTHING_TO_DO = "Nothing to be done"
_INTERRUPTED = "Terminating processes on user request"
_FAILED = "At least one job did not complete successfully."
_EXIT_STATUS = "RuleException:\nCalledProcessError"
_FILE_LOG = "Complete log(s): "
# How Snakemake begins an error that a rules file raised: the file and the line are of no use to a user.
_RAISED = re.compile(r"^WorkflowError(?: in (?:rule|file) .*)?:\n")
_WORKFLOW_SUFFIXES = (".smk", "Snakefile")


@dataclass
class _Job:
    """A job that was started: what it is called, and where it says how far it is."""

    rule: str
    label: str
    logs: tuple[Path, ...]


@dataclass
class RunDisplay:
    """The display of one run, from Snakemake's first record to its last."""

    is_dry_run: bool = False
    is_quiet: bool = False  # no progress: the plan, the table and errors alone
    summary: Path | None = None  # shown at the end of a run that went well
    _jobs: dict[int, _Job] = field(default_factory=dict)
    _total: int = 0
    _done: int = 0
    _failed: int = 0
    _has_ended_well: bool = True
    _is_interrupted: bool = False
    _said: set[str] = field(default_factory=set)
    _has_line: bool = False  # a progress line stands on the terminal

    def __post_init__(self) -> None:
        """Take the terminal away from jobs that start from now on."""
        self._lock = threading.RLock()
        self._is_open = True
        self._started = self._shown = time.monotonic()
        sys.stderr.flush()
        self._stderr = os.dup(2)
        self._out: TextIO = os.fdopen(os.dup(self._stderr), "w", errors="replace")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        self._is_terminal = self._out.isatty()
        self._end = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    def take(self, record: LogRecord) -> None:
        """Take in one of Snakemake's log records, and show of it what a person wants to know."""
        with self._lock:
            event = str(getattr(record, "event", None) or "")
            known = {
                "run_info": self._take_plan,
                "job_info": self._take_start,
                "job_finished": self._take_end,
                "job_error": self._take_failure,
                "group_error": self._take_group_failure,
                "error": self._take_error,
            }
            if event in known:
                known[event](record)
            elif not event:
                self._take_message(record)

    def close(self) -> None:
        """Show how it ended, and give the terminal back. Does nothing the second time."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            self._end.set()
            self._clear()
            if self._is_interrupted:
                self._write(f"{self._describe_state()}. Rerun the command to resume.")
            elif self._done and not self.is_dry_run:
                self._write(self._describe_state())
            is_wanted = self._has_ended_well and not self.is_dry_run
            if self.summary and is_wanted and self.summary.exists():
                self._write("\n" + self.summary.read_text(encoding="utf-8").rstrip())
            self._out.close()
            os.dup2(self._stderr, 2)
            os.close(self._stderr)

    def _take_plan(self, record: LogRecord) -> None:
        stats: Mapping[str, int] = record.__dict__.get("stats") or {}
        counts = {rule: n for rule, n in stats.items() if rule not in ("total", "all")}
        self._total = sum(counts.values())
        self._say(describe_plan(counts))

    def _take_start(self, record: LogRecord) -> None:
        info = record.__dict__
        if info["output"]:  # `all` has none, and does nothing
            logs = tuple(Path(log) for log in info["log"])
            self._jobs[info["jobid"]] = _Job(info["rule_name"], _name_job(info), logs)

    def _take_end(self, record: LogRecord) -> None:
        if job := self._jobs.pop(record.__dict__["job_id"], None):
            self._done += 1
            for warning in _read_warnings(job) if job.rule == "check_inputs" else ():
                self._say(warning)
            self._show()

    def _take_failure(self, record: LogRecord) -> None:
        info = record.__dict__
        self._has_ended_well = False
        if self._jobs.pop(info["jobid"], None):
            self._failed += 1
        self._say_failed(info)

    def _take_group_failure(self, record: LogRecord) -> None:
        self._has_ended_well = False
        for info in record.__dict__["job_error_info"]:
            if self._jobs.pop(info["jobid"], None):
                self._failed += 1
            self._say_failed(info)

    def _say_failed(self, info: Mapping[str, Any]) -> None:
        """Name a failed job; why is said once, at the end, but what the executor said of it is in no log."""
        why = f": {info['rule_msg']}" if info.get("rule_msg") else ""
        if not self._is_interrupted:
            self._say(f"Failed: {_name_job(info)}{why}. Jobs that do not need it go on.")

    def _take_error(self, record: LogRecord) -> None:
        self._has_ended_well = False
        text = _RAISED.sub("", record.getMessage()).strip()
        # A job's exit status: the job is named beside it, and its log says why.
        if _FAILED not in text and not text.startswith(_EXIT_STATUS):
            self._say(text)

    def _take_message(self, record: LogRecord) -> None:
        text = record.getMessage().strip() if record.msg else ""
        is_ours = record.pathname.endswith(_WORKFLOW_SUFFIXES)
        if text.startswith(_NOTHING_TO_DO):
            self._say("Nothing to do: everything that this config asks for is already there.")
        elif text.startswith(_INTERRUPTED):
            self._has_ended_well, self._is_interrupted = False, True
            self._say("Interrupted: waiting for running jobs to end.")
        elif self._is_interrupted and record.levelno < WARNING:
            pass
        elif text.startswith(_FILE_LOG) and not self._has_ended_well:
            self._say(f"Snakemake's log: {text.removeprefix(_FILE_LOG)}")
        elif record.levelno >= WARNING or (is_ours and record.levelno >= INFO):
            self._say(text)

    def _say(self, text: str) -> None:
        """Write a message, unless it was written before."""
        if text and text not in self._said:
            self._said.add(text)
            self._clear()
            self._write(text)

    def _write(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()
        self._shown = time.monotonic()

    def _clear(self) -> None:
        if self._has_line:
            self._out.write("\r\x1b[K")
            self._has_line = False

    def _tick(self) -> None:
        """Show the progress now and then, until the end."""
        while not self._end.wait(_TERMINAL_S):
            with self._lock:
                if self._is_open:
                    self._show(is_alive_only=not self._is_terminal)

    def _show(self, *, is_alive_only: bool = False) -> None:
        if self._done == self._total or self.is_quiet or self.is_dry_run:
            return  # `close` says that all is done
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"\r{self._describe()[:width]}\x1b[K")
            self._out.flush()
            self._has_line = True
        elif time.monotonic() - self._shown >= (_ALIVE_S if is_alive_only else _LINE_S):
            self._write(self._describe())

    def _describe(self) -> str:
        now = latest_line(list(self._jobs.values()))
        return f"{self._describe_state()}  |  {now}" if now else self._describe_state()

    def _describe_state(self) -> str:
        of = f"{self._done} of " if self._done < self._total else ""
        failed = f", {self._failed} failed" if self._failed and not self._is_interrupted else ""
        elapsed = _duration(time.monotonic() - self._started)
        return f"{of}{_jobs(self._total)} done{failed}, {elapsed}"


def describe_plan(counts: Mapping[str, int]) -> str:
    """Return the jobs of a run by rule, in the order in which they can run, in a few lines."""
    tie = "\N{NO-BREAK SPACE}"
    names = [f"{count}{tie}{rule}" if count > 1 else rule for rule, count in counts.items()]
    text = f"Plan, {_jobs(sum(counts.values()))}: {', '.join(names)}"
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ").replace(tie, " ")


def latest_line(jobs: Sequence[_Job]) -> str:
    """Return which job wrote to its log last, and its last line there; the first job where none wrote yet."""
    written: list[tuple[float, str]] = []
    for job in jobs:
        for log in job.logs:
            try:
                time_written, line = log.stat().st_mtime, _last_line(log)
            except OSError:  # it has not begun
                continue
            line = line.removeprefix(job.label).lstrip()  # some messages begin with it
            written.append((time_written, f"{job.label}: {line}" if line else job.label))
    if written:
        return max(written)[1]
    return jobs[0].label if jobs else ""


def _read_warnings(job: _Job) -> list[str]:
    """Return the warnings of a job's last attempt."""
    texts = [log.read_text(encoding="utf-8", errors="replace") for log in job.logs if log.exists()]
    return re.findall("warning: .*", "".join(texts).rpartition(ATTEMPT)[2])


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = LINE_HEAD.sub("", lines[-1], count=1) if lines else ""
    return "" if last.startswith(ATTEMPT) else "".join(c if c.isprintable() else " " for c in last)


def _name_job(info: Mapping[str, Any]) -> str:
    """Return a job's rule and what tells it from others of the rule: readable wildcards, not digests."""
    wildcards: Mapping[str, str] = info.get("wildcards") or {}
    parts = [
        str(value)
        for value in wildcards.values()
        if not re.fullmatch(r"(\w+-)?[0-9a-f]{12}", str(value))
    ]
    return " ".join([info["rule_name"], *parts])


def _jobs(count: int) -> str:
    return f"{count} job" if count == 1 else f"{count} jobs"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
