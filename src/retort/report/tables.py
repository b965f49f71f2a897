"""Tables of the summary and the page. What is not defined is a dash."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from retort.evaluation.formatting import (
    format_estimate,
    format_metric,
    format_plus_minus,
    name_metric,
)
from retort.evaluation.intervals import Estimate
from retort.report.comparisons import Comparisons, find_best, is_gain
from retort.report.findings import list_names
from retort.report.runs import find_teachers, get_estimate

# Columns of the main table: key, head in the terminal, head on the page.
COLUMNS = {
    "loss": ("loss", "held-out loss"),
    "margin": ("margin", "margin vs cross-entropy"),
    "seeds": ("seeds", "seeds"),
    "perplexity": ("perplexity", "perplexity"),
    "kl_to_teacher": ("KL", "KL to teacher"),
    "agreement": ("agree %", "agreement, %"),
    "distillation_type": ("type", "type"),
    "alpha": ("alpha", "alpha"),
    "temperature": ("T", "T"),
    "student_parameters": ("params", "parameters"),
}
# Left out of a terminal's table, in this order, until names have room.
_OPTIONAL = ("params", "perplexity", "agree %", "T", "alpha", "type", "KL")
_NAME_ROOM = 24  # characters
NO_BASELINE = "no match"


class Cell(NamedTuple):
    """A cell: its text, a smaller text below it (the interval), what it is sorted by, and whether it stands out."""

    text: str
    below: str = ""
    key: str = ""
    is_bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first of `heads` is that of the rows' names."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, bool, tuple[Cell, ...]], ...]  # name, is it a teacher, cells
    title: str = ""


_DASH = Cell("-")


def _text(text: str | None) -> Cell:
    return _DASH if text is None else Cell(text, key=text)


def _number(value: float | None, pattern: str) -> Cell:
    return (
        _DASH
        if value is None or pd.isna(value)
        else Cell(format(value, pattern), key=repr(float(value)))
    )


def build_main_table(found: Comparisons, group: pd.DataFrame) -> Table:
    """Return the main table of one group of settings, with a cell for each of COLUMNS: its teachers, then settings."""
    rows = []
    for name, row in find_teachers(group).iterrows():
        loss = get_estimate(row, "teacher_loss")
        known = {
            "student_parameters": _size(row.teacher_parameters),
            "loss": Cell(format_plus_minus(loss), key=repr(loss.value)) if loss else _DASH,
            "perplexity": _perplexity(row.teacher_perplexity),
        }
        rows.append((name, True, tuple(known.get(key, _DASH) for key in COLUMNS)))
    best = find_best(found, group, "loss")
    for name, row in group.iterrows():
        rows.append((name, False, tuple(_main_cell(key, row, name == best) for key in COLUMNS)))
    return Table(("setting", *(page for _, page in COLUMNS.values())), tuple(rows))


def _main_cell(key: str, row: pd.Series, is_best: bool) -> Cell:
    is_distilled = row.distillation_type != "output"
    if key == "distillation_type":
        return _text(row[key])
    if key == "temperature" and not is_distilled:
        return _DASH
    if key == "student_parameters":
        return _size(row[key])
    if key == "perplexity":
        return _perplexity(row[key])
    if key == "agreement":
        return _number(100 * row[key], ".1f")
    if key in ("loss", "margin"):
        return _estimate_cell(get_estimate(row, key), key, is_distilled, is_best)
    return _number(row[key], {"seeds": "d", "kl_to_teacher": ".3f"}.get(key, ".3g"))


def _estimate_cell(found: Estimate | None, key: str, is_distilled: bool, is_best: bool) -> Cell:
    if found is None:
        return Cell(NO_BASELINE) if is_distilled else _DASH
    text = format_plus_minus(found, is_signed=key == "margin")
    return Cell(text, key=repr(found.value), is_bold=is_gain(found) if key == "margin" else is_best)


def _perplexity(value: float) -> Cell:
    return _number(value, ",.2f" if value < 99_999 else ".2e")


def _size(count: float) -> Cell:
    """Return a count in at most 7 characters: 54,272 as it is, 1,234,567 as 1.235M."""
    if pd.isna(count):
        return _DASH
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= bound:
            return Cell(f"{count / bound:.4g}{unit}", key=repr(float(count)))
    return _number(count, ",d")


def render_table(table: Table, width: int) -> list[str]:
    """Return the main table as lines of at most `width` characters: wrapped names, and fewer columns."""
    heads = ["setting", *(head for head, _ in COLUMNS.values())]
    frame = pd.DataFrame(
        [[name, *(c.text for c in cells)] for name, _, cells in table.rows], columns=heads
    )
    longest = max(map(len, frame.setting))
    for head in ("", *_OPTIONAL):
        frame = frame.drop(columns=head) if head else frame
        rest = frame.drop(columns="setting").to_string(index=False).partition("\n")[0]
        room = width - len(rest) - 2
        if room >= min(longest, _NAME_ROOM):
            break
    parts = [textwrap.wrap(name, max(room, 8), subsequent_indent="  ") for name in frame.setting]
    room = max(len(part) for lines in parts for part in lines)
    frame = frame.assign(setting=parts).explode("setting")
    frame.loc[frame.index.duplicated(), frame.columns[1:]] = ""
    for head in {"setting", "type"} & set(frame.columns):  # left-aligned
        size = room if head == "setting" else 6
        frame[head] = frame[head].str.ljust(size)
        frame = frame.rename(columns={head: head.ljust(size)})
    lines = [line.rstrip() for line in frame.to_string(index=False).splitlines()]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def format_seconds(value: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, hours = value / 60, value / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def _kl_pattern(value: float) -> str:
    return ".1e" if 0 < value < 1e-3 else ".4f"


def format_cache(cache: pd.Series) -> str:
    """Return a cache's size and quality in one line."""
    tail = "sampled mass" if cache.cache_method == "sampled" else "tail mass"
    sizes = f"{cache.cache_method}, {cache.cache_dial}: {cache.cache_bytes_per_position:.1f} bytes/position"
    positions = f"{cache.cache_positions:,} positions"
    if pd.isna(cache.cache_fidelity_kl):
        return f"{sizes}, {positions}"
    kl = format(cache.cache_fidelity_kl, _kl_pattern(cache.cache_fidelity_kl))
    return (
        f"{sizes}, {tail} {cache.cache_tail_mass:.4f}, fidelity KL {kl} nats, same top token "
        f"{100 * cache.cache_fidelity_agreement:.1f} %, {positions}"
    )


