"""Results of runs as data frames: metrics.json, documents.csv and training_log.csv -> a row for each run.

The columns are those of summary.csv. A metric has three: `loss`, and the ends of its 95 % interval, `loss_low` and
`loss_high`; those of the teacher begin with `teacher_`. What is not defined is missing (NaN). Losses and KL are in nats
per token. A *group* is the runs that were evaluated on the same held-out positions: losses are compared only within it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from retort.evaluation.intervals import Estimate
from retort.evaluation.records import Metrics, Scorecard
from retort.evaluation.scores import DOCUMENTS_FILE, METRICS
from retort.models.samples import SAMPLES_FILE, Samples, read_samples

ENDS = ("", "_low", "_high")
_COUNTS = ("teacher_parameters", "cache_positions")


@dataclass(frozen=True)
class Results:
    """All runs of a report: a row for each by name, their records, and what lies beside these, where it does.

    documents: sums over each held-out document. logs: `step` and `hard_loss`, the mean since the step before.
    """

    runs: pd.DataFrame
    metrics: dict[str, Metrics]
    documents: dict[str, pd.DataFrame]
    logs: dict[str, pd.DataFrame]
    samples: dict[str, dict[str, Samples]]


def load_results(paths: Sequence[Path]) -> Results:
    """Read the metrics.json of each run and what is beside it; runs of equal names get their id appended.

    Raises ValueError when there are no runs, a run is given twice, or a file is damaged or another run's.
    """
    found = [(path, Metrics.read(path)) for path in map(Path, paths)]
    if not found:
        raise ValueError("no runs to report on: give the metrics.json of at least one run.")
    counts = Counter(metrics.training.run for _, metrics in found)
    metrics: dict[str, Metrics] = {}
    files: dict[str, Path] = {}
    for path, m in found:
        run, name = m.training.run, f"{m.training.run} {m.training.id[:6]}"
        name = name if counts[run] > 1 else run
        if name in files:
            raise ValueError(
                f"run {name!r} is given twice: {files[name]}, {path}. Give each run once."
            )
        metrics[name], files[name] = m, path
    rows = [_describe(files[name], m) for name, m in metrics.items()]
    runs = pd.DataFrame(rows, index=pd.Index(metrics, name="name"))
    runs = runs.astype(dict.fromkeys(_COUNTS, "Int64"))
    keys = ["positions", "documents", "content"]
    runs["group"] = runs.groupby(keys, sort=False, dropna=False).ngroup()
    logs = {
        name: _read_log(Path(folder) / "training_log.csv") for name, folder in runs.folder.items()
    }
    return Results(
        runs,
        metrics,
        documents=_read_documents(runs, files),
        logs={name: log for name, log in logs.items() if log is not None},
        samples={name: _read_samples(path, metrics[name]) for name, path in files.items()},
    )


def _describe(path: Path, found: Metrics) -> dict[str, Any]:
    """Return a run's row of the table."""
    training, scores, cache, text = found.training, found.scores, found.cache, found.text
    of_text = ("content", "tokens", "sequences", "leaked_sequences")
    return {
        "folder": str(find_folder(path)),
        **_pick(training, "id", "distillation_type", "alpha", "temperature", "seed"),
        **_pick(training.summary, "student_parameters", "steps", "trained_positions", "device"),
        "epochs": training.summary.trained_positions / text.train.positions if text else np.nan,
        **_pick(text and text.documents, "read", "used", prefix="rows_"),
        "training_seconds": training.summary.seconds,
        **_pick(found, "teacher", "teacher_parameters", *of_text),
        **_pick(scores.student, "positions", "documents"),
        **_metric_columns("", scores.student),
        **_metric_columns("teacher_", scores.teacher),
        **_pick(cache, "method", "positions", "bytes_per_position", prefix="cache_"),
        # The column keeps its name for scripts that read summary.csv.
        "cache_dial": _describe_setting(cache.top_k, cache.min_probability) if cache else None,
        **_pick(cache and cache.fidelity, "tail_mass", prefix="cache_"),
        **_pick(cache and cache.fidelity, "kl", "agreement", prefix="cache_fidelity_"),
    }


def _pick(record: Any, *names: str, prefix: str = "") -> dict[str, Any]:
    """Return values of a record, all missing if there is none."""
    return {f"{prefix}{name}": getattr(record, name, np.nan) for name in names}


def _metric_columns(whose: str, card: Scorecard | None) -> dict[str, float]:
    none = Estimate(np.nan, np.nan, np.nan)
    known = {name: card.metrics.get(name, none) if card else none for name in METRICS}
    return {
        f"{whose}{name}{end}": np.nan if value is None else value
        for name, e in known.items()
        for end, value in zip(ENDS, (e.value, e.low, e.high), strict=True)
    }


def _describe_setting(top_k: int | None, min_probability: float | None) -> str:
    return f"p >= {min_probability:g}" if top_k is None else f"k = {top_k}"


