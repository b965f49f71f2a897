"""Which runs can be compared, and their differences with 95 % intervals.

The *conditions* of a run are what its result depends on besides the way of learning: the training text, the held-out
text, the student (its size and a digest of its config or weights), and all settings of `student` and `training` but
those of the loss. The *baseline* of a distilled run is the cross-entropy run (`output`) of equal conditions; its
*margin* is its held-out loss minus the baseline's. The *gap* is what training on the teacher's full distributions
(FullKD: `logit` from a live teacher, or from a cache that keeps every token) gains over cross-entropy; a run closes a
share of it. Its *distance* to the teacher is what its baseline's held-out loss is above the teacher's.

A *setting* is the runs that differ only in their seed. Teachers are the same if their weights, revision, dtype and
attention implementation are. Intervals of a single run resample the held-out documents, of all runs together
(`intervals`); those of a mean over several seeds are Student's (`seeds`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from retort.config.schema import flatten
from retort.config.section import changes_id
from retort.config.sections import key_paths, section_at
from retort.evaluation.intervals import DocumentSums, Estimate, percentile_interval
from retort.evaluation.records import Metrics
from retort.evaluation.scores import MAX_LOSS, METRICS
from retort.report.runs import ENDS, Results, get_estimate, set_estimates
from retort.report.seeds import compare_means, compute_share, find_last_change, student_quantile

SEED, SIZE, HELD_OUT, TEXT = "training.seed", "student parameters", "held-out text", "training text"
UNKNOWN, STUDENT, WEIGHTS = "settings", "student content", "teacher weights"
# The teacher of a run: `training.teacher`, and how its run.json says that it was loaded.
_TEACHER = (WEIGHTS, "teacher.revision", "teacher.dtype", "teacher.attn_implementation")
_TEMPERATURES = ("training.temperature", "training.temperature_end")
_LEARNING = (
    *("distillation_type", "alpha", "temperature", "divergence", "use_cached_logits"),
    *("alpha_end", "temperature_end", "skew", "position_weights", "metric_for_best_model"),
)
# Settings that change a run's id but are no condition: the way of learning, what changes only the rounding, and what
# sets the number of steps, which is compared itself.
_NO_CONDITION = [
    f"training.{key}"
    for key in ("cpu_threads", "use_gradient_checkpointing", "max_steps", "num_epochs")
]
_OF = "teacher of "  # in the names of sums
_LOSS_METRICS = ("loss", "perplexity", "bits_per_byte")  # monotone in each other on the same text
_COSTS = ("training_seconds", "cache_bytes_per_position")


@dataclass(frozen=True)
class Comparisons:
    """Runs with their baselines and margins, and settings in the order of their mean held-out loss.

    runs: those of `Results` with `setting`, `baseline`, `full`, `margin`, `last_change` (see `seeds`), and the shares
    `gap_closed` and `distance_closed`. settings: means under the names of the runs' columns, `seeds`, their number,
    and `basis`: whether their intervals are over "seeds" or "documents". conditions, learning: of each run, as texts,
    by key of the config.
    """

    results: Results
    runs: pd.DataFrame
    settings: pd.DataFrame
    conditions: pd.DataFrame
    learning: pd.DataFrame
    sums: dict[int, DocumentSums]  # of each group's runs that have documents.csv

    def values_of(self, setting: str, metric: str) -> pd.Series:
        """Return a metric of each run of a setting, by seed."""
        is_one = self.runs.setting == setting
        return self.runs[metric][is_one].set_axis(self.runs.seed[is_one])

    def differ(self, one: str, other: str, metric: str = "loss") -> tuple[Estimate, str]:
        """Return a setting's mean minus another's, and what its interval is over: "seeds", "documents" or ""."""
        mine, theirs = self.values_of(one, metric), self.values_of(other, metric)
        names = [self.runs.index[self.runs.setting == setting][0] for setting in (one, other)]
        basis = "seeds" if max(len(mine), len(theirs)) > 1 else "documents"
        if basis == "documents" and metric in _LOSS_METRICS:
            found = _differ(self.runs, self.sums, *names)
        else:
            found = compare_means(mine, theirs)
        return found, basis if found.ends else ""


def compare_runs(results: Results) -> Comparisons:
    """Find the baselines, margins and settings of all runs; the order of the runs changes none of them."""
    runs = results.runs.copy()
    tables = {
        group: {name: results.documents[name] for name in names if name in results.documents}
        for group, names in runs.groupby("group").groups.items()
    }
    sums = {group: sum_documents(known) for group, known in tables.items() if known}
    described = [_describe(run, results.metrics[name]) for name, run in runs.iterrows()]
    conditions, learning = (
        pd.DataFrame(rows, index=runs.index, dtype=object).map(_show)
        for rows in zip(*described, strict=True)
    )
    key, is_distilled = _join(conditions), runs.distillation_type != "output"
    alike = _join(conditions, learning[["teacher", *_TEACHER, *_TEMPERATURES]])
    runs["baseline"] = _match(runs, key, ~is_distilled).where(is_distilled)
    runs["full"] = _match(runs, alike, _is_full(runs, learning))
    runs.loc[~is_distilled | (runs.full == runs.index), "full"] = np.nan
    runs["setting"] = _name_settings(runs, _join(conditions.drop(columns=SEED), learning))
    ends = {name: find_last_change(log) for name, log in results.logs.items()}
    set_estimates(runs, "last_change", ends)
    pairs = list(runs.baseline.dropna().items())
    set_estimates(runs, "margin", {n: _differ(runs, sums, n, b) for n, b in pairs})
    for share, targets in {"gap_closed": runs.full, "distance_closed": _OF + runs.index}.items():
        target = pd.Series(targets, runs.index)
        shares = {n: _find_share(sums.get(runs.group[n]), n, b, target[n]) for n, b in pairs}
        set_estimates(runs, share, shares)
    return Comparisons(results, runs, _average_settings(runs), conditions, learning, sums)


@cache
def _defaults() -> dict[str, Any]:
    """Return the settings of student and training that change a result: dotted key -> default."""
    found = {}
    for path in key_paths():
        section = section_at(path[:-1])
        if path[0] in ("student", "training") and section and changes_id(section, path[-1]):
            default = section.model_fields[path[-1]].default
            found[".".join(path)] = list(default) if isinstance(default, tuple) else default
    return found


def _show(value: Any) -> str:
    """Return a setting as a config has it; equal numbers are equal texts, and what a run does not have is a dash."""
    if isinstance(value, float):
        value = "-" if np.isnan(value) else int(value) if value.is_integer() else value
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_config(metrics: Metrics) -> dict[str, Any]:
    """Return the settings that a run was trained with, by dotted key; an empty dictionary without run.json."""
    return dict(flatten(metrics.trained.config)) if metrics.trained else {}


def _describe(run: pd.Series, metrics: Metrics) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's conditions, and how it learns: the loss, the teacher and the parameters of its cache.

    A setting that run.json does not have is at its default. Without run.json, the conditions equal no other run's.
    """
    known, cached, training = read_config(metrics), metrics.cache, metrics.training
    settings = _defaults() | {key: known[key] for key in _defaults() if key in known}
    of_loss = {key: settings.pop(f"training.{key}") for key in _LEARNING}
    conditions = {
        HELD_OUT: f"{metrics.content} {run.positions} {run.documents}",
        TEXT: metrics.tokens,
        SIZE: run.student_parameters,
        STUDENT: training.student,
        **{key: value for key, value in settings.items() if key not in _NO_CONDITION},
        SEED: training.seed,
        "training.max_steps": run.steps,
        UNKNOWN: "known" if known else f"those of {run.id} are not",
    }
    of_loss |= {key: getattr(training, key) for key in _LEARNING[:3]}
    learning = {f"training.{key}": value for key, value in of_loss.items()}
    learning |= {"teacher": metrics.teacher} | {key: known.get(key) for key in _TEACHER}
    learning |= {WEIGHTS: training.teacher}
    for key in ("method", "top_k", "min_probability"):
        learning[f"cache.{key}"] = getattr(cached, key, None)
    if training.distillation_type == "output":
        learning = dict.fromkeys(learning, "-") | {"training.distillation_type": "output"}
    return conditions, {k: "-" if v is None else v for k, v in learning.items()}


