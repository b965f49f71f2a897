"""Made-up results of runs in the workflow's layout, and what tests read from a report of them."""

import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from retort.evaluation.intervals import DocumentSums, Estimate
from retort.evaluation.records import Metrics
from retort.evaluation.scores import write_document_sums
from retort.report.comparisons import Comparisons, compare_runs
from retort.report.findings import find_warnings
from retort.report.page import WIDTH, describe_results, make_report, render_summary
from retort.report.runs import load_results
from retort.report.scoreboard import read_scoreboard
from retort.report.tables import build_main_table
from support.records import (
    LOSS,
    make_manifest,
    make_metrics,
    make_run_record,
    make_scores,
    make_training_record,
)

LOG_HEAD = "step,total_loss,hard_loss,soft_loss,perplexity,learning_rate,tokens_per_second"
_OF_METRICS = ("teacher", "teacher_parameters", "cache")


def _take(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove the values whose names begin with a prefix, and return them without it."""
    return {k.removeprefix(prefix): values.pop(k) for k in list(values) if k.startswith(prefix)}


def make_run(name: str, kind: str = "hybrid", *, number: int = 0, **changes: Any) -> Metrics:
    """Return the metrics of a run; `changes` replace values of it, of its training, and of its sections.

    Those of a section are given as validation__loss=..., teacher_validation__loss=... and cache__tail_mass=...;
    `trained` is {"commit": ...} with the sections of the config that were trained with.
    """
    of_teacher = {f"teacher_{k}": v for k, v in _take(changes, "teacher_validation__").items()}
    measured = _take(changes, "validation__") | of_teacher
    cached = {key.removeprefix("fidelity_"): v for key, v in _take(changes, "cache__").items()}
    of_file = {key: measured.pop(key) for key in list(measured) if key in Metrics.model_fields}
    of_file |= {key: changes.pop(key) for key in list(changes) if key in _OF_METRICS}
    if (trained := changes.pop("trained", None)) is not None:
        commit = {"commit": trained.pop("commit")} if "commit" in trained else {}
        of_file["trained"] = make_run_record(trained, **commit) if trained or commit else None
    given = {"training_seconds": "seconds", "teacher_weights": "teacher"}
    training = {given.get(key, key): value for key, value in changes.items()}
    record = make_training_record(name, kind, **({"id": f"{number:012x}"} | training))
    has_teacher = of_file.get("teacher", "") is not None
    scores = make_scores(**({"loss": LOSS[kind]} | measured), has_teacher=has_teacher)
    if record.distillation_type != "output" or kind != "output":
        of_file.setdefault("cache", make_manifest(**cached))
    return make_metrics(record, **({"scores": scores, "cache": None} | of_file))


def write_run(folder: Path, name: str, kind: str = "hybrid", **changes: Any) -> Path:
    """Write metrics.json (see `make_run`) and a log of 40 rows as the workflow does; return the path of the first."""
    number = len(list(folder.glob("runs/*")))
    metrics = make_run(name, kind, number=number, **changes)
    run = folder / "runs" / f"run{number}" / metrics.training.id
    path = run / "evaluation" / "0123456789ab" / "metrics.json"
    metrics.write(path)
    losses = [3 + 4 * math.exp(-step / 60) for step in range(10, 401, 10)]
    rows = [f"{10 * i},{x},{x},,{math.exp(x)},1e-4,28000" for i, x in enumerate(losses, start=1)]
    (run / "training_log.csv").write_text("\n".join([LOG_HEAD, *rows]) + "\n", encoding="utf-8")
    return path


def write_demo(folder: Path) -> list[Path]:
    """Write the demo's three runs."""
    return [write_run(folder, kind, kind) for kind in ("output", "logit", "hybrid")]


def write_trained(
    folder: Path, name: str, kind: str = "hybrid", loss: float = 3.2, **training: Any
) -> Path:
    """Write a run with these settings of training, all others at their defaults."""
    return write_run(
        folder, name, kind, validation__loss=loss, trained={"training": {"alpha": 0.5} | training}
    )


def without_teacher() -> dict[str, Any]:
    """Return the changes that make a run one without a teacher."""
    return {"teacher": None, "teacher_parameters": None}


def write_losses(path: Path, gain: float, *, noise: float = 0.01) -> None:
    """Write documents.csv of 50 documents: about 3 nats/token less `gain`, the same for all runs except for noise.

    Their mean becomes the loss in metrics.json.
    """
    rng = np.random.default_rng(round(1000 * gain))
    positions = np.random.default_rng(0).integers(500, 2000, 50).astype(float)
    own = np.random.default_rng(1).normal(3, 0.4, 50)
    sums = DocumentSums(np.arange(50))
    sums.add("positions", positions)
    losses = positions * (own - gain + rng.normal(0, noise, 50))
    sums.add("loss", losses)
    write_document_sums(path.with_name("documents.csv"), sums)
    metrics = Metrics.read(path)
    scores = metrics.scores
    loss = Estimate(float(losses.sum() / positions.sum()), None, None)
    card = scores.student.model_copy(update={"metrics": scores.student.metrics | {"loss": loss}})
    scores = scores.model_copy(update={"student": card})
    metrics.model_copy(update={"scores": scores}).write(path)


def write_measured(folder: Path, gains: dict[str, float], **options: Any) -> list[Path]:
    """Write runs with documents.csv; "output" is cross-entropy and "full" has the teacher's full distributions."""
    paths = []
    for name, gain in gains.items():
        full = {"cache__top_k": 300, "cache__tail_mass": 1e-13} if name == "full" else {}
        kind = {"output": "output", "full": "logit"}.get(name, "hybrid")
        paths.append(write_run(folder, name, kind, **({"temperature": 1.0} | full)))
        write_losses(paths[-1], gain, **options)
    return paths


def render_page(folder: Path, paths: list[Path], **options: Any) -> str:
    """Return the page of the runs."""
    make_report(paths, folder / "report.html", **options)
    return (folder / "report.html").read_text(encoding="utf-8")


def compare(paths: Sequence[Path]) -> Comparisons:
    """Return the runs and settings of the results."""
    return compare_runs(load_results(paths))


def summarise(paths: Sequence[Path], width: int = WIDTH, benchmarks: Sequence[Path] = ()) -> str:
    """Return the summary of the results."""
    shown = describe_results(compare(paths), read_scoreboard(benchmarks))
    return render_summary(shown, report_path=Path("results/report.html"), width=width)


def find_all_warnings(paths: Sequence[Path]) -> str:
    """Return all warnings as one text."""
    return " ".join(find_warnings(compare(paths)))


def find_rows(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Return the texts of the main table's cells by name and key, in the order of the rows."""
    found = compare(paths)
    table = build_main_table(found, found.settings)
    keys = [column.key for column in table.columns]
    return {
        name: dict(zip(keys, [cell.text for cell in cells], strict=True))
        for name, _, cells in table.rows
    }


def find_table(summary: str) -> list[str]:
    """Return the first table's lines below the rule, up to the blank line."""
    lines = summary.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    return lines[start : lines.index("", start)]


def check_alignment(
    folder: Path, names: list[str], loss: float, parameters: int, width: int
) -> None:
    """Check that the columns of a summary align, that no line is longer than `width`, and names are complete."""
    changes: dict[str, Any] = {
        "validation__loss": loss,
        "validation__perplexity": math.exp(loss),
        "student_parameters": parameters,
    }
    summary = summarise([write_run(folder, name, **changes) for name in names], width)
    lines = summary.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    head, rows = lines[start - 1], lines[start + 1 : lines.index("", start)]
    assert max(map(len, [head, *rows])) <= width, summary
    # A name may take several lines; on its first are the cells, each of which ends where its head does.
    ends = [found.end() for found in re.finditer(r"agree %|\S+", head)][1:]
    whole = [row for row in rows if row[ends[0] - 1 :].strip()]
    assert len(whole) == 1 + len(names), summary
    for row in whole:
        for end in ends:
            is_left = head[:end].endswith("type")
            assert is_left or (row[end - 1] != " " and row[end : end + 1] in ("", " ")), summary
    texts = "".join(row.split()[0] for row in rows)
    assert all(name in texts for name in names), summary
    text = summary[: summary.index("report: ")].splitlines()  # paths follow, which may be long
    assert all(len(line) <= width for line in text if not any(name in line for name in names))


class PageParser(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
