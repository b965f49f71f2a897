"""Why jobs failed, read from the ends of their logs and shown when Snakemake exits."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from retort.cli import ATTEMPT, LINE_HEAD, is_out_of_memory
from retort.cluster.deadlines import OUT_OF_TIME

_TAIL_BYTES = 1 << 18
_SHOWN_LINES = 10
_SHOWN_CHARACTERS = 500  # of a line
_TRACEBACK = "Traceback (most recent call last)"
_ATTEMPT = re.compile(re.escape(ATTEMPT) + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
_TOO_LONG = "argument list too long"  # E2BIG, after which a shell exits with 126
_RESUME = "finished work is kept: rerun the same command to resume."
_LESS_MEMORY = {
    "generate_logits": "lower teacher.generation.batch_size, raise teacher.generation.gpus_per_model, or use a "
    "smaller teacher.dtype",
    "score_validation": "lower teacher.generation.batch_size, raise teacher.generation.gpus_per_model, or use a "
    "smaller teacher.dtype",
    "train": "lower training.batch_size and raise training.gradient_accumulation_steps by as much, or lower "
    "dataset.max_length",
    "evaluate": "lower evaluation.batch_size",
}


@dataclass(frozen=True)
class Failure:
    """A failed job: the last lines of its last attempt before the reason, a sentence, or a list of mistakes."""

    rule: str
    log: Path
    lines: tuple[str, ...]
    reason: str


def describe_failures(jobs: Iterable[tuple[str, Path]]) -> str:
    """Return a message about failed jobs, each given as (rule, log), grouped by reason."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for rule, log in jobs:
        found = find_failure(rule, log)
        groups.setdefault((rule, found.reason), []).append(found)
    return "\n\n".join(map(_describe, groups.values()))


def _describe(group: Sequence[Failure]) -> str:
    first = group[0]
    others = f" (and {len(group) - 1} more, for the same reason)" if len(group) > 1 else ""
    logs = [f"{first.rule} failed{others}: {first.log}"]
    logs += [f"    also {failure.log}" for failure in group[1:]]
    reason = first.reason.replace("\n", "\n    ")
    return "\n".join([*logs, *(f"    | {line}" for line in first.lines), f"    {reason}"])


def find_failure(rule: str, log: Path) -> Failure:
    """Return why a job failed, from the last attempt in its log."""
    lines = read_last_attempt(log)
    last = max((n for n, line in enumerate(lines) if line.startswith("error: ")), default=-1)
    # A library's "error: " before a traceback is not the reason.
    is_ours = last >= 0 and not any(line.startswith(_TRACEBACK) for line in lines[last:])
    before, message = (lines[:last], lines[last:]) if is_ours else (lines, [])
    reason = "\n".join(message).removeprefix("error: ") or _guess(rule, lines)
    if not log.exists():
        reason = f"It left no log: see Snakemake's message about it, above; {_RESUME}"
    elif log.stat().st_size == 0:  # a script writes a line first
        reason = (
            "It never began. Without SLURM: it was killed (SIGKILL) while its script started, most often because the "
            "machine ran out of memory (see `dmesg`). With SLURM: SLURM refused it (the reason is above, after "
            f"`message:`), or ended it before its script started (see logs/slurm/). {_RESUME.capitalize()}"
        )
    return Failure(rule, log, tuple(before[-_SHOWN_LINES:]), reason)


def read_last_attempt(log: Path) -> list[str]:
    """Return the non-empty lines of the last attempt in a log, without time, job and process; [] without a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.splitlines()
    starts = [place for place, line in enumerate(lines) if _ATTEMPT.match(line)]
    last = lines[starts[-1] + 1 :] if starts else lines
    plain = [line[found.end() :] if (found := LINE_HEAD.match(line)) else line for line in last]
    return [_shorten(line) for line in plain if line.strip()]


def _shorten(line: str) -> str:
    """Return a line without control characters, and shortened unless it is an error of ours."""
    line = "".join(
        c if c.isprintable() or c == "\t" else "?" for c in line[: 4 * _SHOWN_CHARACTERS]
    )
    is_ours = line.startswith("error: ")
    return line if is_ours or len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} ..."


def _guess(rule: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines[-200:])
    if _TOO_LONG in text.lower():
        return (
            "Its command is longer than this system allows: shorten lists in the config, such as dataset.data_files "
            f"(a folder or a pattern will do); {_RESUME}"
        )
    if is_out_of_memory(text):
        less = _LESS_MEMORY.get(rule, "run fewer jobs at once (--cores)")
        return f"Memory ran out: {less}; {_RESUME}"
    if OUT_OF_TIME in text:
        return f"The job reached its time limit before it was done: {_RESUME}"
    if "interrupted by SIGTERM" in text:
        return f"It was ended by SIGTERM, as a time limit does: {_RESUME}"
    if "interrupted by" in text:
        return f"It was interrupted: {_RESUME}"
    if any(line.startswith(_TRACEBACK) for line in lines):
        return "This is a bug in Retort: please report it, with the log."
    return (
        "It ended without a message, so it was killed (SIGKILL), most often by the kernel because the machine ran "
        f"out of memory (see `dmesg`). Give it more memory or run fewer jobs at once; {_RESUME}"
    )