def _join(*frames: pd.DataFrame) -> pd.Series:
    """Return all cells of each row as one text."""
    return pd.concat(frames, axis=1).agg("\n".join, axis=1)


def _match(runs: pd.DataFrame, key: pd.Series, is_candidate: pd.Series) -> pd.Series:
    """Return for each run the name of the candidate with the same key; of several, the one with the smallest id."""
    names = runs[is_candidate].sort_values("id").index
    found = pd.Series(names, index=key[names], dtype=object)
    return key.map(found[~found.index.duplicated()])


def _is_full(runs: pd.DataFrame, learning: pd.DataFrame) -> pd.Series:
    """Return whether each run learns only from the teacher's full distributions, by KL(teacher || student)."""
    is_whole = runs.cache_method.isna() | (
        (runs.cache_method == "top_k") & (runs.cache_tail_mass < 1e-9)
    )
    is_forward = learning["training.divergence"] == "forward_kl"
    is_even = learning["training.position_weights"] == "-"
    return (runs.distillation_type == "logit") & is_whole & is_forward & is_even


def _name_settings(runs: pd.DataFrame, key: pd.Series) -> pd.Series:
    """Return the setting of each run; a repeated seed begins another setting.

    A setting of one run has its name; one of several their names without a sweep's `-seed_3`, or, where these still
    differ or are taken, the first and the last name.
    """
    repeat = runs.groupby([key, "seed"]).cumcount()
    groups = runs.sort_values("seed", kind="stable").groupby([key, repeat], sort=False).groups
    found: dict[str, str] = {}
    for names in groups.values():
        bare = {re.sub(r"-(training\.)?seed_\d+(?=-|$)", "", name) for name in names}
        name = bare.pop() if len(bare) == 1 and len(names) > 1 else ""
        if not name or name in found.values() or name in runs.index:
            name = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        found |= dict.fromkeys(names, name)
    return pd.Series(found)[runs.index]


