"""Sentences on the settings: the outcome, ties, and warnings about the numbers."""

from collections.abc import Sequence

import pandas as pd

from retort.evaluation.formatting import format_signed
from retort.evaluation.intervals import FEW_DOCUMENTS, Estimate
from retort.evaluation.records import TextCounts
from retort.report.comparisons import (
    HELD_OUT,
    SIZE,
    STUDENT,
    TEXT,
    UNKNOWN,
    Comparisons,
    is_clear,
    is_gain,
)
from retort.report.runs import find_teachers, get_estimate
from retort.report.templates import list_names, render
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
    """Return the main result of one group of settings: whether distillation helped, and by how much."""
    losses = find_teachers(group).loss.dropna()
    teacher = f"; teacher {losses.min():.3f}" if len(losses) else ""
    compared = group[group.margin.notna()]
    best = group.iloc[0]
    if len(compared) and best.positions < FEW_POSITIONS:
        return (
            f"{best.positions:,} held-out positions are too few to tell whether distillation helped "
            f"(at least {FEW_POSITIONS:,} are needed){teacher}."
        )
    if compared.empty:
        is_distilled = (group.distillation_type != "output").any()
        lacks = "matching cross-entropy" if is_distilled else "distilled"
        name = _name(best, find_ties(found, group, best.name))
        return f"{name}: held-out loss {best.loss:.3f} nats/token, no {lacks} run to compare with{teacher}."
    return _describe_margins(found, group, compared, teacher)


def _describe_margins(
    found: Comparisons, group: pd.DataFrame, compared: pd.DataFrame, teacher: str
) -> str:
    """Return the margin of the setting with the lowest loss, and the other settings whose result is the opposite."""
    # Not of the one with the largest margin: its baseline may be a bad one.
    first = compared.iloc[0]
    others: dict[bool, list[str]] = {True: [], False: []}
    for name, row in compared.iloc[1:].iterrows():
        margin = get_estimate(row, "margin")
        assert margin is not None
        theirs = "it" if row.baseline == first.baseline else row.baseline
        others[is_gain(margin)].append(f"{name} is {_distance(margin, row.basis)} {theirs}")
    margin = get_estimate(first, "margin")
    assert margin is not None
    name = _name(first, find_ties(found, group, first.name))
    # The baselines of its own seeds, of which the baseline's setting may have more.
    loss = found.runs.loss[found.runs.baseline[found.runs.setting == first.name]].mean()
    against = f"cross-entropy ({first.baseline}, {loss:.3f})"
    distance = f"{_distance(margin, first.basis)} {against}{teacher}."
    if is_gain(margin):
        worse = f" Not every distilled run improved: {list_names(others[False])}."
        return f"{name}: held-out loss {first.loss:.3f}, {distance}" + (
            worse if others[False] else ""
        )
    beat = "beat" if is_clear(margin) else "clearly beat"
    lost = (
        "Not every distilled run improved"
        if others[True]
        else f"Distillation did not {beat} cross-entropy"
    )
    outcome = f"{lost}: of the distilled runs, {name} has the lowest held-out loss, {first.loss:.3f}, {distance}"
    return outcome + (f" But {list_names(others[True])}." if others[True] else "")


def _name(setting: pd.Series, ties: Sequence[str] = ()) -> str:
    seeds = "one seed" if setting.seeds == 1 else f"mean of {setting.seeds} seeds"
    tied = f"; tied with {ties[0] if len(ties) == 1 else f'{len(ties)} others'}" if ties else ""
    return f"{setting.name} ({seeds}{tied})"


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
        tied = list_names([_describe_tie(found, name, best) for name in ties])
        these = "this difference" if len(ties) == 1 else "these differences"
        return f"{best} is tied with {tied}: {these} may be chance."
    if group.baseline[best] == second or group.baseline[second] == best:
        return None
    margin, basis = found.differ(best, second)
    return (
        f"{best} is {_distance(margin, basis)} the next best, {second} ({group.loss[second]:.3f})."
    )


def _describe_tie(found: Comparisons, name: str, best: str) -> str:
    difference, basis = found.differ(name, best)
    return f"{name} ({format_signed(difference.value)}{_interval(difference, basis, '; ')})"


def _interval(found: Estimate, basis: str, before: str) -> str:
    if not found.ends:
        return ""
    low, high = map(format_signed, found.ends)
    return f"{before}95 % over {basis}: {low} to {high}"


