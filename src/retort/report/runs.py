"""Results of runs as data frames: metrics.json, documents.csv and training_log.csv -> a row for each run.

The columns are those of summary.csv. A metric has three: `loss`, and the ends of its 95 % interval, `loss_low` and
`loss_high`; those of the teacher begin with `teacher_`. What is not defined is missing (NaN). Losses and KL are in nats
per token. A *group* is the runs that were evaluated on the same held-out positions: losses are compared only within it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from retort.evaluation.intervals import Estimate
from retort.evaluation.records import Metrics
from retort.evaluation.scores import DOCUMENTS_FILE, METRICS
from retort.models.samples import SAMPLES_FILE, Samples, read_samples

ENDS = ("", "_low", "_high")
_COUNTS = ("teacher_parameters", "cache_positions", "trained_parameters", "lora_rank")


@dataclass(frozen=True)
class Results:
    """All runs of a report: a row for each by name, their records, and what lies beside these, where it does.

    documents: sums over each held-out document. logs: `step` and `hard_loss`, the mean since the step before.
    watched: `step` and `eval_loss`, measured in the training.
    """

    runs: pd.DataFrame
    metrics: dict[str, Metrics]
    documents: dict[str, pd.DataFrame]
    logs: dict[str, pd.DataFrame]
    samples: dict[str, dict[str, Samples]]
    watched: dict[str, pd.DataFrame]


def load_results(paths: Sequence[Path]) -> Results:
    """Read the metrics.json of each run and what is beside it; runs of equal names get their id appended.

    Raises ValueError when there are no runs, a run is given twice, or a file is damaged or another run's.
    """
    found = [(path, Metrics.read(path)) for path in map(Path, paths)]
    if not found:
        raise ValueError("no runs to report on: give the metrics.json of at least one run.")
    counts = Counter(m.training.run for _, m in found)
    files: dict[str, Path] = {}
    metrics: dict[str, Metrics] = {}
    for path, m in found:
        run = m.training
        name = run.run if counts[run.run] == 1 else f"{run.run} {run.id[:6]}"
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
    paths_of_logs = {name: Path(f) / "training_log.csv" for name, f in runs.folder.items()}
    logs = {name: _read_log(path, "hard_loss") for name, path in paths_of_logs.items()}
    watched = {name: _read_log(path, "eval_loss") for name, path in paths_of_logs.items()}
    samples = {name: path.with_name(SAMPLES_FILE) for name, path in files.items()}
    return Results(
        runs,
        metrics,
        documents=_read_documents(runs, files),
        logs={name: log for name, log in logs.items() if len(log)},
        watched={name: log for name, log in watched.items() if len(log)},
        samples={
            name: read_samples(path, of=runs.id[name], whose="student") if path.exists() else {}
            for name, path in samples.items()
        },
    )


def _describe(path: Path, found: Metrics) -> dict[str, Any]:
    """Return a run's row of the table."""
    training, scores, cache, text = found.training, found.scores, found.cache, found.text
    of_teacher = scores.teacher.metrics if scores.teacher else {}
    is_top_k = cache and cache.top_k is not None
    keeps = cache and (f"k = {cache.top_k}" if is_top_k else f"p >= {cache.min_probability:g}")
    of_text = ("content", "tokens", "sequences", "leaked_sequences")
    return {
        "folder": str(find_folder(path)),
        **_pick(training, "id", "distillation_type", "alpha", "temperature", "seed"),
        **_pick(training.summary, "student_parameters", "trained_parameters"),
        "lora_rank": _find_rank(found),
        **_pick(training.summary, "steps", "trained_positions", "device"),
        "epochs": training.summary.trained_positions / text.train.positions if text else np.nan,
        **_pick(text and text.documents, "read", "used", prefix="rows_"),
        "training_seconds": training.summary.seconds,
        **_pick(found, "teacher", "teacher_parameters", *of_text),
        **_pick(scores.student, "positions", "documents"),
        **_spread({name: scores.student.metrics.get(name) for name in METRICS}),
        **_spread({f"teacher_{name}": of_teacher.get(name) for name in METRICS}),
        **_pick(cache, "method", "positions", "bytes_per_position", prefix="cache_"),
        # The column keeps its name for scripts that read summary.csv.
        "cache_dial": keeps,
        **_pick(cache and cache.fidelity, "tail_mass", prefix="cache_"),
        **_pick(cache and cache.fidelity, "kl", "agreement", prefix="cache_fidelity_"),
        **_join_caches(found),
    }


def _join_caches(found: Metrics) -> dict[str, Any]:
    """Return the columns of several caches as of one: the bytes of all, and the worst of each other number."""
    if not found.other_caches or found.cache is None:
        return {}
    caches = [found.cache, *found.other_caches]
    columns: dict[str, Any] = {
        "cache_bytes_per_position": sum(c.bytes_per_position for c in caches)
    }
    measured = [c.fidelity for c in caches if c.fidelity]
    if len(measured) == len(caches):
        columns["cache_tail_mass"] = max(f.tail_mass for f in measured)
        columns["cache_fidelity_kl"] = max(f.kl for f in measured)
        columns["cache_fidelity_agreement"] = min(f.agreement for f in measured)
    return columns


