"""run.json beside every output: the command, config, code version and packages that made it, where, and how long."""

import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


def describe_run(
    *, section: Mapping[str, Any], seed: int | None, device: str, seconds: float
) -> dict[str, Any]:
    """Return the content of an output's run.json. `section` is the config it was made from, `seconds` the run time."""
    commit, is_dirty = _git_state()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit,
        "uncommitted_changes": is_dirty,
        "config": dict(section),
        "seed": seed,
        "device": device,
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": _versions(
            ("torch", "transformers", "tokenizers", "datasets", "numpy", "h5py", "snakemake")
        ),
    }


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


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