def find_folder(path: Path) -> Path:
    """Return the run's folder, with final/ and training_log.csv."""
    above = [p.parent for p in path.parents if p.name == "evaluation"]
    return above[0] if above else path.parent


def get_estimate(row: Any, name: str) -> Estimate | None:
    """Return a metric in a row of a table; None where it is not defined."""
    value, low, high = (row[f"{name}{end}"] for end in ENDS)
    if pd.isna(value):
        return None
    return Estimate(value, None, None) if pd.isna(low) else Estimate(value, low, high)


def _read_documents(runs: pd.DataFrame, files: dict[str, Path]) -> dict[str, pd.DataFrame]:
    """Read the documents.csv of each run that has one.

    Raises ValueError for one of another run, or of other documents than another run of its group.
    """
    found: dict[str, pd.DataFrame] = {}
    for names in runs.groupby("group").groups.values():
        first: tuple[Path, pd.DataFrame] | None = None
        for name in names:
            path = files[name].with_name(DOCUMENTS_FILE)
            if not path.exists():
                continue
            table = read_documents(path)
            loss = table.loss.sum() / table.positions.sum()
            if not np.isclose(loss, runs.loss[name], rtol=1e-6):
                raise ValueError(
                    f"{path} gives a loss of {loss:.6f}, but metrics.json beside it has {runs.loss[name]:.6f}: one of "
                    "them is another run's. Evaluate the run again."
                )
            first = first or (path, table)
            same = ["document", "positions"]
            if not table[same].equals(first[1][same]):
                raise ValueError(
                    f"{path} and {first[0]} have different documents, but their metrics.json name the same held-out "
                    "text: evaluate both runs again."
                )
            found[name] = table
    return found


def read_documents(path: Path) -> pd.DataFrame:
    """Return documents.csv. Raises ValueError when it is not such a file."""
    try:
        table = pd.read_csv(path, dtype=float)
        _ = table.loc[0, ["document", "positions", "loss"]]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not what `evaluate` writes ({error!r}): evaluate the run again."
        ) from None
    return table


def _read_log(path: Path) -> pd.DataFrame | None:
    """Read a run's learning curve; None when there is no file, or it has no rows.

    Raises ValueError when it is not as `train` writes it, or has a loss that is not finite.
    """
    if not path.exists():
        return None
    try:
        # A step without a hard loss has an empty cell; "nan" stays a number, and is refused.
        log = pd.read_csv(
            path, usecols=["step", "hard_loss"], dtype={"step": int}, keep_default_na=False
        )
        log = log[log.hard_loss != ""].astype({"hard_loss": float})
    except ValueError as error:
        raise ValueError(
            f"{path} is not a training log of `train`: {error!r}. Train the run again."
        ) from None
    diverged = log[~np.isfinite(log.hard_loss)]
    if len(diverged):
        raise ValueError(
            f"{path}: hard_loss is {diverged.hard_loss.iloc[0]} at step {diverged.step.iloc[0]}, expected a finite "
            "number. The run diverged: lower training.learning_rate, and train it again."
        )
    return log if len(log) else None


def _read_samples(path: Path, metrics: Metrics) -> dict[str, Samples]:
    """Read the samples of a run's student and teacher; an empty dictionary when there is no samples.json."""
    file = path.with_name(SAMPLES_FILE)
    return read_samples(file, of=metrics.training.id, whose="student") if file.exists() else {}


def label_teachers(runs: pd.DataFrame) -> pd.Series:
    """Return the label of the teacher of each run, or setting, that has one: "teacher", path or Hub id, unique.

    Teachers that differ only by rounding are one. Of several with one path (at two revisions, say), each is labelled by
    the first that has it too.
    """
    keys = ["group", "teacher", "teacher_parameters"]
    known = runs[runs.teacher.notna()].sort_values("teacher_loss", kind="stable")
    step = known.groupby(keys, dropna=False).teacher_loss.diff() > 1e-3
    known["step"] = step.groupby([known[key] for key in keys], dropna=False).cumsum()
    known = known.loc[[name for name in runs.index if name in known.index]]
    first = known.index.to_series().groupby([known[k] for k in (*keys, "step")], dropna=False)
    several = known.groupby(["group", "teacher"])[["teacher_parameters", "step"]].transform(
        "nunique"
    )
    suffix = (" of " + first.transform("first")).where(several.gt(1).any(axis=1), "")
    return "teacher " + known.teacher + suffix


def find_teachers(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each teacher of a group, under the names of a student's columns; `teacher` is its own name.

    The index is its label, or "teacher" if there is only one; `of` is the first of `runs` that has it.
    """
    columns = {f"teacher_{name}{end}": f"{name}{end}" for name in METRICS for end in ENDS}
    columns |= {"teacher_parameters": "student_parameters", "teacher": "teacher"}
    labels = label_teachers(runs).drop_duplicates()
    found = runs.loc[labels.index, list(columns)].rename(columns=columns).assign(of=labels.index)
    return found.set_axis(list(labels) if len(labels) > 1 else ["teacher"] * len(labels), axis=0)
