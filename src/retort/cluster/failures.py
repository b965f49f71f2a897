"""Why jobs failed, from what they left in their logs: shown once, when Snakemake ends."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from retort.cli import ATTEMPT, is_out_of_memory
from retort.cluster.deadlines import OUT_OF_TIME

_TAIL_BYTES = 1 << 18
_SHOWN_LINES = 10
_SHOWN_CHARACTERS = 500  # of a line
_TRACEBACK = "Traceback (most recent call last)"
_ATTEMPT = re.compile(re.escape(ATTEMPT) + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
_STAMP = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+\[\d+\] ?"
)  # of retort.cli: time, job, process
_GOES_ON = "what is finished is kept, and the same command goes on from there."
_LESS_MEMORY = {
    "generate_logits": "lower teacher.generation.batch_size, raise teacher.generation.gpus_per_model, or take a "
    "smaller teacher.dtype",
    "score_validation": "lower teacher.generation.batch_size, raise teacher.generation.gpus_per_model, or take a "
    "smaller teacher.dtype",
    "train": "lower training.batch_size and raise training.gradient_accumulation_steps by as much, or lower "
    "dataset.max_length",
    "evaluate": "lower evaluation.batch_size",
}


@dataclass(frozen=True)
class Failure:
    """What is known of a failed job: the last lines of its last attempt, and why it failed, in a sentence."""

    rule: str
    log: Path
    lines: tuple[str, ...]
    reason: str


def describe_failures(jobs: Iterable[tuple[str, Path]]) -> str:
    """Return what a person is to read of failed jobs, each given as (rule, log). Those of one reason stand together."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for rule, log in jobs:
        found = find_failure(rule, log)
        groups.setdefault((rule, found.reason), []).append(found)
    return "\n\n".join(map(_describe, groups.values()))


def _describe(alike: Sequence[Failure]) -> str:
    first = alike[0]
    others = f" (and {len(alike) - 1} more, for the same reason)" if len(alike) > 1 else ""
    logs = [f"{first.rule} failed{others}: {first.log}"]
    logs += [f"    also {failure.log}" for failure in alike[1:]]
    return "\n".join([*logs, *(f"    | {line}" for line in first.lines), f"    {first.reason}"])


def find_failure(rule: str, log: Path) -> Failure:
    """Read the end of a job's log, as far back as its last attempt began."""
    lines = read_last_attempt(log)
    last = max((n for n, line in enumerate(lines) if line.startswith("error: ")), default=-1)
    # A library's own "error: " before a traceback is not why.
    is_ours = last >= 0 and not any(line.startswith(_TRACEBACK) for line in lines[last:])
    sentence = lines[last] if is_ours else None
    reason = sentence.removeprefix("error: ") if sentence else _guess(rule, lines)
    if not log.exists():
        reason = f"It left no log: look at what Snakemake said of it, above; {_GOES_ON}"
    elif log.stat().st_size == 0:  # a script begins with a line
        reason = (
            "It never began: SLURM refused it (why stands above, after `message:`), or ended it before its script "
            f"started (logs/slurm/ says why); {_GOES_ON}"
        )
    shown = [line for line in lines if line != sentence]  # said once, under them
    return Failure(rule, log, tuple(shown[-_SHOWN_LINES:]), reason)


def read_last_attempt(log: Path) -> list[str]:
    """Return the lines of the last attempt in a log, without time and job, and without those that are empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.splitlines()
    starts = [place for place, line in enumerate(lines) if _ATTEMPT.match(line)]
    last = lines[starts[-1] + 1 :] if starts else lines
    plain = [line[found.end() :] if (found := _STAMP.match(line)) else line for line in last]
    return [_shorten(line) for line in plain if line.strip()]


def _shorten(line: str) -> str:
    """Return a line as a terminal can show it: without control characters, and not endless."""
    line = "".join(
        c if c.isprintable() or c == "\t" else "?" for c in line[: 4 * _SHOWN_CHARACTERS]
    )
    is_ours = line.startswith("error: ")
    return line if is_ours or len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."


def _guess(rule: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines[-200:])
    if is_out_of_memory(text):
        less = _LESS_MEMORY.get(rule, "run fewer jobs at once (--cores)")
        return f"Memory ran out: {less}; {_GOES_ON}"
    if OUT_OF_TIME in text:
        return f"The job's time limit came before the end of its work: {_GOES_ON}"
    if "interrupted by SIGTERM" in text:
        return f"It was ended from outside by SIGTERM, as by a time limit: {_GOES_ON}"
    if "interrupted by" in text:
        return f"It was interrupted: {_GOES_ON}"
    if any(line.startswith(_TRACEBACK) for line in lines):
        return "This is a fault of Retort: please report it, with the log."
    return (
        "It ended without a word, so it was killed (SIGKILL): most often by the kernel, because the machine's memory "
        f"ran out (`dmesg` says so). Give it more memory or run fewer jobs at once; {_GOES_ON}"
    )
