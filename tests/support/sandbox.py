"""Whether tests can run bubblewrap on this machine."""

import os
import shutil
import subprocess

import pytest

from retort.evaluation import sandbox


def _find_obstacle() -> str | None:
    """Return why there are no namespaces here. It does not use the code under test, whose failures must not skip."""
    if shutil.which("bwrap") is None:
        return f"no bubblewrap here: {sandbox.INSTALL}"
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--ro-bind", "/", "/"]
    if os.getuid() != 0:
        options += ["--unshare-user", "--disable-userns"]
    command = ["bwrap", *options, "--proc", "/proc", "--dev", "/dev", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


OBSTACLE = _find_obstacle()
needs_sandbox = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
