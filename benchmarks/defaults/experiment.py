"""Students of the benchmark of defaults: their settings, and how the pipeline makes and measures them."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from retort.artifacts.build import build_project
from retort.artifacts.jobs import build_job
from retort.artifacts.project import Run
from retort.config.load import load_runs
from retort.evaluation.records import Metrics
from retort.evaluation.run import evaluate_run
from retort.io.digests import digest
from retort.io.files import write_json
from retort.training.run import train_run

DATA = REPOSITORY / ".." / "shared" / "data"
DEMO = {"name": "demo", "max_length": 256, "num_shards": 2, "validation_fraction": 0.05}
# A teacher, by its folder or one in that of the results, and some of the text that it was trained on. What is held out
# of the text is chosen by content, so no teacher saw it.
TEACHERS: dict[str, dict[str, Any]] = {
    "stories260K": {
        "dataset": {
            "name": "json",
            "data_files": str(DATA / "text/tinystories/train.jsonl"),
            "max_samples": 700,
            "validation_fraction": 0.04,
            "max_length": 256,
            "num_shards": 1,
        },
        "teacher": {"model_path": str(DATA / "models/stories260K")},
    },
    "demo": {"dataset": DEMO | {"max_samples": 120}, "teacher": {"model_path": "demo_teacher"}},
}
CACHES: dict[str, dict[str, Any]] = {
    "top_k 64": {"method": "top_k", "top_k": 64},
    "top_p 0.001": {"method": "top_p", "min_probability": 0.001},
    "top_p 0.005": {"method": "top_p", "min_probability": 0.005},
    "sampled 0.01": {"method": "sampled", "head_probability": 0.01},
}


@dataclass(frozen=True)
class Way:
    """Settings of a student. width, layers: of its Llama. cache: one of CACHES, None for cross-entropy alone."""

    teacher: str
    width: int
    layers: int
    rate: float
    cache: str | None = None
    temperature: float = 1.0
    alpha: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Return its name as a run."""
        learns = f"{self.cache}-T{self.temperature:g}-a{self.alpha:g}" if self.cache else "text"
        name = f"{self.teacher}-{self.width}x{self.layers}-{learns}-lr{self.rate:g}-s{self.seed}"
        return name.replace(" ", "_")


@dataclass(frozen=True)
class Found:
    """What was measured of a student: held-out loss and KL(teacher || student), nats; bytes a position of its cache."""

    loss: float
    kl: float
    bytes: float
    parameters: int


def make_student(run: Run) -> Metrics:
    """Train and evaluate a student as the workflow does, unless that is done; return what was measured."""
    index, training = run.tokens.folder / "index.json", run.folder / "training.json"
    if not training.exists():
        train_run(
            training,
            build_job("run", run, run=run.name),
            index_path=index,
            signal_paths=run.signals,
            start_path=run.pruned.record if run.pruned else None,
        )
    if not run.metrics_path.exists():
        assert run.features, run
        evaluate_run(
            run.metrics_path,
            build_job("evaluation", run, run=run.name),
            index_path=index,
            training_path=training,
            features_paths=run.features,
            signal_paths=run.signals,
        )
    return Metrics.read(run.metrics_path)


class Experiment:
    """A results folder of the pipeline, in which every student is a run."""

    def __init__(self, folder: Path, *, steps: int) -> None:
        """`steps`: of every student."""
        self.folder, self.steps = folder.resolve(), steps
        self.shared = {
            "output": {"results_dir": str(self.folder / "results")},
            "evaluation": {"max_positions": 8192, "samples": {"num_samples": 0}},
        }

    def make_demo_teacher(self) -> None:
        """Let the workflow train the demo's teacher on the demo's whole corpus, as `make demo` does."""
        path = self.folder / TEACHERS["demo"]["teacher"]["model_path"]
        if path.exists():
            return
        config = self.shared | {
            "dataset": DEMO | {"max_samples": 450, "streaming_chunk_size": 200},
            "teacher": {"model_path": "demo"},
            "student": {"config": str(REPOSITORY / "config/students/llama_demo.json")},
        }
        self._run(self.write_command(config, "demo_teacher"))
        (teacher,) = build_project(load_runs(config)).teachers.values()
        path.symlink_to(teacher.model_path)

    def prepare(self, ways: Iterable[Way]) -> None:
        """Let the workflow make tokens, caches and the held-out scores that these students need."""
        self._run(self.write_command(self.describe(ways), "merge_h5"))

    def write_command(self, config: dict[str, Any], *rules: str) -> list[str]:
        """Write a config, and return the command that runs it up to some rules."""
        path = self.folder / f"{digest(config)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
        return [sys.executable, "-m", "retort", "run", str(path), "--cores", "2", "--until", *rules]

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, cwd=self.folder, check=True)

    def measure(self, way: Way, *, is_new: bool = True) -> Found | None:
        """Train and evaluate a student as the workflow does, unless that is done; None if not and not `is_new`."""
        run = build_project(load_runs(self.describe([way]))).runs[way.name]
        if not (is_new or run.metrics_path.exists()):
            return None
        found = make_student(run)
        assert found.training is not None and found.scores.student is not None, way
        means = found.scores.student.metrics
        return Found(
            loss=means["loss"].value,
            kl=means["kl_to_teacher"].value,
            bytes=found.cache.bytes_per_position if found.cache else 0.0,
            parameters=found.training.summary.student_parameters,
        )

    def describe(self, ways: Iterable[Way]) -> dict[str, Any]:
        """Return the pipeline's config of some students."""
        return self.shared | {"runs": {way.name: self._describe(way) for way in ways}}

    def _describe(self, way: Way) -> dict[str, Any]:
        """Return the sections of a student; a tenth of the steps warms up, then the default, a cosine."""
        student = self.folder / f"llama_{way.width}x{way.layers}.json"
        if not student.exists():
            write_json(student, describe_llama(way.width, way.layers))
        teacher = TEACHERS[way.teacher]
        path = self.folder / teacher["teacher"]["model_path"]
        return teacher | {
            "teacher": {"model_path": str(path)},
            "cache": CACHES[way.cache or "top_p 0.001"],
            "student": {"config": str(student)},
            "training": {
                "distillation_type": "hybrid" if way.cache else "output",
                "alpha": way.alpha,
                "temperature": way.temperature,
                "learning_rate": way.rate,
                "seed": way.seed,
                "max_steps": self.steps,
                "warmup_steps": self.steps // 10,
                "batch_size": 4,
                "dataloader_num_workers": 0,
            },
        }


def describe_llama(width: int, layers: int) -> dict[str, Any]:
    """Return the config of a Llama with heads of 16, the vocabulary of its teacher, and a tied head."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
