"""Sentences on the settings: the outcome, ties, and warnings about the numbers."""

import itertools

import pandas as pd

from retort.evaluation.formatting import format_signed
from retort.evaluation.intervals import FEW_DOCUMENTS, Estimate
from retort.evaluation.records import TextCounts
from retort.report import comparisons
from retort.report.comparisons import Comparisons, is_clear, is_gain
from retort.report.runs import find_teachers, get_estimate
from retort.report.templates import list_names, render_sentences
from retort.tokens.index import describe_sources

FEW_POSITIONS = 1000
_LIMITS = {
    "few_positions": FEW_POSITIONS,
    "few_documents": FEW_DOCUMENTS,
    "high_skipped": 0.05,  # of the corpus's rows
    "high_tail_mass": 0.2,
    "high_fidelity_kl": 0.05,  # nats
}
_MAX_NEEDS = 3  # sentences on runs without a margin, of which a sweep may have a hundred


def describe_outcome(found: Comparisons, group: pd.DataFrame) -> str:
    """Return the main result of one group of settings: whether distillation helped, and by how much.

    The margin is that of the setting with the lowest loss, not the largest one: the baseline of that may be a bad one.
    """
    compared = group[group.margin.notna()]
    best = (group if compared.empty else compared).iloc[0]
    margin = get_estimate(best, "margin")
    others: dict[bool, list[str]] = {True: [], False: []}
    for name, row in compared.iloc[1:].iterrows():
        if other := get_estimate(row, "margin"):
            theirs = "it" if row.baseline == best.baseline else row.baseline
            others[is_gain(other)].append(f"{name} is {_distance(other, row.basis)} {theirs}")
    (outcome,) = render_sentences(
        "outcome.txt.j2",
        best=best,
        ties=find_ties(found, group, best.name),
        few_positions=FEW_POSITIONS,
        is_distilled=(group.distillation_type != "output").any(),
        teacher=find_teachers(group).loss.min(),
        margin=margin,
        is_gain=is_gain(margin),
        is_clear=margin and is_clear(margin),
        distance=margin and _distance(margin, best.basis),
        # The baselines of its own seeds, of which the baseline's setting may have more.
        baseline_loss=found.runs.loss[found.runs.baseline[found.runs.setting == best.name]].mean()
        if margin
        else None,
        better=others[True],
        worse=others[False],
    )
    return outcome


def find_ties(found: Comparisons, group: pd.DataFrame, name: str) -> list[str]:
    """Return the settings of a group whose loss is not clearly different from that of `name`.

    Without those between which there is a margin, which says so.
    """
    has_margin = (group.index == group.baseline[name]) | (group.baseline == name)
    others = group.index[~has_margin & (group.index != name)]
    return [other for other in others if not is_clear(found.differ(other, name)[0])]


def describe_next_best(found: Comparisons, group: pd.DataFrame) -> str | None:
    """Return how the best setting compares with the next best, or with all that it is tied with.

    None without one, or if the outcome says so already.
    """
    if len(group) < 2 or group.positions.iloc[0] < FEW_POSITIONS:
        return None
    best, second = group.index[:2]
    if ties := find_ties(found, group, best):
        differences = [found.differ(name, best) for name in ties]
        tied = list_names([f"{n} ({_signed(*d)})" for n, d in zip(ties, differences, strict=True)])
        these = "this difference" if len(ties) == 1 else "these differences"
        text = f"{best} is tied with {tied}: {these} may be chance."
        return " ".join(
            [text, *(describe_other_student(found, best, name) for name in ties)]
        ).strip()
    if group.baseline[best] == second or group.baseline[second] == best:
        return None
    distance = _distance(*found.differ(best, second))
    text = f"{best} is {distance} the next best, {second} ({group.loss[second]:.3f})."
    return f"{text} {describe_other_student(found, best, second)}".strip()


def describe_other_student(found: Comparisons, one: str, other: str) -> str:
    """Return how the student of a setting is not the same before training as another's, "" if it is."""
    mine, theirs = (
        found.conditions.loc[found.runs.index[found.runs.setting == setting][0]]
        for setting in (one, other)
    )
    if mine[comparisons.SIZE] != theirs[comparisons.SIZE]:
        sizes = " and ".join(f"{int(x[comparisons.SIZE]):,}" for x in (mine, theirs))
        return f"{one} and {other} are students of different sizes ({sizes} parameters)."
    keys = [k for k in mine.index if k == comparisons.STUDENT or k.startswith("student.")]
    if (mine[keys] != theirs[keys]).any():
        return f"{one} and {other} did not start from the same weights or shape."
    return ""


def _signed(difference: Estimate, basis: str) -> str:
    low_high = " to ".join(map(format_signed, difference.ends or ()))
    return format_signed(difference.value) + (low_high and f"; 95 % over {basis}: {low_high}")


