"""What a reader should take away from measured runs, and what to know before trusting the numbers: sentences.

Equal inputs give equal sentences. A difference counts as a gain where its whole interval says so; where there is no
interval, where it is not zero to three digits.
"""

import math
from collections.abc import Sequence

from retort.config.schema import show
from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import DOCUMENTS_FILE
from retort.report.comparisons import compare_losses_of, compare_with_baseline, has_documents
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
from retort.report.tables import is_clear, is_gain, signed

HIGH_TAIL_MASS = 0.2
HIGH_FIDELITY_KL = 0.05  # nats
FEW_POSITIONS = 1000
FEW_DOCUMENTS = 10
_MOST_NEEDS = 3  # sentences on runs without a margin; a sweep may have a hundred of them


def describe_outcome(group: Sequence[Record], *, baseline: str | None = None) -> str:
    """Return the sentence that a reader should take away from one group, whichever way it went."""
    best = min(group, key=lambda r: r.loss)
    losses = [t.teacher_loss for t in find_teachers(group) if t.teacher_loss is not None]
    teacher = f"; teacher {min(losses):.3f}" if losses else ""
    pairs = [(r, compare_with_baseline(r, group, baseline=baseline)) for r in group]
    margins = [(r, found) for r, found in pairs if found is not None]
    if margins and best.positions < FEW_POSITIONS:
        return (
            f"{best.positions:,} held-out positions are too few to tell whether distillation helped "
            f"({FEW_POSITIONS:,} or more would){teacher}."
        )
    if not margins:
        lacks = "no matching cross-entropy run to compare with"
        why = lacks if best.is_distilled else "no distilled run to compare with"
        return f"{best.name}: held-out loss {best.loss:.3f} nats/token, {why}{teacher}."
    # Not the greatest margin: that may be a bad run's over a worse baseline of its own.
    run, found = min(margins, key=lambda m: m[0].loss)
    against = f"cross-entropy ({found.baseline.name}, {found.baseline.loss:.3f})"
    others: dict[bool, list[str]] = {True: [], False: []}
    for other, beside in margins:
        if other is not run:
            theirs = "it" if beside.baseline is found.baseline else beside.baseline.name
            said = f"{other.name} is {_distance(beside.margin)} {theirs}"
            others[is_gain(beside.margin)].append(said)
    if is_gain(found.margin):
        sentence = f"{run.name}: held-out loss {run.loss:.3f}, {_distance(found.margin)} {against}{teacher}."
        worse = others[False]
        return sentence + (
            f" Not every distilled run gained: {list_names(worse)}." if worse else ""
        )
    better = others[True]
    lost = "Not every distilled run gained" if better else "Distillation did not beat cross-entropy"
    return (
        f"{lost}: the best distilled run, {run.name}, has "
        f"held-out loss {run.loss:.3f}, {_distance(found.margin)} {against}{teacher}."
        + (f" But {list_names(better)}." if better else "")
    )


def describe_next_best(group: Sequence[Record], *, baseline: str | None = None) -> str | None:
    """Return how the best run compares with the next best, unless the outcome says so; None where there is none."""
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
        return (
            f"not clearly different ({signed(value)}; 95 %: {signed(low)} to {signed(high)}) from"
        )
    if round(value, 3) == 0:
        return "not different (to 0.001) from"
    reach = ""
    if ends:
        low, high = sorted(abs(end) for end in ends)
        reach = f" ({low:.3f} to {high:.3f})"
    return f"{abs(value):.3f}{reach} {'above' if value > 0 else 'below'}"


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
    beaten = [r for r in records if r.teacher_loss is not None and r.teacher_loss > r.loss]
    if beaten:
        pairs = [f"{r.name} ({r.loss:.3f}; teacher {r.teacher_loss:.3f})" for r in beaten]
        found.append(
            f"A teacher's held-out loss is worse than its student's: {list_names(pairs)}. Check that "
            "the teacher suits this text."
        )
    for names, cache in find_caches(records):
        found += _warn_of_cache(list_names(names), cache)
    for group in groups:
        if group[0].positions < FEW_POSITIONS:
            found.append(
                f"Only {group[0].positions:,} held-out positions: too few to tell runs apart. "
                "Give more documents, or raise dataset.validation_fraction, until there are "
                f"{FEW_POSITIONS:,} or more."
            )
        elif group[0].documents < FEW_DOCUMENTS:
            found.append(
                f"Only {group[0].documents} held-out documents: too few to draw from, so the intervals are too narrow. "
                f"{FEW_DOCUMENTS} or more would do."
            )
    found += _warn_of_comparisons(records, baseline)
    bare = [r.name for r in records if not has_documents(r)]
    if bare:
        found.append(
            f"No {DOCUMENTS_FILE} beside the metrics of {list_names(bare)}: how sure their margins are is not known. "
            "Evaluate them again."
        )
    missing = [r.name for r, log in zip(records, logs, strict=True) if log is None]
    if missing:
        found.append(f"No training log found, so no learning curve drawn: {list_names(missing)}.")
    return found


