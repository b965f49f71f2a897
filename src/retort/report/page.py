"""The summary (a table for the terminal) and the report page, one file that needs no network, from records of runs.

The *margin* of a distilled run is its held-out loss minus its baseline's (see `records`): negative is better. Undefined
values are a dash. Equal inputs give equal bytes.
"""

import base64
import hashlib
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2

from retort.evaluation.intervals import Estimate
from retort.evaluation.scores import METRICS
from retort.io.files import write_atomically
from retort.report.comparisons import compare_with_baseline, render_csv
from retort.report.curves import draw_curves
from retort.report.figures import draw_comparison, draw_costs, draw_reliability
from retort.report.findings import (
    FEW_POSITIONS,
    describe_next_best,
    describe_outcome,
    find_warnings,
    list_names,
)
from retort.report.records import (
    Record,
    TrainingLog,
    find_caches,
    find_settings,
    find_teachers,
    group_runs,
    load_logs,
    load_metrics,
    load_samples,
)
from retort.report.scoreboard import Scoreboard, read_scoreboard, render_scoreboard
from retort.report.seeds import average_seeds
from retort.report.svg import INKS, SERIES, draw_swatch
from retort.report.tables import (
    COLUMNS,
    build_breakdowns,
    build_metric_table,
    build_rows,
    build_samples,
    build_seed_table,
    build_task_table,
    describe_seeds,
    format_cache,
    format_kl,
    format_seconds,
    mark_lines,
    sort_key,
)

WIDTH = 100  # characters of the summary's lines
_NAME_WIDTH = WIDTH - sum(width + 2 for _, _, width in COLUMNS)


def make_report(
    metrics_paths: Sequence[Path], out_html: Path, *, benchmark_paths: Sequence[Path] = ()
) -> str:
    """Write the page, with summary.csv and summary.txt beside it; return the text of summary.txt.

    Raises ValueError when a file is missing, is not as `evaluate`, `benchmark` or `train` writes it, or has NaN.
    """
    records = load_metrics(metrics_paths)
    board = read_scoreboard(benchmark_paths)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    summary = render_summary(records, report_path=out_html, board=board)
    write_atomically(out_html.with_name("summary.txt"), (summary + "\n").encode())
    # The page is written last: if it exists, so do the other files.
    summary_csv = out_html.with_name("summary.csv")
    write_report(records, load_logs(records), out_html, summary_csv, board=board)
    return summary


def render_summary(
    records: Sequence[Record],
    *,
    report_path: Path,
    baseline: str | None = None,
    board: Scoreboard | None = None,
) -> str:
    """Return the text of the summary: the tables, what they mean, warnings, and paths.

    `baseline` names the cross-entropy run for the margins; by default the one that matches each run. Lines have at most
    WIDTH characters, except for paths. Raises ValueError when `baseline` is not a cross-entropy run.
    """
    plain = [r.name for r in records if not r.is_distilled]
    if baseline is not None and baseline not in plain:
        names = ", ".join(plain) or "none"
        raise ValueError(
            f"baseline {baseline!r} is not a run of type output. Choose one of: {names}."
        )
    parts = [_render_group(group, baseline) for group in group_runs(records)]
    facts = [
        f"cache of {list_names(n)}: {format_cache(cache)}" for n, cache in find_caches(records)
    ]
    facts.append(
        "margin: held-out loss minus that of the cross-entropy run with the same settings of student and training "
        "except for the loss; negative is better. Losses and KL are in nats/token. After \u00b1: distance to the "
        "farther end of the 95 % interval over held-out documents."
    )
    facts += [
        f"{run.name} closes {_percent(found.gap_closed)} of the gap between cross-entropy and training on the "
        "teacher's full distributions."
        for run in records
        if (found := compare_with_baseline(run, records)) and found.gap_closed
    ]
    facts += [f"{describe_seeds(mean)}." for mean in average_seeds(records)]
    facts += render_scoreboard(board) if board else []
    notes = [
        f"note: {text}" for text in find_warnings(records, load_logs(records), baseline=baseline)
    ]
    paths = [
        f"report: {report_path}",
        "students, each with final/ (the model) and training_log.csv:",
        *(f"  {record.folder}/" for record in records),
    ]
    parts += ["\n".join(map(_wrap, facts)), "\n".join(map(_wrap, notes)), "\n".join(paths)]
    return "\n\n".join(parts)


def _percent(share: Estimate) -> str:
    low, high = share.ends or (share.value, share.value)
    return f"{100 * share.value:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


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
    outcome = [describe_outcome(group, baseline=baseline)]
    if next_best := describe_next_best(group, baseline=baseline):
        outcome.append(next_best)
    return "\n".join([_wrap(describe_group(group)), "", *lines, "", *map(_wrap, outcome)])


