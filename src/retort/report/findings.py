"""Sentences on the runs: the outcome, and warnings about the numbers.

A difference counts as one if its interval excludes zero; without an interval, if it is not zero to three digits.
"""

import math
from collections.abc import Sequence

from retort.config.schema import show
from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import DOCUMENTS_FILE
from retort.report.comparisons import (
    Comparison,
    compare_losses_of,
    compare_with_baseline,
    has_documents,
)
from retort.report.records import (
    SETTINGS,
    STUDENT_SIZE,
    VALIDATION_SET,
    CacheFacts,
    Record,
    TrainingLog,
    find_baseline,
    find_caches,
    find_differences,
    find_nearest,
    find_teachers,
    group_runs,
)
from retort.report.tables import format_signed, is_clear, is_gain

HIGH_TAIL_MASS = 0.2
HIGH_FIDELITY_KL = 0.05  # nats
FEW_POSITIONS = 1000
FEW_DOCUMENTS = 10
_MAX_NEEDS = 3  # sentences on runs without a margin, of which a sweep may have a hundred


def describe_outcome(group: Sequence[Record], *, baseline: str | None = None) -> str:
    """Return the main result of one group in a sentence or two: whether distillation helped, and by how much."""
    best = min(group, key=lambda r: r.loss)
    losses = [t.teacher_loss for t in find_teachers(group) if t.teacher_loss is not None]
    teacher = f"; teacher {min(losses):.3f}" if losses else ""
    pairs = [(r, compare_with_baseline(r, group, baseline=baseline)) for r in group]
    margins = [(r, found) for r, found in pairs if found is not None]
    if margins and best.positions < FEW_POSITIONS:
        return (
            f"{best.positions:,} held-out positions are too few to tell whether distillation helped "
            f"(at least {FEW_POSITIONS:,} are needed){teacher}."
        )
    if not margins:
        lacks = "no matching cross-entropy run to compare with"
        why = lacks if best.is_distilled else "no distilled run to compare with"
        return f"{best.name}: held-out loss {best.loss:.3f} nats/token, {why}{teacher}."
    return _describe_margins(margins, teacher)


def _describe_margins(margins: Sequence[tuple[Record, Comparison]], teacher: str) -> str:
    """Return the margin of the run with the lowest loss, and the other runs whose result is the opposite."""
    # Not of the run with the largest margin: its baseline may be a bad one.
    run, found = min(margins, key=lambda m: m[0].loss)
    against = f"cross-entropy ({found.baseline.name}, {found.baseline.loss:.3f})"
    others: dict[bool, list[str]] = {True: [], False: []}
    for other, comparison in margins:
        if other is not run:
            is_same = comparison.baseline is found.baseline
            theirs = "it" if is_same else comparison.baseline.name
            sentence = f"{other.name} is {_distance(comparison.margin)} {theirs}"
            others[is_gain(comparison.margin)].append(sentence)
    distance = f"{_distance(found.margin)} {against}{teacher}."
    if is_gain(found.margin):
        worse = f" Not every distilled run improved: {list_names(others[False])}."
        outcome = f"{run.name}: held-out loss {run.loss:.3f}, {distance}"
        return outcome + (worse if others[False] else "")
    lost = (
        "Not every distilled run improved"
        if others[True]
        else "Distillation did not beat cross-entropy"
    )
    outcome = (
        f"{lost}: the best distilled run, {run.name}, has held-out loss {run.loss:.3f}, {distance}"
    )
    return outcome + (f" But {list_names(others[True])}." if others[True] else "")


def describe_next_best(group: Sequence[Record], *, baseline: str | None = None) -> str | None:
    """Return how the best run compares with the next best; None without one, or if the outcome says so already."""
    if len(group) < 2 or group[0].positions < FEW_POSITIONS:
        return None
    best, second = sorted(group, key=lambda r: r.loss)[:2]
    found = compare_with_baseline(best, group, baseline=baseline)
    if found is not None and found.baseline is second:
        return None
    margin = compare_losses_of(best, second)
    return (
        f"{best.name} is {_distance(margin)} the next best run, {second.name} ({second.loss:.3f})."
    )


def _distance(margin: Estimate) -> str:
    value, ends = margin.value, margin.ends
    if ends and not is_clear(margin):
        low, high = ends
        interval = f"95 %: {format_signed(low)} to {format_signed(high)}"
        return f"not clearly different ({format_signed(value)}; {interval}) from"
    if round(value, 3) == 0:
        return "not different (to 0.001) from"
    interval = ""
    if ends:
        low, high = sorted(abs(end) for end in ends)
        interval = f" ({low:.3f} to {high:.3f})"
    return f"{abs(value):.3f}{interval} {'above' if value > 0 else 'below'}"


