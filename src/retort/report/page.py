"""The summary (a table for the terminal) and the report page, one file that needs no network, from results of runs.

Equal inputs give equal bytes, in a terminal of equal width.
"""

import base64
import hashlib
import shutil
import textwrap
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

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
)
from retort.report.runs import find_teachers, label_teachers, load_results
from retort.report.samples import build_samples
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
)
from retort.report.templates import list_names, render

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
    groups = [_describe_group(found, group) for _, group in found.settings.groupby("group")]
    for group in groups:
        group["rows"] = "\n".join(render_table(group["table"], width))
    text = render(
        "summary.txt.j2",
        groups=groups,
        texts=describe_texts(found),
        caches=find_caches(found.runs).iterrows(),
        has_distances=bool(found.settings.distance_closed.notna().any()),
        gaps=found.settings[found.settings.gap_closed.notna()].iterrows(),
        scores=render_scoreboard(board),
        warnings=find_warnings(found),
    )
    wrap = partial(textwrap.fill, width=width, subsequent_indent="  ", break_on_hyphens=False)
    lines = [
        *map(wrap, text.rstrip().splitlines()),
        f"\nreport: {report_path}",
        "students, each with final/ (the model) and training_log.csv:",
        *(f"  {folder}/" for folder in found.runs.folder),
    ]
    return "\n".join(lines)


def _describe_group(found: Comparisons, group: pd.DataFrame) -> dict[str, Any]:
    """Return what both the summary and the page show of a group of settings."""
    return {
        "outcome": describe_outcome(found, group),
        "next_best": describe_next_best(found, group),
        "about": describe_group(group),
        "table": build_main_table(found, group),
    }


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
    styles = {name: index for index, name in enumerate(found.settings.index)}
    groups = [
        _page_group(found, group, styles, key=f"g{number}")
        for number, group in found.settings.groupby("group")
    ]
    figures = Figures(found, found.settings, styles, key="c")
    shared, differing = describe_settings(found)
    with_log = found.runs.setting[list(found.results.logs)].unique()
    samples = build_samples(found.results.samples, dict(label_teachers(found.runs)))
    return render(
        "page.html.j2",
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


def _page_group(
    found: Comparisons, group: pd.DataFrame, styles: dict[str, int], *, key: str
) -> dict[str, object]:
    """Return what the template shows of one group."""
    # In the order of their settings.
    order = group.reset_index()[["setting"]]
    runs = found.runs.reset_index().merge(order, how="right").set_index("name")
    figures = Figures(found, group, styles, key)
    return {
        **_describe_group(found, group),
        "is_large": group.positions.iloc[0] >= FEW_POSITIONS,
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


def _script(name: str) -> dict[str, str]:
    """Return a script and its digest: the page's security policy allows only scripts of this digest."""
    text = resources.files("retort.report").joinpath(name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "digest": f"sha256-{digest}"}
