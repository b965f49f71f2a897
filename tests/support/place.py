"""A folder in which real Snakemake runs on tiny parts, and what it says about what it would do."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_FILE = "tiny.yaml"
_AT_START = dict(os.environ)  # libraries that tests load set variables that a user's shell has not
_PATIENCE_S = 3000  # a busy machine is slow, not wrong

# Every path is relative to the folder that Snakemake runs in, so that a copy of the folder is the same project.
TINY: dict[str, Any] = {
    "dataset": {
        "name": "json",
        "data_files": "documents.jsonl",
        "max_length": 64,
        "num_shards": 2,
        "streaming_chunk_size": 10,
        "validation_fraction": 0.15,
        "num_proc": 1,
    },
    "teacher": {"model_path": "teacher", "generation": {"num_workers": 2}},
    "cache": {"top_k": 8, "temperatures": [1.0]},
    "student": {"config": "student.json"},
    "training": {
        "temperature": 1.0,
        "max_steps": 12,
        "batch_size": 4,
        "learning_rate": 1.0e-2,
        "save_steps": 4,
        "logging_steps": 4,
    },
    "runs": {
        "hard": {"training": {"distillation_type": "output"}},
        "both": {"training": {"distillation_type": "hybrid", "alpha": 0.5}},
    },
}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid over it, mappings merged.

    Not the config's own `merge`: tests that change a config would not see a mistake in it.
    """
    both = dict(base)
    for key, value in over.items():
        below = both.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        both[key] = value
    return both


def tiny(**over: Any) -> dict[str, Any]:
    """Return the tiny config with sections laid over it; `runs` is replaced, a section of None removed."""
    config = merge(TINY, over)
    if "runs" in over:
        config["runs"] = over["runs"]
    return {key: value for key, value in config.items() if value is not None}


@dataclass(frozen=True)
class Finished:
    """What a command said and how it ended."""

    returncode: int
    output: str  # stdout and stderr, as a person sees them


@dataclass(frozen=True)
class Place:
    """A folder with a teacher, a corpus and a student, in which Snakemake runs with its own files elsewhere."""

    path: Path
    repository: Path = REPOSITORY
    env: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # variables that commands do not see
    interpreter: ClassVar[Path] = Path(sys.executable)  # or what stands for it in this session
    # Commands that run to their end begin with it.
    python: Path = field(default_factory=lambda: Place.interpreter)

    @property
    def results(self) -> Path:
        """Where everything that Snakemake makes lies."""
        return self.path / "results"

    def write_config(self, config: Mapping[str, Any], name: str = CONFIG_FILE) -> Path:
        """Write a config for the next commands."""
        path = self.path / name
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        return path

    def environment(self) -> dict[str, str]:
        """Return the environment of commands: this repository's library, no GPU, no network."""
        inherited = {k: v for k, v in _AT_START.items() if not k.startswith(("SNAKEMAKE", "SLURM"))}
        offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        given = inherited | offline | {"PYTHONPATH": str(self.repository / "src")} | self.env
        return {name: value for name, value in given.items() if name not in self.without}

    def command(
        self, *arguments: str, config: str | None = CONFIG_FILE, cores: int = 2
    ) -> list[str]:
        """Return a snakemake command; targets go before options, which is why `arguments` come first."""
        words = [sys.executable, "-m", "snakemake", *arguments, "--cores", str(cores)]
        words += ["-s", str(self.repository / "Snakefile"), "--directory", str(self.path)]
        return words + (["--configfile", str(self.path / config)] if config else [])

    @property
    def as_it_is(self) -> "Place":
        """The same folder with the real interpreter for every command."""
        return replace(self, python=Path(sys.executable))

    def try_snakemake(self, *arguments: str, **options: Any) -> Finished:
        """Run snakemake to its end, whatever that is."""
        return self.execute(self.command(*arguments, **options))

    def execute(self, command: list[str], *, patience_s: float = _PATIENCE_S) -> Finished:
        """Run a command in this folder to its end, by a fork server where one stands for the interpreter."""
        if command[0] == sys.executable:
            command = [str(self.python), *command[1:]]
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=patience_s,
            check=False,
        )
        return Finished(done.returncode, done.stdout)

    def snakemake(self, *arguments: str, **options: Any) -> str:
        """Run snakemake, which must succeed; return what it said."""
        done = self.try_snakemake(*arguments, **options)
        assert done.returncode == 0, done.output
        return done.output

    def plan(self, *arguments: str, **options: Any) -> dict[str, int]:
        """Return the jobs that would run, by rule; without `all`."""
        return read_job_table(self.snakemake(*arguments, "-n", "--quiet", "rules", **options))

    def outputs(self, *arguments: str, **options: Any) -> set[str]:
        """Return the paths that would be made."""
        said = self.snakemake(*arguments, "--summary", **options)
        rows = [line.split("\t") for line in said.splitlines() if line.count("\t") == 5]
        return {row[0] for row in rows if row[-1] == "update pending"}

    def find_output(self, pattern: str, *arguments: str, **options: Any) -> str:
        """Return the one path that would be made and matches a regular expression."""
        found = [p for p in self.outputs(*arguments, **options) if re.search(pattern, p)]
        assert len(found) == 1, (pattern, found)
        return found[0]

    @property
    def cache(self) -> Path:
        """The folder of the only logit cache."""
        (folder,) = (self.results / "logits").iterdir()
        return folder

    def start(
        self, *arguments: str, is_real: bool = True, **options: Any
    ) -> "subprocess.Popen[bytes]":
        """Start snakemake as a terminal would: in a process group of its own.

        What is to be stopped or killed is real: it and its jobs are interpreters that just started.
        """
        python = sys.executable if is_real else str(self.python)
        log = (self.path / "started.log").open("ab")
        with log:
            return subprocess.Popen(
                [python, *self.command(*arguments, **options)[1:]],
                cwd=self.path,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def copy_to(self, path: Path) -> "Place":
        """Return a place on this machine with a copy of everything, times of files included."""
        shutil.copytree(self.path, path, symlinks=True, copy_function=shutil.copy2)
        return Place(path, self.repository, dict(self.env), self.without, self.python)


Once = Callable[[str, Callable[[Path], object]], Place]


def lay_out(path: Path, *, teacher: Path, corpus: Path, student: Path) -> Place:
    """Return a folder with copies of the tiny parts, nothing run yet."""
    shutil.copytree(teacher, path / "teacher")
    shutil.copy(corpus, path / "documents.jsonl")
    shutil.copy(student, path / "student.json")
    place = Place(path)
    place.write_config(TINY)
    return place


def read_job_table(said: str) -> dict[str, int]:
    """Read Snakemake's table of jobs; {} where it says that nothing is to be done."""
    table = re.search(r"^job +count\n[- ]+\n(.*?)\n\n", said + "\n\n", re.MULTILINE | re.DOTALL)
    if table is None:
        assert "Nothing to be done" in said, said
        return {}
    rows = (line.rsplit(maxsplit=1) for line in table[1].splitlines())
    return {rule: int(count) for rule, count in rows if rule not in ("all", "total")}


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the digest and the time of every file in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {str(p.relative_to(folder)): (sha256(p), p.stat().st_mtime_ns) for p in files}


def wait_until(
    condition: Callable[[], object], *, process: "subprocess.Popen[Any] | None" = None
) -> None:
    """Wait until a condition holds; fail when a process ends before."""
    until = time.monotonic() + _PATIENCE_S
    while not condition():
        assert process is None or process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
