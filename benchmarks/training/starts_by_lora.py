"""Where a student begins, with all its weights trained or by LoRA: loss, memory and seconds of equal steps.

    python -m benchmarks.training.starts_by_lora [--out FOLDER] [--steps 100] [--seeds 3]

The teacher is stories260K (../shared/data), and every student has its shape with three of its five layers: random
weights, a part of the teacher (student.from_teacher), or a checkpoint (student.model_path) that learned from text for
as many steps before. Each is a run of the pipeline in FOLDER/results, so a rerun of the command resumes. Memory is that
of weights, gradients and the optimizer's state, in float32.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import format_not_run, make_parser
from benchmarks.defaults.experiment import CACHES, DATA, TEACHERS, Experiment
from benchmarks.quality.table import Mean
from retort.artifacts.build import build_project
from retort.config.load import load_runs
from retort.evaluation.records import Metrics
from retort.io.files import write_json
from retort.models.load import load_model_config

LAYERS = 3
LORA = {"rank": 16}
FULL_RATE, LORA_RATE = 1e-3, 1e-2
_BEFORE = "before"  # the run whose student the others take as a checkpoint


def describe(folder: Path, runs: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """Return a config with these runs."""
    return {
        "output": {"results_dir": str(folder / "results")},
        "dataset": TEACHERS["stories260K"]["dataset"],
        "teacher": {"model_path": str((DATA / "models/stories260K").resolve()), "device": "cpu"},
        "cache": CACHES["top_p 0.001"] | {"temperatures": [1.0]},
        "training": {
            "alpha": 0.1,
            "temperature": 1.0,
            "batch_size": 8,
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "learning_rate": FULL_RATE,
            "device": "cpu",
            "dataloader_num_workers": 0,
            "eval_steps": None,
        },
        "evaluation": {"max_positions": 8192, "samples": {"num_samples": 0}},
        "runs": runs,
    }


def write_student(folder: Path) -> str:
    """Write the config of the students, and return its path."""
    config = load_model_config(str(DATA / "models/stories260K")).to_dict()
    config |= {"num_hidden_layers": LAYERS, "layer_types": None}
    path = folder / "student.json"
    write_json(path, {k: v for k, v in config.items() if k != "dtype" and v is not None})
    return str(path)


def list_runs(student: str, checkpoint: str, num_seeds: int) -> dict[str, Any]:
    """Return the runs of every way and seed, by name."""
    starts = {
        "random": {"config": student},
        "part of the teacher": {"from_teacher": {"layers": LAYERS}},
        "checkpoint": {"model_path": checkpoint},
    }
    runs = {}
    for start, section in starts.items():
        for trained in ("all", "LoRA"):
            if (start, trained) == ("random", "LoRA"):
                continue  # refused: adapters of random weights
            lora = {"lora": LORA, "learning_rate": LORA_RATE} if trained == "LoRA" else {}
            for seed in range(num_seeds):
                name = f"{start}, {trained}, {seed}".replace(", ", "-").replace(" ", "_")
                runs[name] = {"student": section, "training": {"seed": seed} | lora}
    return runs


def measure(config: dict[str, Any]) -> dict[str, Metrics]:
    """Return the metrics of finished runs, by name."""
    project = build_project(load_runs(config))
    return {name: Metrics.read(run.metrics_path) for name, run in project.runs.items()}


def format_table(found: dict[str, Metrics]) -> Iterator[str]:
    """Yield a line for each way: means over seeds, of the loss with a 95 % interval (Student's t)."""
    yield f"{'start':22}{'trained':9}{'parameters':>22}{'memory':>9}{'held-out loss':>17}{'seconds':>9}"
    for way in dict.fromkeys(name.rpartition("-")[0] for name in found):
        own = [metrics for name, metrics in found.items() if name.rpartition("-")[0] == way]
        summary = own[0].training.summary
        trained = summary.trained_parameters or summary.student_parameters
        memory = 4 * (summary.student_parameters + 3 * trained) / 1e6  # gradient and two moments
        losses = Mean.over(np.array([m.scores.student.metrics["loss"].value for m in own]))
        seconds = sum(m.training.summary.seconds for m in own) / len(own)
        start, _, kind = way.rpartition("-")
        parameters = f"{trained:,} of {summary.student_parameters:,}"
        yield (
            f"{start.replace('_', ' '):22}{kind:9}{parameters:>22}{memory:6.2f} MB{losses:17.3f}{seconds:9.1f}"
        )


def main() -> None:
    """Make what is missing, and print the table."""
    parser = make_parser("benchmarks.training.starts_by_lora", __doc__)
    folder = Path(tempfile.gettempdir()) / "retort-starts-by-lora"
    parser.add_argument("--out", type=Path, default=folder, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 10))
    flags: argparse.Namespace = parser.parse_args()
    if not (DATA / "models/stories260K").is_dir():
        print(format_not_run("stories260K", f"{DATA} does not exist", width=12))
        return
    experiment = Experiment(flags.out, steps=flags.steps)
    student = write_student(flags.out)
    text = {"distillation_type": "output", "alpha": 1.0, "seed": 100}
    before = describe(
        flags.out, {_BEFORE: {"student": {"config": student}, "training": text}}, steps=flags.steps
    )
    subprocess.run(experiment.write_command(before, "train"), cwd=flags.out, check=True)
    (run,) = build_project(load_runs(before)).runs.values()
    runs = list_runs(student, str(run.folder / "final"), flags.seeds)
    config = describe(flags.out, runs, steps=flags.steps)
    subprocess.run(experiment.write_command(config, "evaluate"), cwd=flags.out, check=True)
    print("\n".join(format_table(measure(config))))


if __name__ == "__main__":
    main()
