"""An estimate as text: tables for a person, and short lines for the check."""

from collections.abc import Iterable, Iterator, Sequence

from retort.estimate.records import CacheEstimate, Estimate, RunEstimate, TeacherEstimate
from retort.io.units import format_bytes, format_count

_UNITS = (("years", 24 * 365.25), ("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60))
_BASES = {
    "sample": "a sample of this teacher's own distributions",
    "codec": "the codec: at most",
    "table": "a table, for a usual teacher",
}


def format_hours(hours: float) -> str:
    """Return a time in its largest unit: 3.2 minutes, 12 hours, 1.9 days, 4,200 years."""
    for unit, size in _UNITS:
        value = hours / size
        if value >= 1.95:
            return f"{value:,.0f} {unit}" if value >= 99.5 else f"{value:.3g} {unit}"
    return f"{max(1.0, hours * 3600):.0f} seconds"


def align(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines with columns of equal width, first and last to the left; rows with equal cells share a line."""
    joined: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        names = joined.setdefault(tuple(cells), [])
        names += [name] * (name not in names)
    table = [list(heads), *([", ".join(names), *cells] for cells, names in joined.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def describe(estimate: Estimate) -> Iterator[str]:
    """Yield the lines of the whole estimate."""
    device = estimate.device
    of_each = f", {format_bytes(device.memory)} each" if device.memory else ""
    yield f"for {device.number} x {device.name}{of_each}"
    yield ""
    yield from align(
        ("text", "tokens", "documents", "sequences", "positions", "from"),
        (
            (
                text.name,
                f"{text.tokens:,}{_error(text.relative_error)}",
                "-" if text.documents is None else f"{text.documents:,}",
                f"{text.sequences:,}",
                f"{text.positions:,}",
                text.basis,
            )
            for text in estimate.texts
        ),
    )
    if estimate.teachers:
        yield from ("", *_describe_teachers(estimate.teachers, unit=_unit(estimate)))
        yield from ("", *_describe_caches(estimate.caches))
    yield from ("", *_describe_runs(estimate.runs, unit=_unit(estimate)))
    yield from ("", *_describe_memory(estimate.runs), "")
    yield from describe_totals(estimate)
    yield from ("", "assumed:", *(f"- {line}" for line in estimate.assumptions))


def _unit(estimate: Estimate) -> str:
    return "GPU time" if estimate.device.memory else "job time"


def _error(relative: float | None) -> str:
    return f" +- {relative:.1%}" if relative else ""


def _describe_teachers(teachers: Sequence[TeacherEstimate], *, unit: str) -> list[str]:
    heads = "pass of the teacher", "parameters", "weights", "activations", "logits"
    return align(
        (*heads, "GPUs a copy", "at least", "copies", "time", unit, "jobs"),
        (
            (
                f"{teacher.name} ({teacher.dtype})",
                format_count(teacher.parameters),
                format_bytes(teacher.memory.weights),
                format_bytes(teacher.memory.activations),
                format_bytes(teacher.memory.selection),
                "-" if teacher.smallest_group is None else str(teacher.gpus_per_model),
                str(teacher.smallest_group or "-"),
                str(teacher.copies),
                format_hours(teacher.hours),
                format_hours(teacher.device_hours),
                str(teacher.slots * teacher.copies),
            )
            for teacher in teachers
        ),
    )


def _describe_caches(caches: Sequence[CacheEstimate]) -> list[str]:
    return align(
        ("cache", "bytes a position", "size", "while merging", "free", "from"),
        (
            (
                cache.method,
                f"{cache.bytes_per_position:.1f}{_error(cache.relative_error)}",
                format_bytes(cache.record_bytes),
                format_bytes(cache.disk_bytes),
                format_bytes(cache.free_bytes),
                _BASES[cache.basis],
            )
            for cache in caches
        ),
    )


def _describe_runs(runs: Sequence[RunEstimate], *, unit: str) -> list[str]:
    return align(
        (
            "run",
            "parameters",
            "trained",
            "steps",
            "tokens",
            "epochs",
            "time",
            unit,
            "jobs",
            "batch",
        ),
        (
            (
                run.name,
                format_count(run.parameters),
                format_count(run.trained_parameters),
                f"{run.steps:,}",
                format_count(run.tokens),
                f"{run.epochs:.3g}",
                format_hours(run.hours),
                format_hours(run.device_hours),
                str(run.slots),
                run.layout,
            )
            for run in runs
        ),
    )


def _describe_memory(runs: Sequence[RunEstimate]) -> list[str]:
    heads = "memory of", "weights", "gradients", "optimizer", "activations", "loss", "in all"
    return align(
        (*heads, "measured", "without / with recomputation"),
        (
            (
                run.name,
                *(
                    format_bytes(getattr(run.memory, name))
                    for name in ("weights", "gradients", "optimizer", "activations", "loss", "peak")
                ),
                format_bytes(run.measured_memory) if run.measured_memory else "-",
                f"{format_bytes(run.memory_plain.peak)} / {format_bytes(run.memory_checkpointed.peak)}",
            )
            for run in runs
        ),
    )


def describe_totals(estimate: Estimate) -> Iterator[str]:
    """Yield what all takes together, and whether a cache pays."""
    device, unit = estimate.device, _unit(estimate)
    price = f", {estimate.price:,.2f} in money" if estimate.price is not None else ""
    yield (
        f"in all: {format_hours(estimate.wall_hours)} on {device.number} x {device.name}, "
        f"{format_hours(estimate.device_hours)} of {unit}{price}"
    )
    if (even := estimate.break_even) is None:
        return
    saved = even.live_hours - even.cached_hours
    verdict = (
        f"the cache saves {format_hours(saved)}"
        if saved > 0
        else f"the cache costs {format_hours(-saved)} more, and pays once the students read the text more often"
    )
    yield (
        f"cache or live teacher: the students read the text {even.passes:.3g} times in all. The teacher takes "
        f"{format_hours(even.live_hours)} of {unit} beside them, {format_hours(even.cached_hours)} for its caches: "
        f"{verdict}"
    )


def summarize(estimate: Estimate) -> list[str]:
    """Return the estimate in a few lines, for the check of a config."""
    device = f"{estimate.device.number} x {estimate.device.name}"
    lines = [
        f"estimate: {text.tokens:,} tokens{_error(text.relative_error)} of {text.name} ({text.basis})"
        for text in estimate.texts
    ]
    for cache, teacher in zip(estimate.caches, estimate.teachers, strict=True):
        lines.append(
            f"estimate: the teacher takes {format_hours(teacher.hours)}; cache {cache.method} of some "
            f"{format_bytes(cache.record_bytes)} ({_BASES[cache.basis]}), up to {format_bytes(cache.disk_bytes)} while "
            f"it is merged, {format_bytes(cache.free_bytes)} free"
        )
    most = format_bytes(max(run.memory.peak for run in estimate.runs))
    lines.append(
        f"estimate: a training takes at most {format_hours(max(run.hours for run in estimate.runs))}"
        f"{f' and {most} of memory' if estimate.device.memory else ''}; in all {format_hours(estimate.wall_hours)} on "
        f"{device}. retort estimate says what is assumed"
    )
    return list(dict.fromkeys(lines))
