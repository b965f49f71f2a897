"""Students that start as a part of their teacher beside ones of the same shape with random weights, at equal steps.

    python -m benchmarks.training.starts [--out FOLDER] [--teachers stories260K demo] [--steps 100] [--seeds 3]

Two teachers on held-out documents of their own text: stories260K (../shared/data, left out where that is missing), and
the demo's, which is trained first (three minutes) or is the model of --demo-teacher. Of each, `student.from_teacher`
keeps layers, and layers of less width. All students learn from a cache (top_p 0.001, temperature 1, alpha 0.1), 4
sequences of 256 tokens a step, at a learning rate of 1e-3, or, with random weights, the better of two larger ones; a
seed decides the order of the text, and the random weights. Every student is a run of
the pipeline in FOLDER/results, so a rerun of the command resumes.
"""

import argparse
import itertools
import multiprocessing
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import format_not_run, log, make_parser
from benchmarks.defaults.experiment import CACHES, DATA, TEACHERS, Experiment, make_student
from benchmarks.quality.table import Mean
from retort.artifacts.build import build_project
from retort.config.load import load_runs
from retort.config.sections import Student
from retort.config.student import FromTeacher
from retort.io.files import write_json
from retort.models.load import load_model_config
from retort.pruning.shapes import plan_pruning

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "stories260K": {
        "layers": {"layers": 3},
        "layers, width": {
            "layers": 3,
            "hidden_size": 32,
            "intermediate_size": 86,
            "num_attention_heads": 4,
        },
    },
    "demo": {
        "layers": {"layers": 2},
        "layers, width": {
            "layers": 2,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_attention_heads": 2,
        },
    },
}
RATES = {"part": (1e-3,), "random": (3e-3, 5e-3)}


@dataclass(frozen=True)
class Start:
    """A student: what is kept of its teacher (one of PARTS), as its start or as the shape of random weights."""

    part: str
    is_random: bool
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Return its name as a run."""
        part = self.part.replace(", ", "-")
        return f"{part}-{'random' if self.is_random else 'part'}-lr{self.rate:g}-s{self.seed}"


@dataclass(frozen=True)
class Found:
    """Held-out loss, nats, and number of parameters."""

    loss: float
    parameters: int


@dataclass(frozen=True)
class Comparison:
    """All students of one teacher, the model in `path`, after a number of steps; parts: one of PARTS."""

    folder: Path
    path: Path
    steps: int
    dataset: dict[str, Any]
    parts: dict[str, dict[str, Any]]

    def describe(self, starts: list[Start]) -> dict[str, Any]:
        """Return a config with these students as runs."""
        training = {
            "alpha": 0.1,
            "temperature": 1.0,
            "batch_size": 4,
            "max_steps": self.steps,
            "warmup_steps": self.steps // 10,
            "device": "cpu",
            "dataloader_num_workers": 0,
        }
        runs = {
            start.name: {
                "student": self._describe_student(start),
                "training": {"seed": start.seed, "learning_rate": start.rate},
            }
            for start in starts
        }
        return {
            "output": {"results_dir": str(self.folder / "results")},
            "dataset": self.dataset,
            "teacher": {"model_path": str(self.path), "device": "cpu"},
            "cache": CACHES["top_p 0.001"] | {"temperatures": [1.0]},
            "training": training,
            "evaluation": {"max_positions": 8192, "samples": {"num_samples": 0}},
            "runs": runs,
        }

    def _describe_student(self, start: Start) -> dict[str, Any]:
        part = self.parts[start.part]
        if not start.is_random:
            return {"from_teacher": part}
        section = Student(from_teacher=FromTeacher(**part))
        config = plan_pruning(section, load_model_config(str(self.path)), name="teacher").config
        path = self.folder / f"{self.path.name}-{start.part.replace(', ', '-')}.json"
        content = config.to_dict()
        write_json(path, {k: v for k, v in content.items() if k != "dtype"})
        return {"config": str(path)}

    def measure(self, start: Start) -> Found:
        """Train and evaluate a student as the workflow does, unless that is done."""
        run = build_project(load_runs(self.describe([start]))).runs[start.name]
        found = make_student(run)
        loss = found.scores.student.metrics["loss"].value
        return Found(loss, found.training.summary.student_parameters)


def list_starts(parts: Iterable[str], num_seeds: int) -> list[Start]:
    """Return all students of a teacher."""
    ways = [(name == "random", rate) for name, rates in RATES.items() for rate in rates]
    kinds = itertools.product(parts, ways, range(num_seeds))
    return [Start(part, *way, seed) for part, way, seed in kinds]


def compare(experiment: Experiment, comparison: Comparison, num_seeds: int) -> dict[Start, Found]:
    """Make all students of a teacher, two at a time."""
    starts = list_starts(comparison.parts, num_seeds)
    command = experiment.write_command(comparison.describe(starts), "merge_h5", "prune_teacher")
    subprocess.run(command, cwd=experiment.folder, check=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = dict(zip(starts, pool.map(comparison.measure, starts, chunksize=1), strict=True))
    for start, result in found.items():
        log(f"{start.name}: loss {result.loss:.4f}")
    return found


def format_table(results: dict[Start, Found]) -> Iterator[str]:
    """Yield a line for each start: means over seeds with 95 % intervals (Student's t), and the differences by seed.

    Below random: how much lower the loss is than that of random weights of the same shape, at their best rate.
    """
    yield f"{'shape':16}{'start':8}{'lr':>7}{'parameters':>12}  {'held-out loss':>18}  {'below random':>18}"
    for part in dict.fromkeys(start.part for start in results):
        own = [start for start in results if start.part == part]
        ways = list(dict.fromkeys(replace(start, seed=0) for start in own))
        losses = {way: _losses(way, results) for way in ways}
        best = min((way for way in ways if way.is_random), key=lambda way: losses[way].mean())
        for way in ways:
            gain = f"{Mean.over(losses[best] - losses[way]):.3f}" if way != best else ""
            name, size = "random" if way.is_random else "part", results[way].parameters
            yield (
                f"{part:16}{name:8}{way.rate:7g}{size:12,}  {Mean.over(losses[way]):18.3f}  {gain:>18}"
            )


def _losses(way: Start, results: dict[Start, Found]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.array([found.loss for s, found in results.items() if replace(s, seed=0) == way])


def main() -> None:
    """Make what is missing, and print a table for each teacher."""
    parser = make_parser("benchmarks.training.starts", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "retort-starts",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument("--teachers", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--demo-teacher", type=Path, metavar="FOLDER", help="a demo's model/")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 10))
    flags: argparse.Namespace = parser.parse_args()
    experiment = Experiment(flags.out, steps=flags.steps)
    for teacher in flags.teachers:
        path = DATA / "models/stories260K"
        if teacher == "demo":
            if flags.demo_teacher is None:
                experiment.make_demo_teacher()
            path = flags.demo_teacher or experiment.folder / "demo_teacher"
        if not path.is_dir():
            print(format_not_run(teacher, f"{path} does not exist", width=12))
            continue
        comparison = Comparison(
            experiment.folder,
            path.resolve(),
            flags.steps,
            dataset=TEACHERS[teacher]["dataset"],
            parts=PARTS[teacher],
        )
        results = compare(experiment, comparison, flags.seeds)
        print(f"\n{teacher}, {flags.steps} steps, {flags.seeds} seeds:")
        print("\n".join(format_table(results)))


if __name__ == "__main__":
    main()