# The page's tables ---------------------------------------------------------------------------------

_PAGE_METRICS = (
    *("loss", "bits_per_byte", "kl_to_teacher", "reverse_kl", "agreement", "overlap"),
    *("acceptance", "accuracy", "calibration_error"),
)
_KINDS = {
    "frequency": "By frequency of the next token: its rank in the training text",
    "place": "By place in the document: number of tokens before the next one",
    "entropy": "By entropy of the teacher's distribution, nats",
    "category": "By category of the document",
    "language": "By language of the document",
}


def build_metric_table(found: Comparisons, group: pd.DataFrame, *, of: str = "setting") -> Table:
    """Return all metrics of one group with their intervals, teachers first; shares in percent.

    of: whether the group's rows are settings, of which the clearly best are bold, or a "run" each, with its baseline.
    """
    shown = [name for name in _PAGE_METRICS if group[name].notna().any()]
    heads = [of, *map(name_metric, shown)]
    rows: list[tuple[str, bool, tuple[Cell, ...]]] = []
    best = {name: find_best(found, group, name) for name in shown} if of == "setting" else {}
    gaps = [_estimate(get_estimate(row, "gap_closed"), 100.0, 0) for _, row in group.iterrows()]
    has_gaps = any(gap != _DASH for gap in gaps)
    if has_gaps:
        heads.append("gap closed, %")
    if of == "run":
        heads += ["margin, nats/token", "baseline"]
    for name, row in find_teachers(group).iterrows() if of == "setting" else ():
        cells = [_metric(n, row, f"teacher_{n}") for n in shown]
        rows.append((name, True, (*cells, *[_DASH] * (len(heads) - 1 - len(cells)))))
    for (name, row), gap in zip(group.iterrows(), gaps, strict=True):
        cells = [_metric(n, row, n, is_bold=best.get(n) == name) for n in shown]
        cells += [gap] if has_gaps else []
        if of == "run":
            margin = get_estimate(row, "margin")
            cells += [_estimate(margin, 1.0, 3, is_bold=is_gain(margin))]
            cells += [_DASH if pd.isna(row.baseline) else _text(row.baseline)]
        rows.append((name, False, tuple(cells)))
    return Table(tuple(heads), tuple(rows))


def _metric(name: str, row: pd.Series, column: str, *, is_bold: bool = False) -> Cell:
    found = get_estimate(row, column) if column in row else None
    if found is None:
        return _DASH
    return Cell(*format_metric(name, found), repr(found.value), is_bold)


def _estimate(found: Estimate | None, scale: float, digits: int, *, is_bold: bool = False) -> Cell:
    if found is None:
        return _DASH
    return Cell(*format_estimate(found, scale, digits), repr(found.value), is_bold)


def build_breakdowns(found: Comparisons, group: pd.DataFrame) -> list[Table]:
    """Return a table for each partition of the positions: the loss of each setting, and its KL below, by class."""
    rows = [
        {
            "setting": setting,
            "kind": kind,
            "class": row.name,
            "positions": row.positions,
            "documents": row.documents,
        }
        | {name: estimate.value for name, estimate in row.metrics.items()}
        for name, setting in found.runs.setting.items()
        if setting in group.index
        for kind, classes in found.results.metrics[name].scores.breakdown.items()
        for row in classes
    ]
    if not rows:
        return []
    long = pd.DataFrame(rows).reindex(columns=[*rows[0], "teacher_loss", "kl_to_teacher"])
    long = long.loc[:, ~long.columns.duplicated()]
    return [
        _build_breakdown(long[long.kind == kind], list(group.index), title)
        for kind, title in _KINDS.items()
        if (long.kind == kind).any()
    ]