def find_warnings(
    records: Sequence[Record], logs: Sequence[TrainingLog | None], *, baseline: str | None = None
) -> list[str]:
    """Return what a reader must know before trusting the numbers, one or two sentences each."""
    groups = group_runs(records)
    found = []
    if len(groups) > 1:
        sizes = ", ".join(f"{g[0].positions:,}" for g in groups)
        found.append(
            f"The runs were evaluated on {len(groups)} different validation sets ({sizes} "
            "positions): losses are compared only within a set."
        )
    found += [_warn_of_leak(group[0]) for group in groups if group[0].leaked_sequences]
    worse = [r for r in records if r.teacher_loss is not None and r.teacher_loss > r.loss]
    if worse:
        pairs = [f"{r.name} ({r.loss:.3f}; teacher {r.teacher_loss:.3f})" for r in worse]
        found.append(
            f"A teacher's held-out loss is worse than its student's: {list_names(pairs)}. Check that "
            "the teacher suits this text."
        )
    for names, cache in find_caches(records):
        found += _warn_of_cache(list_names(names), cache)
    for group in groups:
        found += _warn_of_size(group[0])
    found += _warn_of_comparisons(records, baseline)
    without = [r.name for r in records if not has_documents(r)]
    if without:
        found.append(
            f"No {DOCUMENTS_FILE} beside the metrics of {list_names(without)}: their margins have no intervals. "
            "Evaluate them again."
        )
    missing = [r.name for r, log in zip(records, logs, strict=True) if log is None]
    if missing:
        found.append(f"No training log, so no learning curve: {list_names(missing)}.")
    return found


def list_names(names: Sequence[str], *, most: int = 4) -> str:
    """Return names joined by commas; of more than `most`, the first ones and the number of the others."""
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return ", ".join(shown)


def _warn_of_leak(record: Record) -> str:
    return (
        f"{record.leaked_sequences:,} of {record.sequences:,} held-out sequences are also in the training text, so "
        "held-out losses are lower than on new text. Remove duplicates from the corpus, or hold out by "
        "dataset.validation_fraction, which keeps equal documents in one split."
    )


def _warn_of_size(record: Record) -> list[str]:
    """Return a warning if a group, of which `record` is one, has too few positions or documents."""
    if record.positions < FEW_POSITIONS:
        return [
            f"Only {record.positions:,} held-out positions: too few to tell runs apart. Add documents, or raise "
            f"dataset.validation_fraction, to have {FEW_POSITIONS:,} or more."
        ]
    if record.documents < FEW_DOCUMENTS:
        return [
            f"Only {record.documents} held-out documents: too few to resample, so the intervals are too narrow. Hold "
            f"out {FEW_DOCUMENTS} or more."
        ]
    return []


def _warn_of_cache(names: str, cache: CacheFacts) -> list[str]:
    found = []
    # `sampled` keeps a sample of the tail.
    if cache.tail_mass > HIGH_TAIL_MASS and cache.method != "sampled":
        found.append(
            f"Tail mass {cache.tail_mass:.3f} is high: the cache of {names} leaves more than "
            f"{HIGH_TAIL_MASS:.0%} of the teacher's probability outside the tokens it "
            "keeps. Raise cache.top_k, or lower cache.min_probability."
        )
    if cache.fidelity_kl > HIGH_FIDELITY_KL:
        found.append(
            f"Fidelity KL {cache.fidelity_kl:.3f} nats is high (expected: below "
            f"{HIGH_FIDELITY_KL}): the cache of {names} differs from its teacher. Generate it again "
            "(teacher.generation.force_regenerate)."
        )
    return found


def _warn_of_comparisons(records: Sequence[Record], baseline: str | None) -> list[str]:
    found = []
    pairs = [(r, find_baseline(r, records, baseline=baseline)) for r in records]
    needs: dict[str, list[str]] = {}
    for record in (r for r, other in pairs if r.is_distilled and other is None):
        nearest = find_nearest(record, records, baseline=baseline)
        needs.setdefault(_describe_need(record, nearest), []).append(record.name)
    shown = list(needs.items())[:_MAX_NEEDS]
    found += [f"No margin for {list_names(names)}: {need}" for need, names in shown]
    if rest := [name for names in list(needs.values())[_MAX_NEEDS:] for name in names]:
        found.append(f"No margin for {list_names(rest)} either: no matching cross-entropy run.")
    unequal = [
        f"{r.name} ({r.trained_tokens:,} tokens; {other.name} {other.trained_tokens:,})"
        for r, other in pairs
        if other and not math.isclose(r.trained_tokens, other.trained_tokens, rel_tol=0.01)
    ]
    if unequal:
        found.append(
            "These margins mix two effects, because run and baseline were trained on different amounts of text: "
            f"{list_names(unequal)}."
        )
    seeds = len({r.seed for r in records})
    if seeds == 1:
        found.append(
            "Intervals account for the choice of held-out documents, not for the seed: with one seed, a small "
            "difference may be chance. Add seeds to find out."
        )
    else:
        found.append(
            f"{seeds} seeds: each row is one run, whose interval accounts for the choice of held-out documents only. "
            "Means over seeds are listed separately; their intervals account for the seeds."
        )
    return found


def _describe_need(record: Record, nearest: Record | None) -> str:
    """Return which cross-entropy run is missing, by the differences from the nearest one."""
    lacks = "no matching cross-entropy run; add one with"
    if nearest is None:
        return f"{lacks} training.distillation_type: output."
    found = find_differences(record, nearest)
    if SETTINGS in found:
        return (
            f"not all settings of these runs and of {nearest.name} are recorded, because a run.json was missing. "
            "Evaluate them again, with run.json beside training.json."
        )
    if any(key.startswith("student.") for key in found):
        found.pop(STUDENT_SIZE, None)
    same = [key for key in (VALIDATION_SET,) if found.pop(key, None)]
    values = [
        f"{k}: {show(mine)} ({nearest.name}: {show(other)})" for k, (mine, other) in found.items()
    ]
    return f"{lacks} {list_names([*(f'the same {key}' for key in same), *values])}."
