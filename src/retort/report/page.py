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
from retort.report import findings, tables
from retort.report.comparisons import Comparisons, compare_runs
from retort.report.estimated import Records, compare_with_estimate
from retort.report.figures import Figures
from retort.report.runs import find_teachers, label_teachers, load_results
from retort.report.samples import build_samples
from retort.report.scoreboard import read_scoreboard
from retort.report.svg import INKS, SERIES
from retort.report.templates import list_names, render

WIDTH = 80  # characters of a line, where the terminal's width is not known


def make_report(
    metrics_paths: Sequence[Path],
    out_html: Path,
    *,
    benchmark_paths: Sequence[Path] = (),
    estimated: Records | None = None,
) -> str:
    """Write the page, with summary.csv and summary.txt beside it; return the summary, as wide as the terminal.

    estimated: what the estimate of the config is compared with, None without one.
    Raises ValueError when a file is missing, is not as `evaluate`, `benchmark` or `train` writes it, or has NaN.
    """
    found, board = compare_runs(load_results(metrics_paths)), read_scoreboard(benchmark_paths)
    shown = describe_results(found, board, estimated)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    summary = render_summary(shown, report_path=out_html)
    write_atomically(out_html.with_name("summary.txt"), (summary + "\n").encode())
    write_atomically(out_html.with_name("summary.csv"), render_csv(found, board).encode())
    # The page is written last: if it exists, so do the other files.
    write_atomically(out_html, render_page(found, shown).encode())
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    return render_summary(shown, report_path=out_html, width=max(width, WIDTH))


def render_csv(found: Comparisons, board: pd.DataFrame) -> str:
    """Return the table of runs with all digits; empty cells are undefined; _low and _high are ends of intervals."""
    scores = board[~board.is_teacher].pivot(index="model", columns="metric", values="value")
    table = found.runs.drop(columns=["folder", "group"]).join(scores)
    return str(table.to_csv(lineterminator="\n"))


def describe_results(
    found: Comparisons, board: pd.DataFrame, estimated: Records | None = None
) -> dict[str, Any]:
    """Return what both the summary and the page show, by its name in their templates."""
    return {
        "runs": found.runs,
        "settings": found.settings,
        "groups": [_describe_group(found, group) for _, group in found.settings.groupby("group")],
        "texts": findings.describe_texts(found),
        "caches": findings.find_caches(found.runs),
        "warnings": findings.find_warnings(found),
        "board": board,
        "estimated": compare_with_estimate(estimated, found.results.metrics),
        "trials": sorted(set(board.trial) - {""}),
    }


def _describe_group(found: Comparisons, group: pd.DataFrame) -> dict[str, Any]:
    """Return the sentences on a group of settings and its main table."""
    first, count = group.iloc[0], int(group.seeds.sum())
    students = f"{count} student{'' if count == 1 else 's'}"
    students += f" of {len(group)} settings" if count > len(group) else ""
    heldout = f"{first.positions:,} held-out positions of {first.documents:,} documents"
    teachers = ", ".join(find_teachers(group).teacher)
    return {
        "settings": group,
        "about": f"{students} on {heldout}" + (teachers and f"; teacher: {teachers}"),
        "outcome": findings.describe_outcome(found, group),
        "next_best": findings.describe_next_best(found, group),
        "table": tables.build_main_table(found, group),
    }


def render_summary(shown: dict[str, Any], *, report_path: Path, width: int = WIDTH) -> str:
    """Return the text of the summary: the tables, what they mean, warnings, and paths.

    Lines have at most `width` characters, except for paths.
    """
    rows = [tables.render_table(group["table"], width) for group in shown["groups"]]
    text = render("summary.txt.j2", rows=rows, **shown)
    wrap = partial(textwrap.fill, width=width, subsequent_indent="  ", break_on_hyphens=False)
    lines = [
        *map(wrap, text.rstrip().splitlines()),
        f"\nreport: {report_path}",
        "students, each with final/ (the model) and training_log.csv:",
        *(f"  {folder}/" for folder in shown["runs"].folder),
    ]
    return "\n".join(lines)


# The page -----------------------------------------------------------------------------------------


def render_page(found: Comparisons, shown: dict[str, Any]) -> str:
    """Return the page."""
    styles = {name: index for index, name in enumerate(found.settings.index)}
    figures = Figures(found, found.settings, styles, key="c")
    shared, differing = tables.describe_settings(found)
    with_log = found.runs.setting[list(found.results.logs)].unique()
    # The page's security policy allows only scripts of this digest.
    script = resources.files("retort.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = [
        group
        | _describe_for_page(
            found, group["settings"], Figures(found, group["settings"], styles, f"g{number}")
        )
        for number, group in enumerate(shown["groups"])
    ]
    of_page = {
        "groups": groups,
        "has_seeds": bool((found.settings.seeds > 1).any()),
        "curves": figures.draw_watched() + figures.draw_curves(),
        "is_watched": bool(found.results.watched),
        "legend": figures.make_legend([s for s in styles if s in with_log]),
        "samples": build_samples(found.results.samples, dict(label_teachers(found.runs))),
        "without_samples": [n for n, known in found.results.samples.items() if not known],
        "script": script,
        "digest": digest,
        "caches": tables.Table(shown["caches"], tables.TABLES["caches"], "runs"),
        "benchmarks": tables.build_task_table(shown["board"]),
        "estimated": tables.Table(
            shown["estimated"].set_index("subject"), tables.TABLES["estimated"], "what"
        ),
        "provenance": tables.Table(found.runs, tables.TABLES["provenance"], "run"),
        "shared": shared,
        "differing": differing,
        "inks": INKS,
        "series": SERIES,
        "definitions": [column for column in tables.COLUMNS if column.term],
    }
    return render("page.html.j2", **shown | of_page)


def _describe_for_page(
    found: Comparisons, group: pd.DataFrame, figures: Figures
) -> dict[str, object]:
    """Return what only the page shows of one group."""
    # In the order of their settings.
    order = group.reset_index()[["setting"]]
    runs = found.runs.reset_index().merge(order, how="right").set_index("name")
    return {
        "is_large": group.positions.iloc[0] >= findings.FEW_POSITIONS,
        "has_teacher_line": bool(find_teachers(group).loss.notna().any()),
        "panels": figures.draw_comparison(),
        "sweeps": figures.draw_sweeps(),
        "metrics": tables.build_metric_table(found, group),
        "runs": tables.build_metric_table(found, runs, of="run"),
        "missing": _explain_missing(found, list(runs.index)),
        "costs": figures.draw_costs(),
        "legend": figures.make_legend(group.index),
        "reliability": figures.draw_reliability(),
        "breakdowns": tables.build_breakdowns(found, group),
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