def sum_documents(tables: Mapping[str, pd.DataFrame]) -> DocumentSums:
    """Return the sums of runs on the same documents, by name, so that they are resampled together."""
    first = next(iter(tables.values()))
    sums = DocumentSums(np.arange(len(first)))
    sums.add("positions", first.positions.to_numpy())
    for name, table in tables.items():
        sums.add(f"loss of {name}", table.loss.to_numpy())
        if "teacher_loss" in table:
            sums.add(f"loss of {_OF}{name}", table.teacher_loss.to_numpy())
    return sums


def find_gain(sums: DocumentSums | None, one: str, other: str) -> tuple[float, Any] | None:
    """Return by how much the loss of one run is below another's, in nats/token, and the same in each resample [R].

    None without documents.csv of both.
    """
    mine, theirs = f"loss of {one}", f"loss of {other}"
    if not (sums and sums.has(mine) and sums.has(theirs)):
        return None
    gain = (sums.total(theirs) - sums.total(mine)) / sums.total("positions")
    if len(sums.documents) < 2:
        return gain, np.array([])
    resampled = sums.resampled(theirs) - sums.resampled(mine)
    return gain, resampled / sums.resampled("positions")


def _differ(runs: pd.DataFrame, sums: dict[int, DocumentSums], one: str, other: str) -> Estimate:
    """Return the loss of one run minus another's on the same documents; no interval without documents.csv of both."""
    if not (found := find_gain(sums.get(runs.group[one]), one, other)):
        return Estimate(float(runs.loss[one] - runs.loss[other]), None, None)
    return percentile_interval(-found[0], -found[1])


def _find_share(sums: DocumentSums | None, run: str, baseline: str, target: str) -> Estimate | None:
    """Return the share of the way from a baseline's loss to a target's that a run covers.

    None unless both its gain and the gain of the target are clearly positive.
    """
    found = [find_gain(sums, one, baseline) for one in (run, target)]
    if not (found[0] and found[1]) or len(found[0][1]) == 0:
        return None
    (gain, gain_R), (gap, gap_R) = found[0], found[1]
    if min(np.quantile(gain_R, 0.025), np.quantile(gap_R, 0.025)) <= 0:
        return None
    return percentile_interval(gain / gap, gain_R / gap_R)


def _average_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting: means over its seeds, and of a single seed its run's numbers."""
    settings, by_setting = (
        runs.drop_duplicates("setting").set_index("setting"),
        runs.groupby("setting"),
    )
    settings["seeds"] = by_setting.size()
    settings["baseline"] = settings.baseline.map(runs.setting)
    settings["basis"] = np.where(settings.seeds > 1, "seeds", "documents")
    several = settings.index[settings.seeds > 1]
    values = by_setting[[*METRICS, "margin", *_COSTS]]
    # A metric that one of the runs lacks has no mean.
    means = values.mean().where(values.count().eq(settings.seeds, axis=0)).loc[several]
    quantiles = settings.seeds[several].map(lambda seeds: student_quantile(seeds - 1))
    halves = values.sem().loc[several].mul(quantiles, axis=0)
    for end, table in zip(ENDS, (means, means - halves, means + halves), strict=True):
        table = table.assign(perplexity=np.exp(table.loss.clip(upper=MAX_LOSS))).add_suffix(end)
        table = table.drop(columns=table.columns.difference(settings.columns))  # costs have no ends
        settings.loc[several, table.columns] = table
    for share in ("gap_closed", "distance_closed"):
        found = {name: get_estimate(row, share) for name, row in settings.iterrows()}
        for name in several:
            found[name] = _share_over_seeds(runs, by_setting.get_group(name), share)
        set_estimates(settings, share, found)
    return settings.sort_values(["group", "loss"], kind="stable")


