"""Metrics as text: titles, rounding, intervals."""

from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import MAX_PERPLEXITY, METRICS


def name_metric(name: str) -> str:
    """Return a metric's title and unit; shares are in percent."""
    metric = METRICS[name]
    return f"{metric.title}, {metric.unit or '%'}"


def format_metric(name: str, found: Estimate) -> tuple[str, str]:
    """Return a metric's value (shares in percent) and its interval ("" without one)."""
    scale, digits = (1.0, 3) if METRICS[name].unit else (100.0, 1)
    return format_estimate(found, scale, digits)


def format_estimate(found: Estimate, scale: float, digits: int) -> tuple[str, str]:
    """Return (value, interval) times `scale`, rounded to `digits`; the interval is "" without one."""
    text = format_number(found.value * scale, digits)
    if found.ends is None:
        return text, ""
    low, high = (format_number(end * scale, digits) for end in found.ends)
    return text, f"{low} to {high}"


def format_number(value: float, digits: int) -> str:
    """Return a number with so many digits, a large one by its power of ten; "> 1e304" is the end of perplexity."""
    if value >= MAX_PERPLEXITY:
        return "> 1e304"
    return f"{value:.2e}" if abs(value) >= 1e9 else f"{value:,.{digits}f}"


def format_plus_minus(found: Estimate | None, *, is_signed: bool = False) -> str:
    """Return 3.213 or 3.213\u00b10.020, with the distance to the farther end of the interval; a dash for None."""
    if found is None:
        return "-"
    text = format_signed(found.value) if is_signed else f"{found.value:.3f}"
    if found.ends is None:
        return text
    return f"{text}\u00b1{max(found.ends[1] - found.value, found.value - found.ends[0]):.3f}"


def format_signed(value: float) -> str:
    """Return a difference with three digits and its sign; zero has no sign."""
    return "0.000" if round(value, 3) == 0 else f"{value:+.3f}"