def _build_breakdown(long: pd.DataFrame, settings: list[str], title: str) -> Table:
    by_class = long.groupby("class", sort=False)
    first = by_class.first()  # of the values that are defined
    means = long.groupby(["class", "setting"])[["loss", "kl_to_teacher"]].mean()
    has_teacher = first.teacher_loss.notna().any()
    rows = []
    for name, row in first.iterrows():
        several = "" if row.documents == 1 else "s"
        cells = [Cell(f"{row.positions:,.0f}", f"{row.documents:,.0f} document{several}")]
        cells += [_number(row.teacher_loss, ".3f")] if has_teacher else []
        for setting in settings:
            if (name, setting) not in means.index:
                cells.append(_DASH)
                continue
            loss, kl = means.loc[(name, setting)]
            cells.append(Cell(f"{loss:.3f}", "" if pd.isna(kl) else f"KL {kl:.3f}"))
        rows.append((str(name), False, tuple(cells)))
    heads = ("class", "positions", *(("teacher",) if has_teacher else ()), *settings)
    return Table(heads, tuple(rows), title)


def build_task_table(board: pd.DataFrame) -> Table:
    """Return the table of every model's score in every task, with its interval."""
    metrics = list(dict.fromkeys(board.sort_index().metric))
    rows = []
    for (name, is_teacher), scores in board.groupby(["model", "is_teacher"], sort=False):
        known = {row.metric: get_estimate(row, "value") for _, row in scores.iterrows()}
        rows.append((name, is_teacher, tuple(_estimate(known.get(m), 1.0, 3) for m in metrics)))
    return Table(("model", *metrics), tuple(rows))


def build_cache_table(caches: Sequence[tuple[list[str], pd.Series]]) -> Table:
    """Return the table of the caches that runs learned from: size and quality."""
    heads = (
        "runs",
        "method",
        "keeps",
        "positions",
        "bytes per token",
        "tail mass",
        "fidelity KL, nats",
        "same top token, %",
    )
    rows = [
        (
            list_names(names),
            False,
            (
                _text(cache.cache_method),
                _text(cache.cache_dial),
                _number(cache.cache_positions, ",d"),
                _number(cache.cache_bytes_per_position, ",.1f"),
                _number(cache.cache_tail_mass, ".4f"),
                _number(cache.cache_fidelity_kl, _kl_pattern(cache.cache_fidelity_kl)),
                _number(100 * cache.cache_fidelity_agreement, ".1f"),
            ),
        )
        for names, cache in caches
    ]
    return Table(heads, tuple(rows))


def build_provenance_table(runs: pd.DataFrame) -> Table:
    """Return the table of the runs' ids, lengths of training, devices and folders."""
    heads = (
        "run",
        "id",
        "seed",
        "steps",
        "positions trained on",
        "training time",
        "device",
        "folder",
    )
    rows = []
    for name, run in runs.iterrows():
        seconds = Cell(format_seconds(run.training_seconds), key=repr(run.training_seconds))
        counts = (_number(run[key], ",d") for key in ("seed", "steps", "trained_positions"))
        rows.append(
            (name, False, (_text(run.id), *counts, seconds, _text(run.device), _text(run.folder)))
        )
    return Table(heads, tuple(rows))


def describe_settings(found: Comparisons) -> tuple[dict[str, str], Table]:
    """Return what all runs share, by name, and a table of what differs: settings, code, packages and device.

    Keys of the config that all runs share are left out.
    """
    rows = []
    for name, run in found.runs.iterrows():
        row = {key: f"{run[key]:,}" for key in ("steps", "trained_positions", "student_parameters")}
        row |= {"device": run.device}
        if made := found.results.metrics[name].trained:
            row |= {
                k: getattr(made, k)
                for k in ("source", "commit", "uncommitted_changes", "dtype", "python")
            }
            row |= made.versions
            keys = pd.json_normalize(made.config).to_dict("records")[0] if made.config else {}
            row |= {k: v for k, v in keys.items() if k not in found.learning}
        rows.append({k.replace("_", " ") if "." not in k else k: v for k, v in row.items()})
    facts = pd.concat(
        [found.learning, pd.DataFrame(rows, index=found.runs.index, dtype=object)], axis=1
    )
    facts = facts.map(lambda v: "-" if v is None or v is np.nan else str(v))
    # A key that some runs do not use differs if it does between those that use it.
    used = facts.mask(facts == "-")
    differing = facts.loc[:, used.nunique() > 1]
    shared = used.drop(columns=differing.columns).bfill().iloc[0].dropna()
    shared = shared[[k in found.learning or "." not in k for k in shared.index]]
    table = [(name, False, tuple(map(_text, row))) for name, row in differing.iterrows()]
    return dict(shared), Table(("run", *differing.columns), tuple(table))