def _share_over_seeds(runs: pd.DataFrame, members: pd.DataFrame, share: str) -> Estimate | None:
    targets = members.teacher_loss if share == "distance_closed" else members.full.map(runs.loss)
    gaps = members.baseline.map(runs.loss) - targets
    is_known = members.margin.notna().all() and gaps.notna().all()
    return compute_share(-members.margin, gaps) if is_known else None


# Sweeps --------------------------------------------------------------------------------------------


def find_sweeps(found: Comparisons, group: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the keys that differ alone between settings of a group, and those settings with `x`, the key's value, and
    `line`, what distinguishes them from the other lines."""
    texts = (
        pd.concat([found.conditions, found.learning], axis=1).groupby(found.runs.setting).first()
    )
    texts = texts.drop(columns=[SEED, HELD_OUT, TEXT, UNKNOWN]).loc[group.index]
    sweeps = []
    differing = texts.columns[texts.nunique() > 1]
    # A digest may look like a number.
    for key in differing.drop(["teacher", STUDENT, WEIGHTS], errors="ignore"):
        # The size of a student is a number, the config that it follows from is none.
        follows = [c for c in texts if c == key or (key == SIZE and c.startswith("student"))]
        rest = texts.drop(columns=follows)
        x = pd.to_numeric(texts[key], errors="coerce")
        points = group.assign(x=x, line=rest.agg("\n".join, axis=1))[x.notna()]
        points = points[points.groupby("line").x.transform("nunique") > 1].sort_values("x")
        if len(points):
            sweeps.append((key, points.assign(line=_name_lines(rest.loc[points.index]))))
    return sweeps


def _name_lines(rest: pd.DataFrame) -> pd.Series:
    """Return for each setting what differs between the lines, as "hybrid, temperature 2"."""
    names = rest["training.distillation_type"]
    plain = rest.drop(columns=[STUDENT, WEIGHTS], errors="ignore")
    if len(plain.drop_duplicates()) == len(rest.drop_duplicates()):
        rest = plain  # digests tell nothing more
    used = rest.drop(columns="training.distillation_type").mask(lambda texts: texts == "-")
    for key in used.columns[used.nunique() > 1]:
        label = f", {key.rpartition('.')[2]} {{}}".format
        names += used[key].map(label, na_action="ignore").fillna("")
    return names


# Judgements ----------------------------------------------------------------------------------------


def is_clear(difference: Estimate) -> bool:
    """Whether a difference is clear: its interval excludes zero; without one, it is not zero to three digits."""
    if difference.ends is None:
        return round(difference.value, 3) != 0
    return difference.ends[0] > 0 or difference.ends[1] < 0


def is_gain(margin: Estimate | None) -> bool:
    """Whether there is a margin that is clearly negative, that is, better."""
    return margin is not None and is_clear(margin) and margin.value < 0


def find_best(comparisons: Comparisons, group: pd.DataFrame, metric: str) -> str | None:
    """Return the setting of a group that is clearly best in a metric; None if there is none.

    It is clearly better where its difference from another excludes zero; or, where that is not known, their intervals
    do not overlap.
    """
    sign = 1 if METRICS[metric].is_less_better else -1

    def is_better(one: str, other: str) -> bool:
        found, _ = comparisons.differ(one, other, metric)
        if found.ends:
            return max(sign * end for end in found.ends) < 0
        rows = [comparisons.settings.loc[name] for name in (one, other)]
        if max(row.seeds for row in rows) > 1:
            return False
        mine, theirs = ([sign * row[f"{metric}{end}"] for end in ENDS[1:]] for row in rows)
        return bool(max(mine) < min(theirs))  # False without an interval

    ranked = list((sign * group[metric].dropna()).sort_values(kind="stable").index)
    is_best = len(ranked) > 1 and all(is_better(ranked[0], other) for other in ranked[1:])
    return ranked[0] if is_best else None