def _distance(margin: Estimate, basis: str) -> str:
    if margin.ends and not is_clear(margin):
        return f"not clearly different ({format_signed(margin.value)}{_interval(margin, basis, '; ')}) from"
    if round(margin.value, 3) == 0:
        return "not different (to 0.001) from"
    interval = ""
    if margin.ends:
        low, high = sorted(abs(end) for end in margin.ends)
        interval = f" (95 % over {basis}: {low:.3f} to {high:.3f})"
    return f"{abs(margin.value):.3f}{interval} {'above' if margin.value > 0 else 'below'}"


# Warnings ------------------------------------------------------------------------------------------


def find_warnings(found: Comparisons) -> list[str]:
    """Return what a reader must know before trusting the numbers, one or two sentences each."""
    runs, single = found.runs, list(found.settings.index[found.settings.seeds == 1])
    worse = runs[runs.teacher_loss > runs.loss]
    falling = runs[runs.last_change_high < 0]
    needs = _list_needs(found)
    warnings = render(
        "warnings.txt.j2",
        groups=list(runs.drop_duplicates("group").itertuples()),
        worse=[f"{n} ({r.loss:.3f}; teacher {r.teacher_loss:.3f})" for n, r in worse.iterrows()],
        texts=find_texts(found),
        caches=find_caches(runs).iterrows(),
        needs=needs[:_MAX_NEEDS],
        needless=[name for _, names in needs[_MAX_NEEDS:] for name in names],
        single=single,
        has_seeds=len(single) < len(found.settings),
        falling=list(falling.setting.unique()),
        fall=-falling.last_change.mean(),
        without_documents=[name for name in runs.index if name not in found.results.documents],
        without_logs=[name for name in runs.index if name not in found.results.logs],
        **_LIMITS,
    )
    return [" ".join(warning.split()) for warning in warnings.split("\n\n") if warning.strip()]


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
    sentences, texts = [], find_texts(found)
    for names, text, epochs in texts:
        whose, documents = f" of {names}" if len(texts) > 1 else "", text.documents
        reasons = documents.describe_skipped()
        low, high = f"{epochs.min():.2f}", f"{epochs.max():.2f}"
        sentences.append(
            f"corpus{whose}: {documents.read:,} rows read = {documents.used:,} used + "
            f"{documents.read - documents.used:,} skipped{f': {reasons}' if reasons else ''}; trained for "
            f"{low if low == high else f'{low} to {high}'} epochs"
        )
    for _, text, _ in texts:
        sentences += describe_sources(text.documents, text.train)
    return sentences


def find_caches(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of each cache once; the index names the settings that learned from it."""
    users = runs[runs.cache_method.notna() & (runs.distillation_type != "output")]
    keys = [column for column in runs if str(column).startswith("cache_")]
    caches = users.drop_duplicates(keys)
    groups = users.groupby(keys, sort=False, dropna=False).setting.unique()
    return caches[keys].set_axis(map(list_names, groups), axis=0)


def _list_needs(found: Comparisons) -> list[tuple[str, list[str]]]:
    """Return which cross-entropy runs are missing, and the names of the runs that need them."""
    lacking = found.runs[(found.runs.distillation_type != "output") & found.runs.baseline.isna()]
    needs: dict[str, list[str]] = {}
    for name in lacking.index:
        needs.setdefault(_describe_need(found, name), []).append(name)
    return list(needs.items())


def _describe_need(found: Comparisons, name: str) -> str:
    """Return which cross-entropy run is missing, by the differences from the nearest one."""
    lacks = "no matching cross-entropy run; add one with"
    plain = found.conditions[found.runs.distillation_type == "output"]
    if plain.empty:
        return f"{lacks} training.distillation_type: output."
    mine = found.conditions.loc[name]
    differs = plain.ne(mine)
    order = pd.DataFrame(
        {"text": differs[HELD_OUT], "number": differs.sum(axis=1), "id": found.runs.id[plain.index]}
    )
    nearest = order.sort_values(["text", "number", "id"]).index[0]
    keys = list(differs.columns[differs.loc[nearest]])
    if UNKNOWN in keys:
        return (
            f"not all settings of these runs and of {nearest} are recorded, because a run.json was missing. Evaluate "
            "them again, with run.json beside training.json."
        )
    same = [f"the same {key}" for key in keys if key in (HELD_OUT, TEXT)]
    hidden = {HELD_OUT, TEXT}
    if any(key.startswith("student.") for key in keys):
        hidden |= {SIZE, STUDENT}
    elif STUDENT in keys:
        same, hidden = [*same, "the same student"], hidden | {SIZE, STUDENT}
    values = [
        f"{k}: {mine[k]} ({nearest}: {plain.loc[nearest, k]})" for k in keys if k not in hidden
    ]
    return f"{lacks} {list_names([*same, *values], most=8)}."
