"""Records of runs -> the table at the end of a run, and a page that opens without network.

The *margin* of a distilled run is its held-out loss minus its baseline's (see `records`): negative
is better. What is not defined is a dash. Equal inputs give equal bytes.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

from retort.figures import (
    INKS,
    SERIES,
    draw_comparison,
    draw_curves,
    draw_swatch,
)
from retort.figures import save_comparison_figure as save_comparison_figure
from retort.provenance import write_atomically
from retort.records import (
    CacheFacts,
    Record,
    TrainingLog,
    find_baseline,
    find_caches,
    find_settings,
    find_teachers,
    group_runs,
    load_logs,
    load_metrics,
    render_csv,
)

WIDTH = 100  # columns of the terminal's table
HIGH_TAIL_MASS = 0.2
HIGH_FIDELITY_KL = 0.05  # nats
FEW_POSITIONS = 1000

# First and second line of a column's head, and its width, after the column of names.
COLUMNS = (
    ("type", "", 6),
    ("alpha", "", 5),
    ("T", "", 4),
    ("params", "", 7),
    ("held-out", "loss", 8),
    ("perplexity", "", 10),
    ("KL to", "teacher", 7),
    ("agreement", "%", 9),
    ("margin vs", "cross-ent.", 10),
)
_NAME_WIDTH = WIDTH - sum(width + 2 for _, _, width in COLUMNS)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: the name, and a text for each of COLUMNS."""

    name: str
    is_teacher: bool
    cells: tuple[str, ...]


def make_report(metrics_paths: Sequence[Path], out_html: Path) -> str:
    """Write the page, and beside it summary.csv and summary.txt; return the latter's text.

    Raises ValueError where a file is missing, is not what `evaluate` or `train` writes, or has NaN.
    """
    records = load_metrics(metrics_paths)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    summary = render_summary(records, report_path=out_html)
    write_atomically(out_html.with_name("summary.txt"), (summary + "\n").encode())
    # The page comes last: where it is, the rest is too.
    write_report(records, load_logs(records), out_html, out_html.with_name("summary.csv"))
    return summary


def describe_outcome(group: Sequence[Record], *, baseline: str | None = None) -> str:
    """Return the sentence that a reader should take away from one group, whichever way it went."""
    best = min(group, key=lambda r: r.loss)
    losses = [t.teacher_loss for t in find_teachers(group) if t.teacher_loss is not None]
    teacher = f"; teacher {min(losses):.3f}" if losses else ""
    pairs = [(r, find_baseline(r, group, baseline=baseline)) for r in group]
    margins = [(r, other, r.loss - other.loss) for r, other in pairs if other is not None]
    if margins and best.positions < FEW_POSITIONS:
        return (
            f"{best.positions:,} held-out positions are too few to tell whether distillation helped "
            f"({FEW_POSITIONS:,} or more would){teacher}."
        )
    if not margins:
        lacks = "no cross-entropy run with the same student size, seed and steps to compare with"
        why = lacks if best.is_distilled else "no distilled run to compare with"
        return f"{best.name}: held-out loss {best.loss:.3f} nats/token, {why}{teacher}."
    run, other, margin = min(margins, key=lambda m: m[2])
    against = f"cross-entropy ({other.name}, {other.loss:.3f})"
    worse = [
        f"{r.name} is {_distance(m)} it" for r, _, m in margins if _rounded(m) >= 0 and r != run
    ]
    if _rounded(margin) < 0:
        sentence = (
            f"{run.name}: held-out loss {run.loss:.3f}, {_distance(margin)} {against}{teacher}."
        )
        return sentence + (f" Not every distilled run gained: {_list(worse)}." if worse else "")
    return (
        f"Distillation did not beat cross-entropy: the best distilled run, {run.name}, has "
        f"held-out loss {run.loss:.3f}, {_distance(margin)} {against}{teacher}."
    )


def _rounded(margin: float) -> float:
    return round(margin, 3)


def _distance(margin: float) -> str:
    if _rounded(margin) == 0:
        return "not different (to 0.001) from"
    return f"{abs(margin):.3f} {'above' if margin > 0 else 'below'}"


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
    beaten = [r for r in records if r.teacher_loss is not None and r.teacher_loss > r.loss]
    if beaten:
        pairs = [f"{r.name} ({r.loss:.3f}; teacher {r.teacher_loss:.3f})" for r in beaten]
        found.append(
            f"A teacher's held-out loss is worse than its student's: {_list(pairs)}. Check that "
            "the teacher suits this text."
        )
    for names, cache in find_caches(records):
        found += _warn_of_cache(_list(names), cache)
    for group in groups:
        if group[0].positions < FEW_POSITIONS:
            found.append(
                f"Only {group[0].positions:,} held-out positions: too few to tell runs apart. "
                "Give more documents, or raise dataset.validation_fraction, until there are "
                f"{FEW_POSITIONS:,} or more."
            )
    found += _warn_of_comparisons(records, baseline)
    missing = [r.name for r, log in zip(records, logs, strict=True) if log is None]
    if missing:
        found.append(f"No training log found, so no learning curve drawn: {_list(missing)}.")
    return found