def describe_group(group: Sequence[Record]) -> str:
    """Return the number of students, the size of the held-out text and the teachers."""
    students = f"{len(group)} student{'' if len(group) == 1 else 's'}"
    teachers = ", ".join(str(t.teacher) for t in find_teachers(group))
    names = f"; teacher: {teachers}" if teachers else ""
    heldout = f"{group[0].positions:,} held-out positions of {group[0].documents:,} documents"
    return f"{students} on {heldout}{names}"


def _align(name: str, cells: Sequence[str], name_width: int) -> str:
    """Return one line: the name and the type left-aligned, numbers right-aligned."""
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
    records: Sequence[Record],
    logs: Sequence[TrainingLog | None],
    out_html: Path,
    summary_csv: Path,
    *,
    board: Scoreboard | None = None,
) -> None:
    """Write the page, and a CSV of the runs with all digits."""
    source = _read_resource("page.html.j2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "typeset": _typeset,
        "seconds": format_seconds,
        "kl": format_kl,
        "sort_key": sort_key,
        "lines": mark_lines,
    }
    settings = find_settings(records)
    samples = load_samples(records)
    page = environment.from_string(source).render(
        records=records,
        columns=[[part for part in column[:2] if part] for column in COLUMNS],
        groups=[
            _page_group(group, records, key=f"g{n}-") for n, group in enumerate(group_runs(records))
        ],
        curves=draw_curves(logs, key="c"),
        legend=[(r.name, draw_swatch(i, key=f"s{i}")) for i, r in enumerate(records) if logs[i]],
        samples=build_samples(records, samples),
        without_samples=[r.name for r, found in zip(records, samples, strict=True) if not found],
        script=_script("page.js"),
        caches=find_caches(records),
        warnings=find_warnings(records, logs),
        benchmarks=build_task_table(board) if board and board.rows else None,
        trials=board.trials if board else [],
        shared={k: v[0] for k, v in settings.items() if len(set(v)) == 1},
        differing={k: v for k, v in settings.items() if len(set(v)) > 1},
        inks=INKS,
        series=SERIES,
    )
    write_atomically(summary_csv, render_csv(records).encode())
    write_atomically(out_html, page.encode())


def _read_resource(name: str) -> str:
    return resources.files("retort.report").joinpath(name).read_text(encoding="utf-8")


def _script(name: str) -> dict[str, str]:
    """Return a script and its digest: the page's security policy allows only scripts of this digest."""
    text = _read_resource(name)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "digest": f"sha256-{digest}"}


def _page_group(
    group: Sequence[Record], records: Sequence[Record], *, key: str
) -> dict[str, object]:
    """Return what the template shows of one group."""
    styles = [index for index, record in enumerate(records) if record in group]
    return {
        "outcome": describe_outcome(group),
        "next_best": describe_next_best(group),
        "has_enough_positions": group[0].positions >= FEW_POSITIONS,
        "about": describe_group(group),
        "rows": build_rows(group),
        "has_teacher_line": any(t.teacher_loss is not None for t in find_teachers(group)),
        "panels": draw_comparison(group, styles, key=key),
        "metrics": build_metric_table(group),
        "missing": _explain_missing(group),
        "costs": draw_costs(group, styles, key=f"q{key}"),
        "legend": [
            (r.name, draw_swatch(style, key=f"l{key}{style}"))
            for r, style in zip(group, styles, strict=True)
        ],
        "reliability": draw_reliability(group, styles, key=f"r{key}"),
        "breakdowns": build_breakdowns(group),
        "seeds": build_seed_table(means) if (means := average_seeds(group)) else None,
    }


def _explain_missing(group: Sequence[Record]) -> list[str]:
    """Return a sentence for each reason why runs lack metrics."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for record in group:
        by_reason: dict[str, list[str]] = {}
        for name, reason in record.not_defined.items():
            by_reason.setdefault(reason, []).append(
                METRICS[name].title if name in METRICS else name
            )
        for reason, titles in by_reason.items():
            lacking.setdefault((reason, ", ".join(titles)), []).append(record.name)
    return [f"{list_names(n)}: no {titles}, because {why}." for (why, titles), n in lacking.items()]


def _typeset(text: str) -> str:
    """Return the text of a cell with a minus sign for a hyphen, and an en dash for an undefined value."""
    return "\N{EN DASH}" if text == "-" else text.replace("-", "\N{MINUS SIGN}")
