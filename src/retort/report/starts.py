"""What students started from, where one of them started as a part of a model."""

import pandas as pd

from retort.report.comparisons import Comparisons, read_config
from retort.report.runs import Results

_PART = "student.from_teacher."


def list_starts(found: Comparisons) -> pd.DataFrame:
    """Return the column `start` of each run in words; no column if no student started as a part of a model."""
    starts = {name: _describe(found.results, name) for name in found.runs.index}
    is_needed = any(start.startswith("part of") for start in starts.values())
    return pd.DataFrame({"start": starts} if is_needed else {}, index=found.runs.index)


def _describe(results: Results, name: str) -> str:
    metrics = results.metrics[name]
    settings = {key: value for key, value in read_config(metrics).items() if value is not None}
    path = settings.get("student.model_path")
    part = {k.removeprefix(_PART): v for k, v in settings.items() if k.startswith(_PART)}
    part.pop("calibration_samples", None)  # has a value in every config
    if part:
        sizes = ", ".join(f"{key} {value}" for key, value in part.items())
        return f"part of {path or metrics.teacher or 'the teacher'}: {sizes}"
    return str(path) if path else "random weights"