def _list(names: Sequence[str], *, most: int = 4) -> str:
    """Return names as a text; of many, the first ones and how many more."""
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return ", ".join(shown)


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
            f"No margin for {_list(alone)}: no run of type output shares the validation set, "
            "student size, seed and steps."
        )
    unequal = [
        f"{r.name} ({r.trained_tokens:,} tokens; {other.name} {other.trained_tokens:,})"
        for r, other in pairs
        if other and not math.isclose(r.trained_tokens, other.trained_tokens, rel_tol=0.01)
    ]
    if unequal:
        found.append(f"Margins mix two effects where unequal text was seen: {_list(unequal)}.")
    seeds = len({r.seed for r in records})
    if seeds == 1:
        found.append(
            "One seed gives no interval: a small difference may be chance. Other seeds would tell."
        )
    else:
        found.append(f"{seeds} seeds, but each row is one run, not a mean: no interval is given.")
    return found


# The table ----------------------------------------------------------------------------------------


def build_rows(group: Sequence[Record], *, baseline: str | None = None) -> list[Row]:
    """Return the lines of one group's table: its teachers first, then its runs."""
    teachers = find_teachers(group)
    rows = []
    for teacher in teachers:
        name = "teacher" if len(teachers) == 1 else f"teacher {teacher.teacher}"
        loss, ppl = _fixed(teacher.teacher_loss), _perplexity(teacher.teacher_perplexity)
        size = _size(teacher.teacher_parameters)
        rows.append(Row(name, True, ("-", "-", "-", size, loss, ppl, "-", "-", "-")))
    for run in group:
        other = find_baseline(run, group, baseline=baseline)
        cells = (
            run.distillation_type,
            _compact(run.alpha),
            _compact(run.temperature) if run.is_distilled else "-",
            _size(run.student_parameters),
            _fixed(run.loss),
            _perplexity(run.perplexity),
            _fixed(run.kl_to_teacher),
            "-" if run.agreement is None else f"{100 * run.agreement:.1f}",
            "-" if other is None else _signed(run.loss - other.loss),
        )
        rows.append(Row(run.name, False, cells))
    return rows


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _compact(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _signed(value: float) -> str:
    return "0.000" if _rounded(value) == 0 else f"{value:+.3f}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value < 99_999 else f"{value:.2e}"


def _size(count: int | None) -> str:
    """Return a count in at most 7 characters: 54,272 as it is, 1,234,567 as 1.235M."""
    if count is None:
        return "-"
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= bound:
            return f"{count / bound:.4g}{unit}"
    return f"{count:,}"


def _seconds(value: float) -> str:
    """Return a duration as a person says it."""
    if value < 100:
        return f"{value:.1f} s"
    minutes, hours = value / 60, value / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def _kl(value: float) -> str:
    return f"{value:.4f}" if value == 0 or value >= 1e-3 else f"{value:.1e}"


def _name_tail(cache: CacheFacts) -> str:
    return "drawn mass" if cache.method == "sampled" else "tail mass"


def describe_cache(cache: CacheFacts) -> str:
    """Return a cache's facts in one line, each with its unit."""
    return (
        f"{cache.method}, {cache.dial}: {cache.bytes_per_position:.1f} bytes/token, {_name_tail(cache)} "
        f"{cache.tail_mass:.4f}, fidelity KL {_kl(cache.fidelity_kl)} nats, same top token "
        f"{100 * cache.fidelity_agreement:.1f} %, {cache.positions:,} positions"
    )


def render_summary(
    records: Sequence[Record], *, report_path: Path, baseline: str | None = None
) -> str:
    """Return the text at the end of a run: the table, what it means, and where to look next.

    `baseline` names the cross-entropy run of the margins; by default the first that fits each run.
    Lines fit in WIDTH columns, but for paths, which are not broken. Raises ValueError when
    `baseline` is no such run.
    """
    plain = [r.name for r in records if not r.is_distilled]
    if baseline is not None and baseline not in plain:
        names = ", ".join(plain) or "none"
        raise ValueError(f"baseline {baseline!r} is no run of type output; those here: {names}.")
    parts = [_render_group(group, baseline) for group in group_runs(records)]
    facts = [f"cache of {_list(n)}: {describe_cache(cache)}" for n, cache in find_caches(records)]
    facts.append(
        "margin: held-out loss minus that of the cross-entropy run with the same student size, "
        "seed and steps; negative is better. Losses and KL in nats/token."
    )
    notes = [
        f"note: {text}" for text in find_warnings(records, load_logs(records), baseline=baseline)
    ]
    places = [
        f"report: {report_path}",
        "students, each with final/ (the model) and training_log.csv:",
        *(f"  {record.folder}/" for record in records),
    ]
    parts += ["\n".join(map(_wrap, facts)), "\n".join(map(_wrap, notes)), "\n".join(places)]
    return "\n\n".join(parts)


def _render_group(group: Sequence[Record], baseline: str | None) -> str:
    """Return the title, the table and the outcome of one group."""
    rows = build_rows(group, baseline=baseline)
    name_width = min(_NAME_WIDTH, max(len(row.name) for row in rows))
    lines = [
        _align("", [head if sub else "" for head, sub, _ in COLUMNS], name_width),
        _align("run", [sub or head for head, sub, _ in COLUMNS], name_width),
    ]
    lines.append("-" * max(map(len, lines)))
    for row in rows:
        name = row.name
        if len(name) > name_width:  # on a line of its own: a name is never cut
            lines += textwrap.wrap(name, WIDTH)
            name = ""
        lines.append(_align(name, row.cells, name_width))
    outcome = _wrap(describe_outcome(group, baseline=baseline))
    return "\n".join([_wrap(describe_group(group)), "", *lines, "", outcome])


def describe_group(group: Sequence[Record]) -> str:
    """Return what was compared on what."""
    students = f"{len(group)} student{'' if len(group) == 1 else 's'}"
    teachers = ", ".join(str(t.teacher) for t in find_teachers(group))
    names = f"; teacher: {teachers}" if teachers else ""
    heldout = f"{group[0].positions:,} held-out positions of {group[0].documents:,} documents"
    return f"{students} on {heldout}{names}"


def _align(name: str, cells: Sequence[str], name_width: int) -> str:
    """Return one line: the name and the type to the left, numbers to the right of their columns."""
    widths = [width for _, _, width in COLUMNS]
    kind, numbers = (
        cells[0].ljust(widths[0]),
        [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)],
    )
    return "  ".join([name.ljust(name_width), kind, *numbers]).rstrip()


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


