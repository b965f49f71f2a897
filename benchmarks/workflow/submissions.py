"""What many shards on a SLURM cluster cost beside their work: grouped jobs of the real profile and the real rule.

    make benchmark-submissions
    python benchmarks/submissions.py [--shards 8] [--copies 100] [--group 20]    (inside tests/slurm/cluster.sh)

The cluster is the one of the tests: SLURM's own daemons on this machine. A shard is so many copies of a text; 100 of
the small TinyStories are 44 million tokens. The four lines at the profile's end are uncommented. The work is what the
scripts took, each from its process's start to its end, as if they had been typed one below the other into one sbatch;
`--typed` does that too, in the same run, after the measured one. All else is orchestration, of the allocation (from the
job's start to its end) or of the whole (from the command to its end, with index_tokens, which runs beside Snakemake).
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

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
sys.path[:0] = [str(REPOSITORY / "tests" / name) for name in ("slurm", "workflow")]

from cluster import Cluster  # noqa: E402
from project import Project  # noqa: E402

_LOOK_S = 0.1
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
    """Looks at the processes of a script all the time: when each was first and last there.

    A script's children, until they execute something else, have its command line too, and are not counted.
    """

    def __init__(self, script: str) -> None:
        super().__init__(daemon=True)
        self._script = f"/{script}.py".encode()
        self._seen: dict[int, Span] = {}
        self._children: set[int] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._ended.wait(_LOOK_S):
            now = time.time()
            for path in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    script = (path / "cmdline").read_bytes().split(b"\0")[1:2]
                    if script and script[0].endswith(self._script):
                        self._see(int(path.name), _read_parent(path), now)

    def _see(self, number: int, parent: int, now: float) -> None:
        if parent in self._seen or parent in self._children:
            self._children.add(number)  # for good: an orphan's parent is another
        if number not in self._children:
            self._seen[number] = Span(self._seen.get(number, Span(now, now)).began, now)

    def stop(self) -> list[Span]:
        """Return what was seen, in order."""
        self._ended.set()
        self.join()
        return sorted(self._seen.values())


def _read_parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def lay_out(folder: Path, cluster: Cluster, args: argparse.Namespace) -> Project:
    """Write a project of so many shards, whose profile is the shipped one with its last four lines uncommented."""
    folder.mkdir()
    for name in ("workflow", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name)
    shutil.copy2(REPOSITORY / "Snakefile", folder)
    shutil.copy(REPOSITORY / "config" / "students" / "llama_demo.json", folder / "student.json")
    text = args.text.read_bytes()
    with (folder / "documents.jsonl").open("wb") as corpus:
        for _ in range(args.shards * args.copies):
            corpus.write(text)
    project = Project(folder, cluster=cluster)
    project.fill_in(account="research", cpu_partition="cpu", gpu_partition="gpu")
    project.group_shards(args.group)
    dataset = {"name": "json", "data_files": "documents.jsonl", "num_shards": args.shards}
    config = {
        "dataset": dataset | {"tokenizer": str(args.tokenizer), "max_length": 256, "num_proc": 1},
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
    project.execute([*start, index, *words, "--until", "check_inputs"])  # once, however many shards
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
    """Return from when to when a job had its allocation, to a second."""
    told = cluster.run("scontrol", "show", "job", job)
    times = re.findall(r"(?:StartTime|EndTime)=(\S+)", told)
    began, ended = (datetime.fromisoformat(text).timestamp() for text in times)
    return Span(began, ended)


def run_typed(project: Project) -> Span:
    """Type the commands that the logs of Snakemake name into one sbatch; return the span of the allocation."""
    words = ["-F", "-n", "-p", "--cores", "1", "--configfile", "tiny.yaml"]
    said = project.execute([sys.executable, "-m", "snakemake", "--until", "tokenize_shard", *words])
    lines = re.findall(r"^\s*(\S+ \S*tokenize_shard\.py .*?) >> ", said.output, re.MULTILINE)
    if not lines:
        raise RuntimeError(said.output[-3000:])
    script = project.path / "typed.sh"
    script.write_text("\n".join(["#!/bin/bash", "set -e", *lines, ""]))
    cluster = project.cluster
    asked = ["--partition=cpu", "--cpus-per-task=4", "--mem=8000", "--output=typed.log"]
    submitted = project.execute(["sbatch", "--parsable", *asked, "typed.sh"])
    job = submitted.output.strip()
    while cluster.state(job) in ("PENDING", "RUNNING", "COMPLETING"):
        time.sleep(1)
    if cluster.state(job) != "COMPLETED":
        raise RuntimeError((project.path / "typed.log").read_text()[-3000:])
    return read_allocation(cluster, job)


def report(whole: Span, jobs: list[Span], scripts: list[Span], index: Span) -> None:
    """Print the shares, and where the time outside of the scripts went; of one job only, step by step."""
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
        "until it was noticed": index.began - job.ended,
        "end of the command": whole.ended - index.ended,
    }
    for name, seconds in steps.items():
        print(f"  {name:<42} {seconds:>8.1f} s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--copies", type=int, default=100, help="of the text, in each shard")
    parser.add_argument("--group", type=int, default=20, help="shards in a job")
    parser.add_argument(
        "--typed", action="store_true", help="the opponent in an sbatch of its own, too"
    )
    parser.add_argument("--text", type=Path, default=DATA / "text/tinystories/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "tokenizers/gpt2")
    args = parser.parse_args()
    if "RETORT_CLUSTER" not in os.environ:
        parser.error(
            "no cluster: start this by tests/slurm/cluster.sh, as make benchmark-submissions does"
        )
    cluster = Cluster(Path(os.environ["RETORT_CLUSTER"]))
    cluster.start()
    with tempfile.TemporaryDirectory(prefix="retort-submissions-") as name:
        project = lay_out(Path(name) / "project", cluster, args)
        whole, scripts, index = run_pipeline(project)
        assert len(scripts) == args.shards, scripts
        jobs = sorted(read_allocation(cluster, job.id) for job in cluster.jobs())
        report(whole, jobs, scripts, index)
        if args.typed:
            print(f"\n{'typed into one sbatch':<44} {run_typed(project).seconds:>8.1f} s")


if __name__ == "__main__":
    main()
