"""The finished student that a person names by a folder."""

from pathlib import Path
from typing import NamedTuple

from retort.evaluation.inputs import read_trained_student
from retort.evaluation.records import Metrics
from retort.training.record import TrainingRecord


class Student(NamedTuple):
    """A finished student: final/, its record, and its newest metrics (None before `evaluate`)."""

    folder: Path
    record: TrainingRecord
    metrics: Metrics | None


def find_student(path: Path) -> Student:
    """Return the student of a run's folder, of its final/ or of its training.json.

    Raises ValueError when there is none, the run is not finished, or final/ is not what was written.
    """
    run = path.parent if path.name in ("final", "training.json") else path
    if not path.exists():
        raise ValueError(f"{path} does not exist (looked in {Path.cwd()}).")
    if not (run / "training.json").exists():
        hint = (
            "Its training has not ended: rerun the workflow"
            if _has_begun(run)
            else "Give results/runs/<run>/<id>"
        )
        raise ValueError(
            f"{path} is not a finished student: there is no {run / 'training.json'}. {hint}."
        )
    folder, record = read_trained_student(run / "training.json")
    found = sorted(run.glob("evaluation/*/metrics.json"), key=lambda file: file.stat().st_mtime)
    return Student(folder, record, Metrics.read(found[-1]) if found else None)


def _has_begun(run: Path) -> bool:
    return (
        (run / "final").exists() or any(run.glob("checkpoint-*")) or (run / "config.json").exists()
    )
