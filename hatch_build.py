"""Project URLs of the built package: those of the repository that it is built from, the clone's `origin`.

So a fork's package points to the fork, and a checkout without a web address says nothing. A package built from the
source archive keeps the archive's own URLs.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ProjectUrls(MetadataHookInterface):
    """The hook that hatchling runs."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `urls`, to none without a web address."""
        address = find_repository(Path(self.root))
        metadata["urls"] = name_pages(address) if address else {}


def find_repository(root: Path) -> str | None:
    """Return the web address of a checkout's `origin`, None if it has none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # a copy inside another project's repository
        return to_web_address(git("remote", "get-url", "origin"))
    except (OSError, subprocess.SubprocessError):
        return None


def to_web_address(remote: str) -> str | None:
    """Return https://host/owner/name of a remote, without user names and tokens; None for a path."""
    found = re.fullmatch(
        r"(?:(?:https?|ssh|git)://)?(?:[^@/]+@)?([\w.-]+\.\w+)(?::\d+)?[:/](.+?)(?:\.git)?/?",
        remote,
    )
    is_path = remote.startswith((".", "/", "file:"))
    return f"https://{found[1]}/{found[2]}" if found and not is_path else None


def name_pages(address: str) -> dict[str, str]:
    """Return the URLs by the labels that package indexes know."""
    files = f"{address}/blob/HEAD"
    return {
        "Homepage": address,
        "Repository": address,
        "Documentation": f"{files}/docs/guide.md",
        "Changelog": f"{files}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
