"""The summary (a table for the terminal) and the report page, one file that needs no network, from results of runs.

Equal inputs give equal bytes, in a terminal of equal width.
"""

import base64
import hashlib
import shutil
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
import pandas as pd

from retort.evaluation.scores import METRICS
from retort.io.files import write_atomically
from retort.report.comparisons import Comparisons, compare_runs
from retort.report.figures import Figures
from retort.report.findings import (
    FEW_POSITIONS,
    describe_next_best,
    describe_outcome,
    describe_texts,
    find_caches,
    find_warnings,
    list_names,
)
from retort.report.runs import find_teachers, label_teachers, load_results
from retort.report.samples import build_samples, mark_lines
from retort.report.scoreboard import find_trials, read_scoreboard, render_scoreboard
from retort.report.svg import INKS, SERIES
from retort.report.tables import (
    build_breakdowns,
    build_cache_table,
    build_main_table,
    build_metric_table,
    build_provenance_table,
    build_task_table,
    describe_settings,
    render_table,
    write_kl,
)

WIDTH = 80  # characters of a line, where the terminal's width is not known


def make_report(
    metrics_paths: Sequence[Path], out_html: Path, *, benchmark_paths: Sequence[Path] = ()
) -> str:
    """Write the page, with summary.csv and summary.txt beside it; return the summary, as wide as the terminal.

    Raises ValueError when a file is missing, is not as `evaluate`, `benchmark` or `train` writes it, or has NaN.
    """
    found, board = compare_runs(load_results(metrics_paths)), read_scoreboard(benchmark_paths)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    summary = render_summary(found, board, report_path=out_html)
    write_atomically(out_html.with_name("summary.txt"), (summary + "\n").encode())
    write_atomically(out_html.with_name("summary.csv"), render_csv(found, board).encode())
    # The page is written last: if it exists, so do the other files.
    write_atomically(out_html, render_page(found, board).encode())
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    return render_summary(found, board, report_path=out_html, width=max(width, WIDTH))


def render_csv(found: Comparisons, board: pd.DataFrame) -> str:
    """Return the table of runs with all digits; empty cells are undefined; _low and _high are ends of intervals."""
    scores = board[~board.is_teacher].pivot(index="model", columns="metric", values="value")
    table = found.runs.drop(columns=["folder", "group"]).join(scores)
    text: str = table.to_csv(lineterminator="\n")
    return text


def render_summary(
    found: Comparisons, board: pd.DataFrame, *, report_path: Path, width: int = WIDTH
) -> str:
    """Return the text of the summary: the tables, what they mean, warnings, and paths.

    Lines have at most `width` characters, except for paths.
    """

    def wrap(lines: Sequence[str]) -> str:
        return "\n".join(
            textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False)
            for line in lines
        )

    parts = []
    for _, group in found.settings.groupby("group"):
        outcome = [describe_outcome(found, group), describe_next_best(found, group) or ""]
        table = render_table(build_main_table(found, group), width)
        parts += [
            wrap([describe_group(group)]),
            "\n".join(table),
            wrap([text for text in outcome if text]),
        ]
    caches = find_caches(found.runs).iterrows()
    facts = describe_texts(found)
    facts += [f"cache of {names}: {describe_cache(cache)}" for names, cache in caches]
    facts.append(
        "margin: held-out loss minus that of the cross-entropy run of the same text, student and settings of training "
        "except for the loss; negative is better. Losses and KL are in nats/token. After \u00b1: distance to the "
        "farther end of the 95 % interval: with one seed over held-out documents, with more over the seeds. "
        "summary.csv has every run and all columns."
    )
    if found.settings.distance_closed.notna().any():
        facts.append(
            "closed %: share of the distance from the loss of the cross-entropy run to the teacher's that distillation "
            "closed; a dash where the gain is not clear."
        )
    facts += [
        f"{name} closes {_percent(row)} of the gap between cross-entropy and training on the teacher's full "
        "distributions."
        for name, row in found.settings[found.settings.gap_closed.notna()].iterrows()
    ]
    notes = [f"note: {text}" for text in find_warnings(found)]
    paths = [
        f"report: {report_path}",
        "students, each with final/ (the model) and training_log.csv:",
        *(f"  {folder}/" for folder in found.runs.folder),
    ]
    return "\n\n".join(
        [*parts, wrap(facts + render_scoreboard(board)), wrap(notes), "\n".join(paths)]
    )


def describe_cache(cache: pd.Series) -> str:
    """Return a cache's size and quality in one line."""
    tail = "sampled mass" if cache.cache_method == "sampled" else "tail mass"
    parts = [
        f"{cache.cache_method}, {cache.cache_dial}: {cache.cache_bytes_per_position:.1f} bytes/position"
    ]
    if pd.notna(cache.cache_fidelity_kl):
        parts += [
            f"{tail} {cache.cache_tail_mass:.4f}",
            f"fidelity KL {write_kl(cache.cache_fidelity_kl)} nats",
            f"same top token {100 * cache.cache_fidelity_agreement:.1f} %",
        ]
    return ", ".join([*parts, f"{cache.cache_positions:,} positions"])


