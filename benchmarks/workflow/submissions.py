"""What many shards on a SLURM cluster cost beside their work: grouped jobs of the real profile and the real rule.

    tests/slurm/cluster.sh python -m benchmarks.workflow.submissions [--shards 8] [--copies 100] [--group 20] [--plain]

The cluster is that of the tests: SLURM's own daemons on this machine. A shard is a number of copies of a text; 100 of
the small TinyStories are 44 million tokens. The four lines at the profile's end are uncommented. The work is what the
scripts took, each from its process's start to its end, as if one sbatch script had held all commands; `--plain` runs
that script too, after the measured run. All else is orchestration, of the allocation (from the job's start to its end)
or of the whole (from the command to its end, with index_tokens, which runs beside Snakemake).
"""

import argparse
import itertools
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import REPOSITORY, make_parser

DATA = REPOSITORY.parent / "shared" / "data"
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.cluster import Cluster  # noqa: E402
from support.project import Project  # noqa: E402

_POLL_S = 0.1
_DAY_S = 86_400.0


class Span(NamedTuple):
    """When something began and ended, in seconds since 1970."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class Watch(threading.Thread):
    """Polls the processes that run a script, and records when each was first and last seen.

    A script's children have its command line too until they execute something else; they are not counted.
    """

    def __init__(self, script: str) -> None:
        super().__init__(daemon=True)
        self._script = f"/{script}.py".encode()
        self._seen: dict[int, Span] = {}
        self._children: set[int] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        """Poll until `stop` is called."""
        while not self._ended.wait(_POLL_S):
            now = time.time()
            for path in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    script = (path / "cmdline").read_bytes().split(b"\0")[1:2]
                    if script and script[0].endswith(self._script):
                        self._see(int(path.name), _read_parent(path), now)

    def _see(self, number: int, parent: int, now: float) -> None:
        if parent in self._seen or parent in self._children:
            self._children.add(number)  # kept, since an orphan gets another parent
        if number not in self._children:
            self._seen[number] = Span(self._seen.get(number, Span(now, now)).began, now)

    def stop(self) -> list[Span]:
        """Return what was seen, in order."""
        self._ended.set()
        self.join()
        return sorted(self._seen.values())


def _read_parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def lay_out(folder: Path, cluster: Cluster, flags: argparse.Namespace) -> Project:
    """Write a project of that many shards, with the shipped profile and its last four lines uncommented."""
    folder.mkdir()
    for name in ("workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy2(REPOSITORY / "Snakefile", folder)
    shutil.copy(REPOSITORY / "config" / "students" / "llama_demo.json", folder / "student.json")
    text = flags.text.read_bytes()
    with (folder / "documents.jsonl").open("wb") as corpus:
        for _ in range(flags.shards * flags.copies):
            corpus.write(text)
    project = Project(folder, cluster=cluster)
    project.fill_in(account="research", cpu_partition="cpu", gpu_partition="gpu")
    project.group_shards(flags.group)
    dataset = {"name": "json", "data_files": "documents.jsonl", "num_shards": flags.shards}
    config = {
        "dataset": dataset | {"tokenizer": str(flags.tokenizer), "max_length": 256, "num_proc": 1},
        "teacher": {"model_path": None},
        "student": {"config": "student.json"},
        "training": {"distillation_type": "output", "max_steps": 5, "device": "cpu"},
    }
    project.write_config(config, "tiny.yaml")
    return project


def run_pipeline(project: Project) -> tuple[Span, list[Span], Span]:
    """Run `snakemake --profile profiles/slurm` up to the index; return its span, and those of shards and index."""
    start = [sys.executable, "-m", "snakemake"]
    words = ["--profile", "profiles/slurm", "--configfile", "tiny.yaml"]
    index = project.find_output(r"tokens/\w+/index\.json$")
    project.execute(
        [*start, index, *words, "--until", "check_inputs"]
    )  # does not depend on the number of shards
    watches = [Watch(script) for script in ("tokenize_shard", "index_tokens")]
    for watch in watches:
        watch.start()
    began = time.time()
    done = project.execute([*start, index, *words], patience_s=_DAY_S)
    whole = Span(began, time.time())
    if done.returncode:
        raise RuntimeError(done.output[-3000:])
    shards, (index_span,) = (watch.stop() for watch in watches)
    return whole, shards, index_span


def read_allocation(cluster: Cluster, job: str) -> Span:
    """Return the span of a job's allocation, to a second."""
    shown = cluster.run("scontrol", "show", "job", job)
    times = re.findall(r"(?:StartTime|EndTime)=(\S+)", shown)
    began, ended = (datetime.fromisoformat(text).timestamp() for text in times)
    return Span(began, ended)