# The page -----------------------------------------------------------------------------------------


def write_report(
    records: Sequence[Record], logs: Sequence[TrainingLog | None], out_html: Path, summary_csv: Path
) -> None:
    """Write the page (one file that fetches nothing) and a table of the runs with all digits."""
    source = resources.files("retort").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"typeset": _typeset, "seconds": _seconds, "kl": _kl}
    settings = find_settings(records)
    page = environment.from_string(source).render(
        records=records,
        columns=[[part for part in column[:2] if part] for column in COLUMNS],
        groups=[
            _page_group(group, records, key=f"g{n}-") for n, group in enumerate(group_runs(records))
        ],
        curves=draw_curves(logs, key="c"),
        legend=[(r.name, draw_swatch(i, key=f"s{i}")) for i, r in enumerate(records) if logs[i]],
        caches=find_caches(records),
        warnings=find_warnings(records, logs),
        shared={k: v[0] for k, v in settings.items() if len(set(v)) == 1},
        differing={k: v for k, v in settings.items() if len(set(v)) > 1},
        inks=INKS,
        series=SERIES,
    )
    write_atomically(summary_csv, render_csv(records).encode())
    write_atomically(out_html, page.encode())


def _page_group(
    group: Sequence[Record], records: Sequence[Record], *, key: str
) -> dict[str, object]:
    """Return what the template shows of one group."""
    styles = [index for index, record in enumerate(records) if record in group]
    return {
        "outcome": describe_outcome(group),
        "is_telling": group[0].positions >= FEW_POSITIONS,
        "about": describe_group(group),
        "rows": build_rows(group),
        "has_teacher_line": any(t.teacher_loss is not None for t in find_teachers(group)),
        "panels": draw_comparison(group, styles, key=key),
    }


def _typeset(text: str) -> str:
    """Return a table's cell with a true minus, and an en dash for what is not defined."""
    return "\N{EN DASH}" if text == "-" else text.replace("-", "\N{MINUS SIGN}")
