"""What planning costs: ten thousand shards and 64 workers, beside plain Snakemake with as many jobs.

    python -m benchmarks.workflow.graph [--shards 10000] [--workers 64]

Dry runs (`snakemake -n`), each in a process of its own: wall-clock time, processor time and peak memory. *plain* is a
Snakefile of the same shape whose rules have nothing but an input, an output, a log and a command: what Snakemake itself
needs for so many jobs. *workers left*: every shard and the index exist, and the workers have not run.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from benchmarks.common import REPOSITORY, make_parser
from retort.artifacts.build import build_project
from retort.config.load import load_runs

PLAIN = """\
rule all:
    input:
        "report.html",

rule tokenize_shard:
    input:
        "check.json",
    output:
        "tokens/shard_{{shard}}.h5",
    log:
        "logs/tokenize_shard/{{shard}}.log",
    shell:
        "python tokenize_shard.py --shard {{wildcards.shard}} --output {{output:q}} > {{log:q}} 2>&1"

rule index_tokens:
    input:
        expand("tokens/shard_{{shard}}.h5", shard=[f"{{s:05d}}" for s in range({shards})]),
    output:
        "tokens/index.json",
    log:
        "logs/index_tokens.log",
    shell:
        "python index_tokens.py --shards {{input:q}} --output {{output:q}} > {{log:q}} 2>&1"

rule generate_logits:
    input:
        "tokens/index.json",
    output:
        "logits/metadata_worker{{worker}}.json",
    log:
        "logs/generate_logits/{{worker}}.log",
    shell:
        "python generate_logits.py --worker {{wildcards.worker}} --output {{output:q}} > {{log:q}} 2>&1"

rule report:
    input:
        expand("logits/metadata_worker{{worker}}.json", worker=range({workers})),
    output:
        "report.html",
    log:
        "logs/report.log",
    shell:
        "python report.py --output {{output:q}} > {{log:q}} 2>&1"
"""


class Cost(NamedTuple):
    """Of one command: wall-clock seconds, processor seconds, peak memory in MB."""

    seconds: float
    cpu_seconds: float
    megabytes: float


def measure(folder: Path, *flags: str) -> Cost:
    """Dry-run in a folder. Raises RuntimeError with Snakemake's output when it fails."""
    command = [sys.executable, "-m", "snakemake", "all", "-n", "-q", *flags]
    with (folder / "output.txt").open("w+") as output:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        output.seek(0)
        if status:
            raise RuntimeError(output.read()[-3000:])
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)


def make_plain(folder: Path, *, shards: int, workers: int) -> None:
    """Write the opponent's Snakefile."""
    folder.mkdir()
    (folder / "Snakefile").write_text(PLAIN.format(shards=shards, workers=workers))
    (folder / "check.json").touch()


def make_retort(folder: Path, *, shards: int, workers: int) -> None:
    """Write a config of so many shards and workers; its one document and its teacher are never read."""
    folder.mkdir()
    (folder / "documents.jsonl").write_text('{"text": "one"}\n')
    student = REPOSITORY / "config" / "students" / "llama_demo.json"
    shutil.copy(student, folder / "student.json")
    config = {
        "dataset": {"name": "json", "data_files": "documents.jsonl", "num_shards": shards},
        "teacher": {"model_path": "gpt2", "generation": {"num_workers": workers}},
        "student": {"config": "student.json"},
        "training": {"max_steps": 1000},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))


def make_shards(folder: Path) -> None:
    """Create every file before the teacher's pass, empty."""
    os.chdir(folder)
    project = build_project(load_runs(yaml.safe_load(Path("mine.yaml").read_text())))
    (tokens,), (teacher,) = project.tokens.values(), project.teachers.values()
    made = [teacher.folder / "fingerprint.json", tokens.folder / "index.json"]
    shards = range(tokens.corpus.dataset.num_shards)
    for path in [*made, *(tokens.folder / f"shard_{s:05d}.h5" for s in shards)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def print_cost(label: str, cost: Cost, opponent: Cost) -> None:
    """Print a line of the table."""
    ratio = cost.cpu_seconds / opponent.cpu_seconds
    print(
        f"{label:<34} {cost.seconds:>8.1f} {cost.cpu_seconds:>10.1f} {ratio:>8.2f} {cost.megabytes:>6.0f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = make_parser("benchmarks.workflow.graph", __doc__)
    parser.add_argument("--shards", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--workers", type=int, default=64, help="default: 64")
    flags = parser.parse_args()
    size = {"shards": flags.shards, "workers": flags.workers}
    ours = ("-s", str(REPOSITORY / "Snakefile"), "--configfile", "mine.yaml")
    profile = ("--profile", str(REPOSITORY / "profiles" / "slurm"))
    print(f"{flags.shards:,} shards, {flags.workers} workers\n")
    print(f"{'dry run':<34} {'seconds':>8} {'processor':>10} {'plain x':>8} {'MB':>6}")
    with tempfile.TemporaryDirectory(prefix="retort-graph-") as name:
        plain, retort = Path(name) / "plain", Path(name) / "retort"
        make_plain(plain, **size)
        make_retort(retort, **size)
        opponent = measure(plain)
        print_cost("plain, nothing made", opponent, opponent)
        print_cost("nothing made", measure(retort, *ours), opponent)
        print_cost("nothing made, profiles/slurm", measure(retort, *ours, *profile), opponent)
        make_shards(retort)
        print_cost("workers left", measure(retort, *ours), opponent)
        print_cost("workers left, profiles/slurm", measure(retort, *ours, *profile), opponent)


if __name__ == "__main__":
    main()