def run_plain(project: Project) -> Span:
    """Run the commands that Snakemake's dry run prints in one sbatch script; return the span of its allocation."""
    words = ["-F", "-n", "-p", "--cores", "1", "--configfile", "tiny.yaml"]
    printed = project.execute(
        [sys.executable, "-m", "snakemake", "--until", "tokenize_shard", *words]
    )
    lines = re.findall(r"^\s*(\S+ \S*tokenize_shard\.py .*?) >> ", printed.output, re.MULTILINE)
    if not lines:
        raise RuntimeError(printed.output[-3000:])
    script = project.path / "plain.sh"
    script.write_text("\n".join(["#!/bin/bash", "set -e", *lines, ""]))
    cluster = project.cluster
    asked = ["--partition=cpu", "--cpus-per-task=4", "--mem=8000", "--output=plain.log"]
    submitted = project.execute(["sbatch", "--parsable", *asked, "plain.sh"])
    job = submitted.output.strip()
    while cluster.state(job) in ("PENDING", "RUNNING", "COMPLETING"):
        time.sleep(1)
    if cluster.state(job) != "COMPLETED":
        raise RuntimeError((project.path / "plain.log").read_text()[-3000:])
    return read_allocation(cluster, job)


def report(whole: Span, jobs: list[Span], scripts: list[Span], index: Span) -> None:
    """Print the shares, and for a single job where the time outside of the scripts went."""
    work = sum(script.seconds for script in scripts)
    print(f"{len(scripts)} shards of {work / len(scripts):.0f} s in {len(jobs)} job(s)\n")
    print(f"{'scripts':<44} {work:>8.1f} s")
    held = sum(job.seconds for job in jobs)
    print(f"{'index_tokens':<44} {index.seconds:>8.1f} s")
    both = work + index.seconds
    for name, seconds, own in (("allocation", held, work), ("command", whole.seconds, both)):
        label, outside = f"{name}, from start to end", (seconds - own) / seconds
        print(f"{label:<44} {seconds:>8.1f} s   outside {outside:.1%}")
    if len(jobs) > 1:
        return
    (job,) = jobs
    between = [second.began - first.ended for first, second in itertools.pairwise(scripts)]
    steps = {
        "planning and sbatch": job.began - whole.began,
        "Snakemake's start in the job": scripts[0].began - job.began,
        f"between shards ({sum(between) / max(1, len(between)):.1f} s each)": sum(between),
        "end of the job": job.ended - scripts[-1].ended,
        "until Snakemake noticed": index.began - job.ended,
        "end of the command": whole.ended - index.ended,
    }
    for name, seconds in steps.items():
        print(f"  {name:<42} {seconds:>8.1f} s")


def main() -> None:
    """Print the table."""
    parser = make_parser("benchmarks.workflow.submissions", __doc__)
    parser.add_argument("--shards", type=int, default=8, help="default: 8")
    parser.add_argument("--copies", type=int, default=100, help="of the text, in each shard")
    parser.add_argument("--group", type=int, default=20, help="shards in a job")
    parser.add_argument(
        "--plain", action="store_true", help="run the same commands in one sbatch script, too"
    )
    parser.add_argument("--text", type=Path, default=DATA / "text/tinystories/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizers/gpt2")
    flags = parser.parse_args()
    if "RETORT_CLUSTER" not in os.environ:
        parser.error(
            "no SLURM cluster: run make benchmark-submissions, after tests/slurm/install.sh has installed SLURM"
        )
    for path in (flags.text, flags.tokenizer):
        if not path.exists():
            parser.error(f"{path} does not exist: give --text FILE.jsonl and --tokenizer FOLDER")
    cluster = Cluster(Path(os.environ["RETORT_CLUSTER"]))
    cluster.start()
    with tempfile.TemporaryDirectory(prefix="retort-submissions-") as name:
        project = lay_out(Path(name) / "project", cluster, flags)
        whole, scripts, index = run_pipeline(project)
        assert len(scripts) == flags.shards, scripts
        jobs = sorted(read_allocation(cluster, job.id) for job in cluster.jobs())
        report(whole, jobs, scripts, index)
        if flags.plain:
            print(f"\n{'the same in one sbatch script':<44} {run_plain(project).seconds:>8.1f} s")


if __name__ == "__main__":
    main()