def _percent(row: pd.Series) -> str:
    low, high = row.gap_closed_low, row.gap_closed_high
    return (
        f"{100 * row.gap_closed:.0f} % (95 % over {row.basis}: {100 * low:.0f} to {100 * high:.0f})"
    )


def describe_group(group: pd.DataFrame) -> str:
    """Return the number of students, the size of the held-out text and the teachers."""
    count = int(group.seeds.sum())
    of = f" of {len(group)} settings" if count > len(group) else ""
    students = f"{count} student{'' if count == 1 else 's'}{of}"
    teachers = ", ".join(find_teachers(group).teacher)
    names = f"; teacher: {teachers}" if teachers else ""
    heldout = (
        f"{group.positions.iloc[0]:,} held-out positions of {group.documents.iloc[0]:,} documents"
    )
    return f"{students} on {heldout}{names}"


# The page -----------------------------------------------------------------------------------------


def render_page(found: Comparisons, board: pd.DataFrame) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"typeset": _typeset, "lines": mark_lines}
    styles = {name: index for index, name in enumerate(found.settings.index)}
    groups = [
        _page_group(found, group, styles, key=f"g{number}")
        for number, group in found.settings.groupby("group")
    ]
    figures = Figures(found, found.settings, styles, key="c")
    shared, differing = describe_settings(found)
    with_log = found.runs.setting[list(found.results.logs)].unique()
    samples = build_samples(found.results.samples, dict(label_teachers(found.runs)))
    page: str = environment.from_string(_read_resource("page.html.j2")).render(
        groups=groups,
        has_seeds=bool((found.settings.seeds > 1).any()),
        num_runs=len(found.runs),
        curves=figures.draw_curves(),
        legend=figures.make_legend([s for s in styles if s in with_log]),
        samples=samples,
        without_samples=[name for name, known in found.results.samples.items() if not known],
        script=_script("page.js"),
        texts=describe_texts(found),
        caches=build_cache_table(find_caches(found.runs)),
        warnings=find_warnings(found),
        benchmarks=build_task_table(board),
        trials=find_trials(board),
        provenance=build_provenance_table(found.runs),
        shared=shared,
        differing=differing,
        inks=INKS,
        series=SERIES,
    )
    return page


def _page_group(
    found: Comparisons, group: pd.DataFrame, styles: dict[str, int], *, key: str
) -> dict[str, object]:
    """Return what the template shows of one group."""
    # In the order of their settings.
    order = group.reset_index()[["setting"]]
    runs = found.runs.reset_index().merge(order, how="right").set_index("name")
    figures = Figures(found, group, styles, key)
    return {
        "outcome": describe_outcome(found, group),
        "next_best": describe_next_best(found, group),
        "is_large": group.positions.iloc[0] >= FEW_POSITIONS,
        "about": describe_group(group),
        "table": build_main_table(found, group),
        "has_teacher_line": bool(find_teachers(group).loss.notna().any()),
        "panels": figures.draw_comparison(),
        "sweeps": figures.draw_sweeps(),
        "metrics": build_metric_table(found, group),
        "runs": build_metric_table(found, runs, of="run"),
        "missing": _explain_missing(found, list(runs.index)),
        "costs": figures.draw_costs(),
        "legend": figures.make_legend(group.index),
        "reliability": figures.draw_reliability(),
        "breakdowns": build_breakdowns(found, group),
    }


def _explain_missing(found: Comparisons, runs: Sequence[str]) -> list[str]:
    """Return a sentence for each reason why runs lack metrics."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        reasons = pd.Series(found.results.metrics[run].scores.not_defined, dtype=object)
        for reason, names in reasons.groupby(reasons).groups.items():
            titles = ", ".join(METRICS[n].title if n in METRICS else n for n in names)
            lacking.setdefault((str(reason), titles), []).append(run)
    return [f"{list_names(n)}: no {titles}, because {why}." for (why, titles), n in lacking.items()]


def _read_resource(name: str) -> str:
    return resources.files("retort.report").joinpath(name).read_text(encoding="utf-8")


def _script(name: str) -> dict[str, str]:
    """Return a script and its digest: the page's security policy allows only scripts of this digest."""
    text = _read_resource(name)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "digest": f"sha256-{digest}"}


def _typeset(text: str) -> str:
    """Return the text of a cell with a minus sign for a hyphen, and an en dash for an undefined value."""
    if text == "-":
        return "\N{EN DASH}"
    return text.replace("-", "\N{MINUS SIGN}") if text[:1] in "+-0123456789" else text
