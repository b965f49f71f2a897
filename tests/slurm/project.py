"""A project on the cluster: a copy of the repository's workflow, its SLURM profile filled in, and Snakemake by it."""

import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster, Job
from place import CONFIG_FILE, REPOSITORY, Place, sha256, wait_until

PROFILE = Path("profiles") / "slurm" / "config.yaml"
OWN = {"account": '""', "cpu_partition": "cpu", "gpu_partition": "gpu"}
_LAUNCHER = Path(__file__).with_name("quick_snakemake.py")


@dataclass(frozen=True)
class Project(Place):
    """A folder in which `snakemake --profile profiles/slurm` is typed."""

    cluster: Cluster = None  # type: ignore[assignment]

    @classmethod
    def from_parts(cls, parts: Place, path: Path, cluster: Cluster) -> "Project":
        """Copy the workflow, and the teacher, corpus, student and config of another place."""
        path.mkdir()
        for name in ("workflow", "profiles"):
            shutil.copytree(REPOSITORY / name, path / name)
        shutil.copy2(REPOSITORY / "Snakefile", path)
        shutil.copytree(parts.path / "teacher", path / "teacher")
        for name in ("documents.jsonl", "student.json", CONFIG_FILE):
            shutil.copy2(parts.path / name, path)
        project = cls(path, cluster=cluster)
        project.fill_in(**OWN)
        return project

    def fill_in(self, **own: str) -> None:
        """Write into the profile what a user must: the account and the partitions."""
        text = (self.path / PROFILE).read_text()
        for name, value in own.items():
            text, found = re.subn(rf"(?m)^(  {name}:) \S+", rf"\1 {value}", text)
            assert found == 1, name
        (self.path / PROFILE).write_text(text)

    def command(
        self, *arguments: str, config: str | None = CONFIG_FILE, cores: int = 0
    ) -> list[str]:
        """Return the command that a user types; its number of cores is the profile's."""
        words = [sys.executable, str(_LAUNCHER), *arguments, "--profile", "profiles/slurm"]
        return words + (["--configfile", config] if config else [])

    @property
    def merged(self) -> str:
        """The target that is there once the teacher's pass is done."""
        return self.find_output(r"/manifest\.json$")

    def said(self) -> str:
        """Return what the Snakemakes that were started in this folder have said."""
        return (self.path / "started.log").read_text()

    def finish(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait until a Snakemake ends, which must go well."""
        assert process.wait(timeout=300) == 0, self.said()[-6000:]

    def log(self, worker: int) -> str:
        """Return the log of a worker's last attempt."""
        (path,) = self.path.glob(f"logs/generate_logits/*_{worker}.log")
        return path.read_text()

    def worker_job(self, worker: int, *, state: str = "RUNNING") -> Job:
        """Return the last job of a worker, once it is in a state."""
        found: list[Job] = []

        def is_there() -> bool:
            jobs = self.cluster.jobs(rule="generate_logits")
            mine = [job for job in jobs if job.comment.endswith(f"_{worker}")]
            found[:] = mine[-1:]
            return bool(found) and found[0].state == state

        self.cluster.wait_until(is_there, f"worker {worker} is {state}")
        return found[0]


class Parts(threading.Thread):
    """Looks at the parts of a project's cache all the time: a part that is written again is another file."""

    def __init__(self, project: Place) -> None:
        super().__init__(daemon=True)
        self._project = project
        self._files: set[tuple[str, int, int]] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.01):
            for path in self._project.results.glob("logits/*/parts/*.h5"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    self._files.add((path.name, status.st_ino, status.st_mtime_ns))

    def __enter__(self) -> "Parts":
        self.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._ended.set()
        self.join()

    @property
    def done(self) -> int:
        """How many parts were seen."""
        return len({name for name, *_ in self._files})

    @property
    def again(self) -> int:
        """How often a finished part was written once more."""
        return len(self._files) - self.done


def digest(place: Place) -> str:
    """Return the digest of a finished cache."""
    return sha256(place.cache / "teacher_logits.h5")


__all__ = ["Parts", "Project", "digest", "wait_until"]
