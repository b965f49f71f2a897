"""run.json beside every output: the command, config, code version and packages that made it, where, and how long."""

import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from retort.io.records import JsonObject, Record

RUN_FILE = "run.json"
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "h5py", "snakemake")


class RunRecord(Record, format="retort-run", version=2):
    """How an output was made.

    run, source: name of the run in the config, and of the config file, where they are known (see `set_origin`). config:
    the sections that the output was made from. dtype: of the model's weights, None where there is no model.
    """

    command: tuple[str, ...]
    source: str | None
    run: str | None
    commit: str | None
    uncommitted_changes: bool | None
    config: JsonObject
    seed: int | None
    dtype: str | None
    device: str
    seconds: float
    finished: str
    python: str
    versions: dict[str, str]


# (run, source) of the job that this process does.
_origin: ContextVar[tuple[str | None, str | None]] = ContextVar("origin", default=(None, None))


def set_origin(*, run: str | None, source: str | None) -> None:
    """Say which run of which config file this process works for: all that it makes records it."""
    _origin.set((run, source))


def describe_run(
    *,
    section: Mapping[str, Any],
    seconds: float,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> RunRecord:
    """Return the record of this process. `section`: sections of the config, by name; `device`: None for the CPU.

    `versions`: of packages beside those that are always recorded.
    """
    commit, is_dirty = _git_state()
    run, source = _origin.get()
    return RunRecord(
        command=(Path(sys.argv[0]).name, *sys.argv[1:]),
        source=source,
        run=run,
        commit=commit,
        uncommitted_changes=is_dirty,
        config=to_jsonable_python(section),
        seed=seed,
        dtype=dtype,
        device=device or name_cpu(),
        seconds=round(seconds, 3),
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        python=platform.python_version(),
        versions=_versions() | dict(versions or {}),
    )


@cache
def name_cpu() -> str:
    """Return the model of this machine's CPU, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def _git_state() -> tuple[str | None, bool | None]:
    """Return (commit, has uncommitted changes) of the checkout that holds this package, or (None, None)."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
