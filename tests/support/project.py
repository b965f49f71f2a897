"""A project on the cluster: a copy of the repository's workflow, its SLURM profile filled in, and Snakemake by it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.cluster import Cluster, Job
from support.place import CONFIG_FILE, REPOSITORY, Place, sha256, tiny

PROFILE = Path("profiles") / "slurm" / "config.yaml"
OWN = {"account": "research", "cpu_partition": "cpu", "gpu_partition": "gpu"}
# A part for every document, about a hundred: a worker can be met in the middle of its work. The student is trained by
# two ranks, which are processes of one node.
CONFIG = tiny(
    dataset={"streaming_chunk_size": 1},
    training={"max_steps": 4, "gpus": 2, "device": "cpu"},
    runs={"both": {"training": {"distillation_type": "hybrid", "alpha": 0.5}}},
)
_LAUNCHER = Path(__file__).with_name("quick_snakemake.py")


@dataclass(frozen=True)
class Project(Place):
    """A folder in which `snakemake --profile profiles/slurm` is typed."""

    cluster: Cluster = None  # type: ignore[assignment]
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

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
        project = cls(path, cluster=cluster, env={"RETORT_SIMULATED_GPUS": "1"})
        project.fill_in(**OWN)
        return project

    def fill_in(self, **own: str) -> None:
        """Write into the profile what a user must: the account and the partitions."""
        text = (self.path / PROFILE).read_text()
        for name, value in own.items():
            text, found = re.subn(rf"(?m)^(  {name}:) \S+", rf"\1 {value}", text)
            assert found == 1, name
        (self.path / PROFILE).write_text(text)

    def group_shards(self, number: int) -> None:
        """Uncomment the profile's last block, as docs/slurm.md says, with so many shards in a job."""
        text, found = re.subn(r"(?m)^# (?=[\w-]+: \[)", "", (self.path / PROFILE).read_text())
        assert found == 4
        text, found = re.subn(r"tokenize=\d+", f"tokenize={number}", text)
        assert found == 1, text
        (self.path / PROFILE).write_text(text)

    def command(
        self, *arguments: str, config: str | None = CONFIG_FILE, cores: int = 0
    ) -> list[str]:
        """Return the command that a user types; its number of cores is the profile's."""
        words = [sys.executable, str(_LAUNCHER), *arguments, "--profile", "profiles/slurm"]
        return words + (["--configfile", config] if config else [])

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        """Start Snakemake as a terminal would; it is killed at the test's end, if it is there still.

        Nothing but a worker is real (see conftest.py).
        """
        process = super().start(*arguments, is_real=False, **options)
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Kill what was started here."""
        for process in self.started:
            process.kill()
            process.wait()

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
        found = self.path.glob(f"logs/generate_logits/*_{worker}.log")
        return "".join(path.read_text() for path in found)

    def jobs(self, rule: str = "", states: str = "all") -> list[Job]:
        """Return this project's jobs, in the order of their submission."""
        return self.cluster.jobs(folder=self.path, rule=rule, states=states)

    def workers(self) -> dict[int, int]:
        """Return the process of every worker that runs for this folder, by the worker's number."""
        found = {}
        for process, words in self.processes("generate_logits").items():
            found[int(words[words.index("--worker") + 1])] = process
        return found

    def ranks(self) -> set[tuple[str, str]]:
        """Return the node and the number of every rank that trains a student of this folder now."""
        found = set()
        for process in self.processes("train"):
            with suppress(OSError):
                variables = Path(f"/proc/{process}/environ").read_text().split("\0")
                values = dict(line.split("=", 1) for line in variables if "=" in line)
                if "LOCAL_RANK" in values:
                    found.add((values["SLURMD_NODENAME"], values["LOCAL_RANK"]))
        return found

    def processes(self, script: str) -> dict[int, list[str]]:
        """Return the command lines of this folder's processes that run a script."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_text().split("\0")
                is_script = any(word.endswith(f"/{script}.py") for word in words[1:3])
                if is_script and (path / "cwd").samefile(self.path):
                    found[int(path.name)] = words
        return found

    def pause(self, process: "subprocess.Popen[bytes]", *numbers: int) -> None:
        """Stop workers of a Snakemake in the middle of their work, each after some parts."""
        left = set(numbers)

        def all_stopped() -> bool:
            ready = [number for number in left if self.log(number).count(" done: ") >= 3]
            workers = self.workers() if ready else {}  # a look at all processes takes longer
            for number in workers.keys() & ready:
                os.kill(workers[number], signal.SIGSTOP)
                left.remove(number)
            return not left

        self.cluster.wait_until(all_stopped, f"workers {numbers} are at work", process=process)

    def wake(self) -> None:
        """Let every worker that was stopped go on."""
        for process in self.processes("generate_logits"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    def states(self, worker: int) -> list[str]:
        """Return how each job of a worker ended, in the order of their submission."""
        jobs = self.jobs("generate_logits")
        return [job.state for job in jobs if job.comment.endswith(f"_{worker}")]

    def scheduler_log(self, job: Job) -> str:
        """Return what SLURM says of a job, with what the job said itself."""
        (path,) = self.path.glob(f"logs/slurm/*/*/{job.id}.log")
        return path.read_text()

    def worker_job(self, worker: int, *, state: str = "RUNNING") -> Job:
        """Return the last job of a worker, once it is in a state."""
        found: list[Job] = []

        def is_there() -> bool:
            jobs = self.jobs("generate_logits")
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
        while not self._ended.wait(0.03):
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
        return len({name for name, *_ in self._files.copy()})  # a thread adds to them

    @property
    def again(self) -> int:
        """How often a finished part was written once more."""
        return len(self._files) - self.done


def digest(place: Place) -> str:
    """Return the digest of a finished cache."""
    return sha256(place.cache / "teacher_logits.h5")


# A fault, what happened, the parts that were seen, the project: into the table at the end.
Note = Callable[[str, str, Parts, Project], None]
