"""What a reader should take away from measured runs, and what to know before trusting the numbers: sentences.

Equal inputs give equal sentences. A difference counts as a gain where its whole interval says so; where there is no
interval, where it is not zero to three digits.
"""

import math
from collections.abc import Sequence

from retort.comparisons import compare_losses_of, compare_with_baseline, has_documents
from retort.intervals import Estimate
from retort.records import (
    CacheFacts,
    Record,
    TrainingLog,
    find_baseline,
    find_caches,
    find_teachers,
    group_runs,
)
from retort.scores import DOCUMENTS_FILE
from retort.tables import is_clear, is_gain, signed

HIGH_TAIL_MASS = 0.2
HIGH_FIDELITY_KL = 0.05  # nats
FEW_POSITIONS = 1000
FEW_DOCUMENTS = 10


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
        lacks = "no cross-entropy run with the same student size, seed and steps to compare with"
        why = lacks if best.is_distilled else "no distilled run to compare with"
        return f"{best.name}: held-out loss {best.loss:.3f} nats/token, {why}{teacher}."
    run, found = min(margins, key=lambda m: m[1].margin.value)
    against = f"cross-entropy ({found.baseline.name}, {found.baseline.loss:.3f})"
    worse = [
        f"{r.name} is {_distance(f.margin)} it"
        for r, f in margins
        if not is_gain(f.margin) and r != run
    ]
    if is_gain(found.margin):
        sentence = f"{run.name}: held-out loss {run.loss:.3f}, {_distance(found.margin)} {against}{teacher}."
        return sentence + (
            f" Not every distilled run gained: {list_names(worse)}." if worse else ""
        )
    return (
        f"Distillation did not beat cross-entropy: the best distilled run, {run.name}, has "
        f"held-out loss {run.loss:.3f}, {_distance(found.margin)} {against}{teacher}."
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
    alone = [r.name for r, other in pairs if r.is_distilled and other is None]
    if alone:
        found.append(
            f"No margin for {list_names(alone)}: no run of type output shares the validation set, "
            "student size, seed and steps."
        )
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