def _distance(margin: Estimate, basis: str) -> str:
    if margin.ends and not is_clear(margin):
        return f"not clearly different ({_signed(margin, basis)}) from"
    if round(margin.value, 3) == 0:
        return "not different (to 0.001) from"
    low_high = " to ".join(f"{end:.3f}" for end in sorted(map(abs, margin.ends or ())))
    interval = low_high and f" (95 % over {basis}: {low_high})"
    return f"{abs(margin.value):.3f}{interval} {'above' if margin.value > 0 else 'below'}"


# Warnings ------------------------------------------------------------------------------------------


def find_warnings(found: Comparisons) -> list[str]:
    """Return what a reader must know before trusting the numbers, one or two sentences each."""
    runs, results = found.runs, found.results
    worse = runs[runs.teacher_loss > runs.loss]
    is_lacking = (runs.distillation_type != "output") & runs.baseline.isna()
    lacking = runs.index[is_lacking].to_series()
    needs = list(lacking.groupby(lacking.map(lambda n: _describe_need(found, n)), sort=False))
    return render_sentences(
        "warnings.txt.j2",
        groups=list(runs.drop_duplicates("group").itertuples()),
        worse=[f"{n} ({r.loss:.3f}; teacher {r.teacher_loss:.3f})" for n, r in worse.iterrows()],
        texts=find_texts(found),
        caches=find_caches(runs).iterrows(),
        needs=needs[:_MAX_NEEDS],
        needless=[name for _, names in needs[_MAX_NEEDS:] for name in names],
        single=list(found.settings.index[found.settings.seeds == 1]),
        has_seeds=bool((found.settings.seeds > 1).any()),
        falling=runs[runs.last_change_high < 0],
        without_documents=[name for name in runs.index if name not in results.documents],
        without_logs=[name for name in runs.index if name not in results.logs],
        **_LIMITS,
    )


def find_texts(found: Comparisons) -> list[tuple[str, TextCounts, pd.Series]]:
    """Return for each training text the names of its settings, its counts, and how many epochs its runs saw."""
    texts = []
    for _, runs in found.runs[found.runs.rows_read.notna()].groupby("tokens", sort=False):
        text = found.results.metrics[runs.index[0]].text
        assert text is not None
        texts.append((list_names(list(runs.setting.unique())), text, runs.epochs))
    return texts


def describe_texts(found: Comparisons) -> list[str]:
    """Return a sentence for each training text: rows read, used and skipped by reason, and epochs; and its sources."""
    texts = find_texts(found)
    sources = [describe_sources(text.documents, text.train) for _, text, _ in texts]
    return [*render_sentences("texts.txt.j2", texts=texts), *itertools.chain(*sources)]


def find_caches(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of each cache once; the index names the settings that learned from it."""
    users = runs[runs.cache_method.notna() & (runs.distillation_type != "output")]
    keys = [column for column in runs if str(column).startswith("cache_")]
    groups = users.groupby(keys, sort=False, dropna=False).setting.unique()
    return users.drop_duplicates(keys)[keys].set_axis(map(list_names, groups), axis=0)


def _describe_need(found: Comparisons, name: str) -> str:
    """Return which cross-entropy run is missing, by the differences from the nearest one."""
    lacks = "no matching cross-entropy run; add one with"
    plain = found.conditions[found.runs.distillation_type == "output"]
    if plain.empty:
        return f"{lacks} training.distillation_type: output."
    mine = found.conditions.loc[name]
    differs = plain.ne(mine)
    order = differs.assign(number=differs.sum(axis=1), id=found.runs.id)
    nearest = order.sort_values([comparisons.HELD_OUT, "number", "id"]).index[0]
    keys, theirs = list(plain.columns[differs.loc[nearest]]), plain.loc[nearest]
    if comparisons.UNKNOWN in keys:
        return (
            f"not all settings of these runs and of {nearest} are recorded, because a run.json was missing. Evaluate "
            "them again, with run.json beside training.json."
        )
    same = [f"the same {key}" for key in keys if key in (comparisons.HELD_OUT, comparisons.TEXT)]
    hidden = {comparisons.HELD_OUT, comparisons.TEXT}
    if any(key.startswith("student.") for key in keys):
        hidden |= {comparisons.SIZE, comparisons.STUDENT}
    elif comparisons.STUDENT in keys:
        same, hidden = [*same, "the same student"], hidden | {comparisons.SIZE, comparisons.STUDENT}
    values = [f"{k}: {mine[k]} ({nearest}: {theirs[k]})" for k in keys if k not in hidden]
    return f"{lacks} {list_names([*same, *values], most=8)}."