def _find_rank(found: Metrics) -> float:
    """Return the rank of a run's LoRA; missing where all weights were trained, or its run.json is."""
    training = found.trained.config.get("training") if found.trained else None
    lora = training.get("lora") if isinstance(training, dict) else None
    rank = lora.get("rank") if isinstance(lora, dict) else None
    return float(rank) if isinstance(rank, int) else np.nan


def _pick(record: Any, *names: str, prefix: str = "") -> dict[str, Any]:
    """Return values of a record, all missing if there is none."""
    return {f"{prefix}{name}": getattr(record, name, np.nan) for name in names}


def _spread(found: Mapping[str, Estimate | None]) -> dict[str, float]:
    """Return each estimate as its three columns, missing where it is not defined."""
    triples = {name: (e.value, e.low, e.high) if e else (None,) * 3 for name, e in found.items()}
    return {
        f"{name}{end}": np.nan if value is None else value
        for name, values in triples.items()
        for end, value in zip(ENDS, values, strict=True)
    }


def set_estimates(frame: pd.DataFrame, name: str, found: Mapping[str, Estimate | None]) -> None:
    """Set the three columns of a number by row; it is missing in the other rows."""
    rows = {row: _spread({name: estimate}) for row, estimate in found.items()}
    columns = [f"{name}{end}" for end in ENDS]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float)
    frame[columns] = table.reindex(frame.index)


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
    firsts: dict[int, tuple[Path, pd.DataFrame]] = {}
    for name, run in runs.iterrows():
        path = files[name].with_name(DOCUMENTS_FILE)
        if not path.exists():
            continue
        found[name] = table = read_documents(path)
        loss = table.loss.sum() / table.positions.sum()
        if not np.isclose(loss, run.loss, rtol=1e-6):
            raise ValueError(
                f"{path} gives a loss of {loss:.6f}, but metrics.json beside it has {run.loss:.6f}: one of them is "
                "another run's. Evaluate the run again."
            )
        first, other = firsts.setdefault(run.group, (path, table))
        if not table[["document", "positions"]].equals(other[["document", "positions"]]):
            raise ValueError(
                f"{path} and {first} have different documents, but their metrics.json name the same held-out text: "
                "evaluate both runs again."
            )
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


def _read_log(path: Path, name: str) -> pd.DataFrame:
    """Read `step` and a loss of a run's log; without rows where there is no file, or, in an older one, no such column.

    Raises ValueError when it is not as `train` writes it, or has a loss that is not finite.
    """
    columns = ["step", name]
    if not path.exists():
        return pd.DataFrame(columns=columns)
    try:
        # A step without the loss has an empty cell; "nan" stays a number, and is refused.
        log = pd.read_csv(path, dtype={"step": int}, keep_default_na=False)
        if name not in log and "hard_loss" in log:
            return pd.DataFrame(columns=columns)
        log = log[columns]
        log = log[log[name] != ""].astype({name: float})
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a training log of `train`: {error!r}. Train the run again."
        ) from None
    for _, row in log[~np.isfinite(log[name])].iterrows():
        raise ValueError(
            f"{path}: {name} is {row[name]} at step {row.step:.0f}, expected a finite number. The run diverged: "
            "lower training.learning_rate, and train it again."
        )
    return log


def label_teachers(runs: pd.DataFrame) -> pd.Series:
    """Return the label of the teacher of each run, or setting, that has one: "teacher", path or Hub id, unique.

    Teachers that differ only by rounding are one. Of several with one path (at two revisions, say), each is labelled by
    the first that has it too.
    """
    keys = ["group", "teacher", "teacher_parameters"]
    known = runs[runs.teacher.notna()].sort_values("teacher_loss", kind="stable")
    known["is_other"] = known.groupby(keys, dropna=False).teacher_loss.diff() > 1e-3
    known["step"] = known.groupby(keys, dropna=False).is_other.cumsum()
    known = known.loc[runs.index[runs.teacher.notna()]].assign(name=lambda frame: frame.index)
    first = known.groupby([*keys, "step"], dropna=False).name.transform("first")
    of_path = known.groupby(["group", "teacher"])[["teacher_parameters", "step"]]
    return (
        "teacher "
        + known.teacher
        + (" of " + first).where(of_path.transform("nunique").gt(1).any(axis=1), "")
    )


def find_teachers(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each teacher of a group, under the names of a student's columns; `teacher` is its own name.

    The index is its label, or "teacher" if there is only one; `of` is the first of `runs` that has it.
    """
    columns = {f"teacher_{name}{end}": f"{name}{end}" for name in METRICS for end in ENDS}
    columns |= {"teacher_parameters": "student_parameters", "teacher": "teacher"}
    labels = label_teachers(runs).drop_duplicates()
    found = runs.loc[labels.index, list(columns)].rename(columns=columns).assign(of=labels.index)
    return found.set_axis(list(labels) if len(labels) > 1 else ["teacher"] * len(labels))