def list_names(names: Sequence[str], *, most: int = 4) -> str:
    """Return names as a text; of many, the first ones and how many more."""
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return ", ".join(shown)


def _warn_of_leak(record: Record) -> str:
    return (
        f"{record.leaked_sequences:,} of {record.sequences:,} held-out sequences are in the training text too, to the "
        "last token: held-out losses are better than on new text. Remove copies from the corpus, or hold out by "
        "dataset.validation_fraction, which keeps equal documents on one side."
    )


def _warn_of_cache(names: str, cache: CacheFacts) -> list[str]:
    found = []
    if (
        cache.tail_mass > HIGH_TAIL_MASS and cache.method != "sampled"
    ):  # whose tail is there, as draws
        found.append(
            f"Tail mass {cache.tail_mass:.3f} is high: the cache of {names} leaves more than "
            f"{HIGH_TAIL_MASS:.0%} of the teacher's probability outside the tokens it "
            "keeps. Raise cache.top_k, or lower cache.min_probability."
        )
    if cache.fidelity_kl > HIGH_FIDELITY_KL:
        found.append(
            f"Fidelity KL {cache.fidelity_kl:.3f} nats is high (expected: below "
            f"{HIGH_FIDELITY_KL}): the cache of {names} is not what its teacher says. Make it anew."
        )
    return found


def _warn_of_comparisons(records: Sequence[Record], baseline: str | None) -> list[str]:
    found = []
    pairs = [(r, find_baseline(r, records, baseline=baseline)) for r in records]
    needs: dict[str, list[str]] = {}
    for record in (r for r, other in pairs if r.is_distilled and other is None):
        nearest = find_nearest(record, records, baseline=baseline)
        needs.setdefault(_describe_need(record, nearest), []).append(record.name)
    shown = list(needs.items())[:_MOST_NEEDS]
    found += [f"No margin for {list_names(names)}: {need}" for need, names in shown]
    if rest := [name for names in list(needs.values())[_MOST_NEEDS:] for name in names]:
        found.append(f"No margin for {list_names(rest)} either: no matching cross-entropy run.")
    unequal = [
        f"{r.name} ({r.trained_tokens:,} tokens; {other.name} {other.trained_tokens:,})"
        for r, other in pairs
        if other and not math.isclose(r.trained_tokens, other.trained_tokens, rel_tol=0.01)
    ]
    if unequal:
        found.append(f"Margins mix two effects where unequal text was seen: {list_names(unequal)}.")
    seeds = len({r.seed for r in records})
    if seeds == 1:
        found.append(
            "Intervals say what other held-out documents would change, not what another seed would: with one seed, a "
            "small difference may be chance. Other seeds would tell."
        )
    else:
        found.append(
            f"{seeds} seeds: each row is one run, whose interval says what other held-out documents would change. "
            "Means over seeds, with what other seeds would change, stand apart."
        )
    return found


def _describe_need(record: Record, nearest: Record | None) -> str:
    """Return which cross-entropy run is missing, by what the nearest one has otherwise."""
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
