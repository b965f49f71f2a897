"""Made-up results of runs in the workflow's layout, and what tests read from a report of them."""

import json
import math
import re
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from retort.evaluation.intervals import DocumentSums
from retort.evaluation.scores import METRICS, OF_BOTH, write_document_sums
from retort.report.findings import find_warnings
from retort.report.page import WIDTH, make_report, render_summary
from retort.report.records import load_logs, load_metrics
from retort.report.tables import COLUMNS

LOG_HEAD = "step,total_loss,hard_loss,soft_loss,perplexity,learning_rate,tokens_per_second"
MARGIN = -1  # index in a row's cells


def _make_bin(confidence: float, accuracy: float) -> dict[str, Any]:
    ends = {"low": accuracy - 0.02, "high": accuracy + 0.03}
    return {"positions": 300, "confidence": confidence, "accuracy": accuracy} | ends


def _make_class(name: str, loss: float) -> dict[str, Any]:
    metrics = {"loss": loss, "teacher_loss": loss - 0.5, "kl_to_teacher": 0.4}
    counts = {"class": name, "positions": 32_768, "documents": 300}
    return counts | metrics | {"intervals": {n: [v - 0.1, v + 0.1] for n, v in metrics.items()}}


def _make_scores(kind: str) -> dict[str, Any]:
    """Return the sections of metrics.json that `scores` makes."""
    return {
        "validation": {
            "loss": {"output": 3.294, "logit": 3.226, "hybrid": 3.213}[kind],
            "perplexity": 24.9,
            "positions": 65_536,
            "documents": 412,
            "content": "c0ffee",
            "sequences": 500,
            "leaked_sequences": 0,
            "kl_to_teacher": 0.5,
            "agreement": 0.431,
            "bits_per_byte": 1.21,
            "reverse_kl": 0.61,
            "overlap": 0.6,
            "acceptance": 0.72,
            "accuracy": 0.4,
            "calibration_error": 0.02,
        },
        "teacher_validation": {"loss": 2.752, "perplexity": 15.674, "bits_per_byte": 1.0},
        "intervals": {
            "validation": dict.fromkeys(METRICS) | {"agreement": [0.42, 0.44]},
            "teacher_validation": dict.fromkeys(METRICS),
        },
        "not_defined": {},
        "reliability": {
            "student": [_make_bin(0.2, 0.25), _make_bin(0.7, 0.6)],
            "teacher": [_make_bin(0.5, 0.5)],
        },
        "breakdown": {
            "language": [_make_class("de", 2.5), _make_class("en", 3.4)],
            "place": [_make_class("1 to 15", 4.0), _make_class("from 1,024", 3.0)],
        },
    }


_CACHE = {
    "bytes_per_position": 131.25,
    "positions": 1_843_200,
    "method": "top_k",
    "top_k": 64,
    "tail_mass": 0.0182,
    "fidelity_kl": 3.1e-5,
    "fidelity_agreement": 0.9991,
}


def write_run(folder: Path, name: str, kind: str = "hybrid", **changes: Any) -> Path:
    """Write metrics.json and a log of 40 rows in the workflow's layout; return the path of metrics.json.

    `changes` replace keys; those of a section are given as section__key=...
    """
    number = len(list(folder.glob("runs/*")))
    metrics: dict[str, Any] = {
        "format": "retort-metrics",
        "version": 2,
        "run": name,
        "id": f"{number:012x}",
        "distillation_type": kind,
        "alpha": {"output": 1.0, "logit": 0.0, "hybrid": 0.5}[kind],
        "temperature": 2.0,
        "seed": 0,
        "student_parameters": 54_272,
        "teacher_parameters": 1_312_256,
        "teacher": "demo",
        "steps": 400,
        "trained_tokens": 1_638_400,
        "training_seconds": 71.25,
        "device": "cpu",
        **_make_scores(kind),
        "trained": {"commit": "0123456789abcdef", "training": {"alpha": 0.5}},
        "cache": None if kind == "output" else dict(_CACHE),
    }
    for key, value in changes.items():
        section, _, inner = key.rpartition("__")
        (metrics[section] if section else metrics)[inner] = value
    run = folder / "runs" / f"run{number}" / str(metrics["id"])
    path = run / "evaluation" / "0123456789ab" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(metrics), encoding="utf-8")
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
    section: dict[str, Any] = {f"validation__{name}": None for name in OF_BOTH}
    section["not_defined"] = dict.fromkeys(OF_BOTH, "there is no teacher to compare with")
    section["breakdown"] = {}
    section["reliability__teacher"] = None
    return {"teacher": None, "teacher_parameters": None, "teacher_validation": None} | section


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
    metrics = json.loads(path.read_text())
    metrics["validation"]["loss"] = losses.sum() / positions.sum()
    path.write_text(json.dumps(metrics))


def write_measured(folder: Path, gains: dict[str, float], **options: Any) -> list[Path]:
    """Write runs with documents.csv; "output" is cross-entropy and "full" has the teacher's full distributions."""
    paths = []
    for name, gain in gains.items():
        full = {"cache__top_k": 300, "cache__tail_mass": 1e-13} if name == "full" else {}
        kind = {"output": "output", "full": "logit"}.get(name, "hybrid")
        paths.append(write_run(folder, name, kind, **({"temperature": 1.0} | full)))
        write_losses(paths[-1], gain, **options)
    return paths


def render_page(folder: Path, paths: list[Path]) -> str:
    """Return the page of the runs."""
    make_report(paths, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def find_all_warnings(paths: list[Path]) -> str:
    """Return all warnings as one text."""
    records = load_metrics(paths)
    return " ".join(find_warnings(records, load_logs(records)))


def find_table(summary: str) -> list[str]:
    """Return the first table's lines below the rule, up to the blank line."""
    lines = summary.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    return lines[start : lines.index("", start)]


def check_alignment(folder: Path, names: list[str], loss: float, parameters: int) -> None:
    """Check that the columns of a summary align, that lines have at most WIDTH characters, and names are complete."""
    changes: dict[str, Any] = {
        "validation__loss": loss,
        "validation__perplexity": math.exp(loss),
        "student_parameters": parameters,
    }
    records = load_metrics([write_run(folder, name, **changes) for name in names])
    summary = render_summary(records, report_path=Path("report.html"))
    lines = find_table(summary)
    width = max(len(line) for line in lines)
    assert width <= WIDTH
    name_lines = {part for name in names for part in textwrap.wrap(name, WIDTH)}
    rows = [line for line in lines if line not in name_lines and len(line) == width]
    # The margin, the last column, ends at the same place in the teacher's row and all others.
    assert len(rows) == 1 + len(records), summary
    end = width
    for _, _, column in reversed(COLUMNS):
        assert all(row[end - column - 2 : end - column] == "  " for row in rows)
        end -= column + 2
    text = summary[: summary.index("report: ")].splitlines()  # paths follow, which may be long
    assert all(len(line) <= WIDTH for line in text if not any(name in line for name in names))
    assert all(re.sub(r"\s", "", name) in re.sub(r"\s", "", "".join(lines)) for name in names)


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
