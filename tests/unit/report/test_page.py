"""The report: what table, sentences and page say of metrics made up here, and what is refused."""

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retort.config.sections import Training
from retort.evaluation.intervals import DocumentSums
from retort.evaluation.scores import METRICS, write_document_sums
from retort.models.samples import Prompt, Sample, Samples, write_samples
from retort.report.comparisons import compare_with_baseline, find_best, find_full
from retort.report.figures import INKS, SERIES, _smooth, _thin, draw_costs
from retort.report.findings import describe_next_best, describe_outcome, find_warnings
from retort.report.page import (
    WIDTH,
    load_logs,
    load_metrics,
    make_report,
    render_summary,
    write_report,
)
from retort.report.records import TrainingLog, find_baseline, find_caches, find_teachers, group_runs
from retort.report.tables import (
    COLUMNS,
    TEXT,
    build_breakdowns,
    build_metric_table,
    build_rows,
    build_samples,
    mark_lines,
    sort_key,
)

# Of each setting of a training that matters to its result whatever it learns from, one that is not the default.
OTHER_TRAINING = {
    "learning_rate": 0.002,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "use_mixed_precision": False,
    "mixed_precision_dtype": "fp16",
    "resume_from_checkpoint": "checkpoint-10",
}
LOG_HEAD = "step,total_loss,hard_loss,soft_loss,perplexity,learning_rate,tokens_per_second"
MARGIN, KL = -1, -3  # places in a row's cells


def make_bin(confidence: float, accuracy: float) -> dict[str, Any]:
    """Return a bin of the reliability curve."""
    ends = {"low": accuracy - 0.02, "high": accuracy + 0.03}
    return {"positions": 300, "confidence": confidence, "accuracy": accuracy} | ends


def make_class(name: str, loss: float) -> dict[str, Any]:
    """Return a row of a breakdown."""
    metrics = {"loss": loss, "teacher_loss": loss - 0.5, "kl_to_teacher": 0.4}
    counts = {"class": name, "positions": 32_768, "documents": 300}
    return counts | metrics | {"intervals": {n: [v - 0.1, v + 0.1] for n, v in metrics.items()}}


def write_run(folder: Path, name: str, kind: str = "hybrid", **changes: Any) -> Path:
    """Write metrics.json and a log of 40 rows where the workflow puts them; return the former.

    `changes` replace keys, those of a section as section__key=...
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
            "student": [make_bin(0.2, 0.25), make_bin(0.7, 0.6)],
            "teacher": [make_bin(0.5, 0.5)],
        },
        "breakdown": {
            "language": [make_class("de", 2.5), make_class("en", 3.4)],
            "place": [make_class("1 to 15", 4.0), make_class("from 1,024", 3.0)],
        },
        "trained": {"commit": "0123456789abcdef", "training": {"alpha": 0.5}},
        "cache": None
        if kind == "output"
        else {
            "bytes_per_position": 131.25,
            "positions": 1_843_200,
            "method": "top_k",
            "top_k": 64,
            "tail_mass": 0.0182,
            "fidelity_kl": 3.1e-5,
            "fidelity_agreement": 0.9991,
        },
    }
    for key, value in changes.items():
        section, _, inner = key.rpartition("__")
        (metrics[section] if section else metrics)[inner] = value
    run = folder / "runs" / f"run{number}" / metrics["id"]
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


def without_teacher() -> dict[str, Any]:
    """Return the changes that make a run one without a teacher."""
    both = ("kl_to_teacher", "reverse_kl", "agreement", "overlap", "acceptance")
    section: dict[str, Any] = {f"validation__{name}": None for name in both}
    section["not_defined"] = dict.fromkeys(both, "there is no teacher to compare with")
    section["breakdown"] = {}
    section["reliability__teacher"] = None
    return {"teacher": None, "teacher_parameters": None, "teacher_validation": None} | section


def render_page(folder: Path, paths: list[Path]) -> str:
    """Return the page of the runs."""
    make_report(paths, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    return render_page(folder, write_demo(folder))


def warnings_of(paths: list[Path]) -> str:
    """Return all warnings in one text."""
    records = load_metrics(paths)
    return " ".join(find_warnings(records, load_logs(records)))


# The table


def table_of(summary: str) -> list[str]:
    """Return the first table's lines below the rule, up to the blank line."""
    lines = summary.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    return lines[start : lines.index("", start)]


def test_teacher_comes_first_and_runs_keep_their_order(tmp_path: Path) -> None:
    records = load_metrics(write_demo(tmp_path))
    lines = table_of(render_summary(records, report_path=Path("report.html")))
    assert [line.split()[0] for line in lines] == ["teacher", "output", "logit", "hybrid"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.lists(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", fullmatch=True),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    loss=st.floats(0, 690),
    parameters=st.integers(1, 10**13),
)
def test_columns_align_and_no_line_is_wider_than_the_terminal(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], loss: float, parameters: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    changes = {
        "validation__loss": loss,
        "validation__perplexity": math.exp(loss),
        "student_parameters": parameters,
    }
    records = load_metrics([write_run(folder, name, **changes) for name in names])
    summary = render_summary(records, report_path=Path("report.html"))
    lines = table_of(summary)
    width = max(len(line) for line in lines)
    assert width <= WIDTH
    rows = [line for line in lines if line not in names and len(line) == width]
    assert len(rows) == 1 + len(records)  # the margin, the last column, ends at one place in all
    end = width
    for _, _, column in reversed(COLUMNS):
        assert all(row[end - column - 2 : end - column] == "  " for row in rows)
        end -= column + 2
    said = summary[: summary.index("report: ")].splitlines()  # below are paths, which may be long
    assert all(len(line) <= WIDTH for line in said if not any(name in line for name in names))
    assert all(re.sub(r"\s", "", name) in re.sub(r"\s", "", "".join(lines)) for name in names)


def test_what_is_not_defined_is_a_dash(tmp_path: Path) -> None:
    records = load_metrics([write_run(tmp_path, "alone", "output", **without_teacher())])
    (row,) = build_rows(records)
    assert not row.is_teacher
    assert row.cells == ("output", "1", "-", "54,272", "3.294", "24.90", "-", "-", "-")


def test_cells_hold_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    teacher, output, _, hybrid = build_rows(load_metrics(write_demo(tmp_path)))
    assert teacher.cells == ("-", "-", "-", "1.312M", "2.752", "15.67", "-", "-", "-")
    assert output.cells == ("output", "1", "-", "54,272", "3.294", "24.90", "0.500", "43.1", "-")
    assert hybrid.cells[:5] == ("hybrid", "0.5", "2", "54,272", "3.213")
    assert hybrid.cells[MARGIN] == "-0.081"


@pytest.mark.parametrize(
    ("loss", "shown"), [(3.3, "+0.006"), (3.2944, "0.000"), (3.2936, "0.000"), (3.1, "-0.194")]
)
def test_margin_carries_its_sign_and_zero_carries_none(
    tmp_path: Path, loss: float, shown: str
) -> None:
    output = write_run(tmp_path, "output", "output")
    records = load_metrics([output, write_run(tmp_path, "hybrid", validation__loss=loss)])
    assert build_rows(records)[-1].cells[MARGIN] == shown


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 401},
        {"student_parameters": 54_273},
        {"validation__positions": 65_535},
        {"validation__documents": 411},
        {"distillation_type": "logit"},
        {"trained": {"commit": "0123456789abcdef"}},
        *({"trained": {"training": {key: value}}} for key, value in OTHER_TRAINING.items()),
        {"trained": {"student": {"config": "other.json"}, "training": {"alpha": 1.0}}},
        {"trained": {"student": {"model_path": "weights"}, "training": {"alpha": 1.0}}},
    ],
)
def test_no_margin_against_a_run_of_other_conditions(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    paths = [write_run(tmp_path, "output", "output", **changes), write_run(tmp_path, "hybrid")]
    records = load_metrics(paths)
    assert find_baseline(records[1], records) is None
    assert build_rows(records)[-1].cells[MARGIN] == "-"
    assert "No margin for" in warnings_of(paths)


def write_trained(
    folder: Path, name: str, kind: str = "hybrid", loss: float = 3.2, **training: Any
) -> Path:
    """Write a run with these settings of training, all others at their defaults."""
    return write_run(
        folder, name, kind, validation__loss=loss, trained={"training": {"alpha": 0.5} | training}
    )


def test_whatever_their_order_a_run_is_compared_with_the_one_of_its_settings(
    tmp_path: Path,
) -> None:
    paths = [
        write_trained(tmp_path, "slow", "output", 3.3, learning_rate=0.001),
        write_trained(tmp_path, "fast", "output", 3.5, learning_rate=0.002),
        write_trained(tmp_path, "again", "output", 3.6, learning_rate=0.002, logging_steps=5),
        write_trained(tmp_path, "hybrid", learning_rate=0.002),
    ]
    for order in itertools.permutations(paths):
        records = load_metrics(order)
        (hybrid,) = (r for r in records if r.name == "hybrid")
        found = compare_with_baseline(hybrid, records)
        assert found is not None and found.baseline.name == "fast"
        assert found.margin.value == pytest.approx(-0.3)
    assert "No margin" not in warnings_of(paths)


def test_how_it_learns_and_what_machine_it_learns_on_is_no_other_condition(tmp_path: Path) -> None:
    free = {
        "distillation_type": "output",
        "alpha": 1.0,
        "temperature": 1.0,
        "divergence": "reverse_kl",
        "use_cached_logits": False,
        "max_steps": 400,
        "num_epochs": 3.0,
        "use_gradient_checkpointing": True,
        "cpu_threads": 8,
        "device": "cuda",
        "gpus": 2,
        "nodes": 2,
        "strategy": "fsdp",
        "dataloader_num_workers": 4,
        "loss_chunk_size": 64,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 9,
    }
    paths = [write_trained(tmp_path, "output", "output", **free), write_trained(tmp_path, "hybrid")]
    records = load_metrics(paths)
    assert find_baseline(records[1], records) == records[0]
    # Every setting is looked at, or is one of these.
    assert free.keys() | OTHER_TRAINING.keys() | {"seed"} == Training.__dataclass_fields__.keys()


def test_a_run_without_a_margin_says_which_cross_entropy_run_is_missing(tmp_path: Path) -> None:
    others = [
        write_trained(tmp_path, "far", "output", learning_rate=0.1, batch_size=4, weight_decay=0.5),
        write_trained(tmp_path, "near", "output", learning_rate=0.001, lr_scheduler_type="linear"),
    ]
    paths = [write_trained(tmp_path, name, learning_rate=0.002) for name in ("a", "b")]
    need = "training.learning_rate: 0.002 (near: 0.001), training.lr_scheduler_type: 'cosine' (near: 'linear')."
    lacks = "no matching cross-entropy run; add one with"
    for order in ([*others, *paths], [*paths, *reversed(others)]):
        assert f"No margin for a, b: {lacks} {need}" in warnings_of(order)
        assert "a: held-out loss 3.200 nats/token, no matching cross-entropy run" in (
            describe_outcome(load_metrics([paths[0], *others]))
        )
    assert f"{lacks} training.distillation_type: output." in warnings_of(paths)
    far = write_run(tmp_path, "elsewhere", "output", validation__content="beef", seed=3)
    assert (
        f"{lacks} the same validation set, training.learning_rate: 0.002 (elsewhere: 0.0001), "
        in (warnings_of([paths[0], far]))
    )
    bare = write_run(tmp_path, "bare", "output", trained={})
    assert "not all settings of these runs and of bare are recorded" in warnings_of(
        [paths[0], bare]
    )
    many = [write_trained(tmp_path, f"rate{n}", learning_rate=0.1 + n) for n in range(9)]
    said = warnings_of([*many, others[0]])
    assert said.count(lacks) == 3 and "No margin for rate3, rate4, rate5, 3 more either" in said


def test_each_seed_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    paths = []
    for seed, loss in ((0, 3.3), (1, 3.5)):
        paths.append(write_run(tmp_path, f"o{seed}", "output", seed=seed, validation__loss=loss))
        paths.append(write_run(tmp_path, f"h{seed}", seed=seed, validation__loss=3.2))
    rows = build_rows(load_metrics(paths))
    assert [row.cells[MARGIN] for row in rows] == ["-", "-", "-0.100", "-", "-0.300"]
    assert "2 seeds" in warnings_of(paths)


def test_a_named_baseline_is_the_only_one_and_must_exist(tmp_path: Path) -> None:
    paths = [*write_demo(tmp_path), write_run(tmp_path, "other", "output", validation__loss=3.4)]
    records = load_metrics(paths)
    summary = render_summary(records, report_path=Path("r.html"), baseline="other")
    assert "-0.187" in summary and "-0.081" not in summary
    with pytest.raises(
        ValueError, match="'hybrid' is no run of type output; those here: output, other"
    ):
        render_summary(records, report_path=Path("r.html"), baseline="hybrid")


def test_runs_of_different_validation_sets_get_tables_of_their_own(tmp_path: Path) -> None:
    paths = [*write_demo(tmp_path), write_run(tmp_path, "else", validation__positions=70_000)]
    records = load_metrics(paths)
    assert [len(group) for group in group_runs(records)] == [3, 1]
    summary = render_summary(records, report_path=Path("r.html"))
    assert summary.count("perplexity") == 2
    assert "2 different validation sets (65,536, 70,000 positions)" in summary


def test_one_teacher_is_one_row_whatever_rounding_did_and_two_are_two(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    paths.append(write_run(tmp_path, "rounded", teacher_validation__loss=2.7520001))
    assert len(find_teachers(load_metrics(paths))) == 1
    paths.append(write_run(tmp_path, "big", teacher="models/big", teacher_validation__loss=2.5))
    rows = build_rows(load_metrics(paths))
    assert [r.name for r in rows if r.is_teacher] == ["teacher demo", "teacher models/big"]


# Sentences


def test_outcome_says_by_how_much_the_best_run_won(tmp_path: Path) -> None:
    assert describe_outcome(load_metrics(write_demo(tmp_path))) == (
        "hybrid: held-out loss 3.213, 0.081 below cross-entropy (output, 3.294); teacher 2.752."
    )


@pytest.mark.parametrize(
    ("logit", "hybrid", "said"),
    [
        (
            3.4,
            3.5,
            "did not beat cross-entropy: the best distilled run, logit, has held-out loss 3.400, "
            "0.106 above cross-entropy (output, 3.294)",
        ),
        (
            3.4,
            3.2936,
            "did not beat cross-entropy: the best distilled run, hybrid, has held-out loss 3.294, "
            "not different (to 0.001) from cross-entropy",
        ),
        (3.4, 3.2, "Not every distilled run gained: logit is 0.106 above it."),
    ],
)
def test_outcome_says_plainly_when_distillation_lost(
    tmp_path: Path, logit: float, hybrid: float, said: str
) -> None:
    paths = [
        write_run(tmp_path, "output", "output"),
        write_run(tmp_path, "logit", "logit", validation__loss=logit),
        write_run(tmp_path, "hybrid", validation__loss=hybrid),
    ]
    assert said in describe_outcome(load_metrics(paths))


def test_outcome_is_of_the_best_run_and_not_of_the_worst_baseline(tmp_path: Path) -> None:
    paths = [
        write_trained(tmp_path, "plain", "output", 3.3),
        write_trained(tmp_path, "hot", "output", 4.5, learning_rate=0.1),
        write_trained(tmp_path, "soft", loss=3.2),
        write_trained(tmp_path, "hot-soft", loss=4.0, learning_rate=0.1),
    ]
    said = describe_outcome(load_metrics(paths))
    assert said.startswith("soft: held-out loss 3.200, 0.100 below cross-entropy (plain, 3.300)")
    paths[2] = write_trained(tmp_path, "softer", loss=3.4)
    assert describe_outcome(load_metrics(paths)) == (
        "Not every distilled run gained: the best distilled run, softer, has held-out loss 3.400, 0.100 above "
        "cross-entropy (plain, 3.300); teacher 2.752. But hot-soft is 0.500 below hot."
    )
    paths[2] = write_trained(tmp_path, "soft", loss=3.2)
    paths[3] = write_trained(tmp_path, "hot-softer", loss=4.6, learning_rate=0.1)
    assert "gained: hot-softer is 0.100 above hot." in describe_outcome(load_metrics(paths))


def test_outcome_claims_no_gain_where_nothing_can_be_compared(tmp_path: Path) -> None:
    (hybrid,) = load_metrics([write_run(tmp_path, "hybrid")])
    assert "no matching cross-entropy run to compare with" in describe_outcome([hybrid])
    (output,) = load_metrics([write_run(tmp_path, "output", "output")])
    assert "no distilled run to compare with" in describe_outcome([output])


@pytest.mark.parametrize(
    ("key", "quiet", "loud", "said"),
    [
        ("cache__tail_mass", 0.2, 0.2001, "Tail mass 0.200 is high"),
        ("cache__fidelity_kl", 0.05, 0.051, "Fidelity KL 0.051 nats is high"),
        (
            "validation__leaked_sequences",
            0,
            25,
            "25 of 500 held-out sequences are in the training text",
        ),
        ("validation__positions", 1000, 999, "Only 999 held-out positions: too few to tell"),
        ("teacher_validation__loss", 3.213, 3.214, "A teacher's held-out loss is worse"),
    ],
)
def test_a_warning_comes_with_its_number_and_not_before(
    tmp_path: Path, key: str, quiet: float, loud: float, said: str
) -> None:
    assert " ".join(said.split()[-3:]) not in warnings_of(
        [write_run(tmp_path, "quiet", **{key: quiet})]
    )
    assert said in warnings_of([write_run(tmp_path, "loud", **{key: loud})])


def test_one_seed_and_unequal_text_are_said(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    assert "not what another seed would: with one seed" in warnings_of(paths)
    assert "unequal text" not in warnings_of(paths)
    paths.append(write_run(tmp_path, "longer", trained_tokens=2_000_000))
    assert "unequal text was seen: longer (2,000,000 tokens; output 1,638,400)" in warnings_of(
        paths
    )


def test_summary_points_to_the_page_the_students_and_the_cache(tmp_path: Path) -> None:
    records = load_metrics(write_demo(tmp_path))
    summary = render_summary(records, report_path=Path("results/report.html"))
    assert "report: results/report.html" in summary
    assert all(f"{record.folder}/" in summary for record in records)
    text = " ".join(summary.split())
    assert "cache of logit, hybrid: top_k, k = 64: 131.2 bytes/token, tail mass 0.0182" in text
    assert "fidelity KL 3.1e-05 nats" in text


def test_a_run_that_learns_from_text_alone_is_no_user_of_a_cache(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path, "hybrid"),
        write_run(tmp_path, "other", distillation_type="output"),
    ]
    assert [names for names, _ in find_caches(load_metrics(paths))] == [["hybrid"]]


def test_the_students_folder_is_found_from_both_places_of_metrics(tmp_path: Path) -> None:
    (record,) = load_metrics([write_run(tmp_path, "hybrid")])
    assert (record.folder / "training_log.csv").exists()
    assert replace(record, path=Path("runs/mine/metrics.json")).folder == Path("runs/mine")


# Intervals


def write_losses(path: Path, gain: float, *, noise: float = 0.01) -> None:
    """Write documents.csv of 50 documents: losses around 3 nats a token less `gain`, alike but for noise.

    Their mean becomes the loss in metrics.json.
    """
    chance = np.random.default_rng(round(1000 * gain))
    positions = np.random.default_rng(0).integers(500, 2000, 50).astype(float)
    own = np.random.default_rng(1).normal(3, 0.4, 50)
    sums = DocumentSums(np.arange(50))
    sums.add("positions", positions)
    losses = positions * (own - gain + chance.normal(0, noise, 50))
    sums.add("loss", losses)
    write_document_sums(path.with_name("documents.csv"), sums)
    metrics = json.loads(path.read_text())
    metrics["validation"]["loss"] = losses.sum() / positions.sum()
    path.write_text(json.dumps(metrics))


def write_measured(folder: Path, gains: dict[str, float], **options: Any) -> list[Path]:
    """Write runs, each with the losses of its documents."""
    paths = []
    for name, gain in gains.items():
        whole = {"cache__top_k": 300, "cache__tail_mass": 1e-13} if name == "full" else {}
        kind = {"output": "output", "full": "logit"}.get(name, "hybrid")
        changes = {"temperature": 1.0} | whole
        paths.append(write_run(folder, name, kind, **changes))
        write_losses(paths[-1], gain, **options)
    return paths


def test_a_margin_has_the_interval_of_the_same_documents(tmp_path: Path) -> None:
    records = load_metrics(write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1}))
    found = compare_with_baseline(records[1], records)
    assert found is not None and found.margin.ends is not None
    low, high = found.margin.ends
    assert -0.11 < low < found.margin.value < high < -0.09  # documents differ by 0.4
    row = build_rows(records)[-1]
    assert re.fullmatch(r"-0\.\d{3}±0\.00\d", row.cells[MARGIN]) and row.is_better
    said = describe_outcome(records)
    assert re.search(r"hybrid: .* \(0\.09\d to 0\.10\d\) below cross-entropy", said), said


def test_what_may_be_chance_is_no_gain(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.004}, noise=0.05)
    records = load_metrics(paths)
    assert not build_rows(records)[-1].is_better
    said = describe_outcome(records)
    assert "did not beat cross-entropy" in said and "not clearly different" in said
    assert 'class="better"' not in render_page(tmp_path, paths)


def test_a_gain_beyond_chance_is_bold_in_the_page(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1})
    assert 'class="better"' in render_page(tmp_path, paths)


def test_the_gap_to_full_distillation_is_said_where_such_a_run_is(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.15, "full": 0.2})
    records = load_metrics(paths)
    full = find_full(records[1], records)
    assert full is not None and full.name == "full"
    found = compare_with_baseline(records[1], records)
    assert found is not None and found.gap_closed is not None and found.gap_closed.ends is not None
    assert 0.7 < found.gap_closed.ends[0] < 0.75 < found.gap_closed.ends[1] < 0.8
    summary = render_summary(records, report_path=Path("r.html"))
    assert re.search(r"hybrid: 7\d % \(7\d to 7\d\) of what the teacher's whole", summary), summary
    page = render_page(tmp_path, paths)
    assert "gap closed, %" in page
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert float(rows[1]["gap_closed"]) == found.gap_closed.value
    assert float(rows[1]["margin_low"]) < float(rows[1]["margin"]) < float(rows[1]["margin_high"])
    without = load_metrics(paths[:2])
    assert find_full(without[1], without) is None
    assert "gap closed, %" not in render_page(tmp_path / "two", paths[:2])


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 2.0},
        {"seed": 1},
        {"cache__tail_mass": 0.01},
        {"trained": {"training": {"divergence": "reverse_kl"}}},
        {"trained": {"training": {"learning_rate": 0.5}}},
    ],
)
def test_full_distillation_is_under_the_same_conditions(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = {"cache__tail_mass": 0.0, "temperature": 1.0}
    paths = [
        write_run(tmp_path, "hybrid", temperature=1.0),
        write_run(tmp_path, "full", "logit", **(whole | changes)),
    ]
    records = load_metrics(paths)
    assert find_full(records[0], records) is None


def test_runs_are_compared_by_their_losses_document_by_document(tmp_path: Path) -> None:
    records = load_metrics(write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "other": 0.05}))
    best = find_best(records, "loss")
    assert best is not None and best.name == "hybrid"
    paths = write_measured(tmp_path / "b", {"output": 0.0, "hybrid": 0.1, "other": 0.1})
    assert find_best(load_metrics(paths), "loss") is None


def test_by_other_metrics_a_run_is_best_whose_interval_is_apart(tmp_path: Path) -> None:
    def agreeing(name: str, value: float) -> Path:
        path = write_run(tmp_path, name, validation__agreement=value)
        raw = json.loads(path.read_text())
        raw["intervals"]["validation"]["agreement"] = [value - 0.01, value + 0.01]
        path.write_text(json.dumps(raw))
        return path

    paths = [agreeing("a", 0.40), agreeing("b", 0.43), agreeing("c", 0.415)]
    records = load_metrics(paths)
    assert find_best(records, "agreement") is None
    best = find_best(records[:2], "agreement")
    assert best is not None and best.name == "b"
    assert find_best(records[:1], "agreement") is None


def test_documents_that_are_others_are_refused(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1})
    file = paths[1].with_name("documents.csv")
    file.write_text(file.read_text().replace("\n7,", "\n77,"))
    with pytest.raises(ValueError, match="are not of the same documents"):
        make_report(paths, tmp_path / "report.html")


def test_documents_of_another_run_are_refused_and_missing_ones_said(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "other": 0.3})
    files = [path.with_name("documents.csv") for path in paths]
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(
        ValueError, match=r"sums up to a loss of 2\.\d+, but metrics\.json .*another run's"
    ):
        make_report(paths, tmp_path / "report.html")
    files[1].unlink()
    text = warnings_of(paths)
    assert (
        "No documents.csv beside the metrics of hybrid: how sure their margins are is not known"
        in text
    )


def test_the_best_run_is_held_against_the_next_best(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "third": 0.103})
    records = load_metrics(paths)
    said = describe_next_best(records)
    assert said is not None and said.startswith("third is not clearly different (-0.00")
    assert "the next best run, hybrid (2.9" in said
    assert said in " ".join(make_report(paths, tmp_path / "report.html").split())
    assert said.split(" (")[0] in (tmp_path / "report.html").read_text()
    assert describe_next_best(records[:2]) is None  # the outcome says so already
    assert describe_next_best(records[:1]) is None


@pytest.mark.parametrize(
    ("key", "value"), [("trained", [1]), ("not_defined", ["loss"]), ("breakdown", 3)]
)
def test_a_section_that_is_no_mapping_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = write_run(tmp_path, "one", **{key: value})
    with pytest.raises(ValueError, match=f"metrics.json: {key} is .*, expected a mapping"):
        load_metrics([path])


def test_samples_of_another_run_are_refused_and_missing_ones_said(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    records = load_metrics(paths)
    samples = Samples((Prompt((1,), "once", None),), (Sample("a", "b"),))
    for path, record in zip(paths[:2], records[:2], strict=True):
        write_samples(path.with_name("samples.json"), {"student": samples}, of=record.id)
    page = render_page(tmp_path, paths)
    assert "Without samples (samples.json is not there): hybrid." in page
    shutil.copy(paths[0].with_name("samples.json"), paths[1].with_name("samples.json"))
    with pytest.raises(ValueError, match="it is of 000000000000, not of 000000000001"):
        make_report(paths, tmp_path / "report.html")


def test_few_documents_are_said(tmp_path: Path) -> None:
    assert "Only 9 held-out documents" in warnings_of(
        [write_run(tmp_path, "few", validation__documents=9)]
    )
    assert "held-out documents: too few" not in warnings_of([write_run(tmp_path, "many")])


# All metrics, reliability, classes


def test_every_metric_of_every_model_is_in_the_page(tmp_path: Path, demo_page: str) -> None:
    records = load_metrics(write_demo(tmp_path))
    table = build_metric_table(records)
    assert [name for name, _, _ in table.rows] == ["teacher", "output", "logit", "hybrid"]
    texts = dict(zip(table.heads[1:], [cell.text for cell in table.rows[3][2]], strict=True))
    assert texts["bits per byte, bits/byte"] == "1.210" and texts["top-1 agreement, %"] == "43.1"
    assert texts["speculative acceptance, %"] == "72.0"
    assert texts["calibration error (ECE), %"] == "2.0"
    agreement = table.rows[3][2][table.heads.index("top-1 agreement, %") - 1]
    assert agreement.below == "42.0 to 44.0"
    of_teacher = dict(zip(table.heads[1:], table.rows[0][2], strict=True))
    assert of_teacher["bits per byte, bits/byte"].text == "1.000"
    assert of_teacher["top-1 agreement, %"].text == "-"
    assert {"42.0 to 44.0", "72.0", "1.210"} <= set(Page(demo_page).words)


def test_why_a_metric_is_missing_is_said_once(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, name, "output", **without_teacher()) for name in ("a", "b")]
    text = " ".join(Page(render_page(tmp_path, paths)).words)
    assert text.count("because there is no teacher to compare with") == 1
    assert "a, b: no KL(teacher || student), KL(student || teacher), top-1 agreement" in text


def test_classes_have_a_row_each_with_every_runs_loss(tmp_path: Path) -> None:
    place, language = build_breakdowns(load_metrics(write_demo(tmp_path)))
    assert place.title.startswith("Where in its document")
    assert language.heads == ("class", "positions", "teacher", "output", "logit", "hybrid")
    name, _, cells = language.rows[1]
    assert (name, [cell.text for cell in cells]) == ("en", ["32,768", "2.900", *["3.400"] * 3])
    assert cells[-1].below == "KL 0.400"


def test_each_model_has_a_reliability_curve(tmp_path: Path, demo_page: str) -> None:
    assert demo_page.count('aria-label="accuracy over confidence"') == 4
    alone = render_page(
        tmp_path, [write_run(tmp_path / "x", "alone", "output", **without_teacher())]
    )
    assert alone.count('aria-label="accuracy over confidence"') == 1
    assert "All held-out positions are of one class." in alone


def test_metrics_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path, "old")
    raw = json.loads(path.read_text())
    del raw["version"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="metrics of version None; this Retort reads version 2"):
        load_metrics([path])


# The page


class Page(HTMLParser):
    """Collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_fetches_nothing_and_runs_its_own_script_alone(demo_page: str) -> None:
    page = Page(demo_page)
    references = [
        v for k, v in page.attributes if k in ("href", "xlink:href", "src", "srcset", "data")
    ]
    assert references and all(value.startswith("#") for value in references)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    (script,) = re.findall(r"<script>(.*?)</script>", demo_page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.tags.count("script") == 1 and f"script-src 'sha256-{digest}'\"" in demo_page
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert "@import" not in demo_page
    assert set(re.findall(r"url\((.)", demo_page)) <= {"#"}
    assert "http" not in re.sub(r"http-equiv", "", demo_page)


def test_ids_are_unique_and_every_reference_finds_its_id(demo_page: str) -> None:
    ids = [value for key, value in Page(demo_page).attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', demo_page)) <= set(ids)


def test_figures_use_only_variables_that_light_and_dark_define(demo_page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", demo_page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)
    light, dark = re.findall(r":root \{(.*?)\}", demo_page, flags=re.DOTALL)
    used = set(re.findall(r"var\((--\w[\w-]*)\)", demo_page))
    for definitions in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", definitions))


def contrast(one: str, other: str) -> float:
    """Return the contrast of two #rrggbb colours as WCAG 2 defines it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_ground(mode: int) -> None:
    ground = INKS["ground"][mode]
    assert all(contrast(INKS[name][mode], ground) >= 4.5 for name in ("ink", "muted"))
    assert all(contrast(pair[mode], ground) >= 3 for pair in SERIES)


def test_run_names_are_text_never_markup_or_formulas(tmp_path: Path) -> None:
    name = "<b onclick=x>&amp;</b> $x^2$ {{ 7 * 7 }}"
    text = render_page(tmp_path, [write_run(tmp_path, name)])
    page = Page(text)
    drawn = Page("".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))).words
    assert drawn.count(name) == 2  # losses, KL
    assert "b" not in page.tags
    assert page.words.count(name) >= 4  # the tables, the legend and the figures
    assert not [k for k, _ in page.attributes if k == "onclick"]


@pytest.mark.parametrize("num_runs", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_every_run_is_in_page_table_and_csv(tmp_path: Path, num_runs: int) -> None:
    names = [f"run-{i:02d}" for i in range(num_runs)]
    changes = [without_teacher() if i % 5 == 4 else {} for i in range(num_runs)]
    paths = [
        write_run(tmp_path, name, "hybrid" if i % 3 else "output", **changes[i])
        for i, name in enumerate(names)
    ]
    words = Page(render_page(tmp_path, paths)).words
    assert all(words.count(name) >= 4 for name in names)
    summary = (tmp_path / "summary.txt").read_text()
    assert all(name in summary for name in names)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [row["name"] for row in rows] == names


def test_a_name_of_any_length_is_whole_in_the_page(tmp_path: Path) -> None:
    name = "x" * 300 + "-end"
    assert name in Page(render_page(tmp_path, [write_run(tmp_path, name)])).words


def test_csv_keeps_all_digits_and_leaves_empty_what_is_not_defined(tmp_path: Path) -> None:
    paths = [*write_demo(tmp_path), write_run(tmp_path, "x", validation__loss=3.2130000001)]
    make_report(paths, tmp_path / "report.html")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert float(rows[3]["margin"]) == 3.2130000001 - 3.294
    assert rows[0]["margin"] == "" and rows[0]["cache_dial"] == ""
    assert rows[1]["cache_fidelity_kl"] == "3.1e-05"


@pytest.mark.slow
def test_missing_logs_are_said_and_drawn_as_nothing(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    first, *others = load_metrics(paths)
    (first.folder / "training_log.csv").unlink()
    text = render_page(tmp_path, paths)
    assert "no learning curve drawn: output." in text
    for record in others:
        (record.folder / "training_log.csv").write_text(LOG_HEAD + "\n")
    assert "No run has a training log." in render_page(tmp_path, paths)


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        records = load_metrics(paths)
        write_report(records, load_logs(records), folder / "a.html", folder / "a.csv")
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(made[0]) == 2
    assert made[0] == made[1]


def test_make_report_returns_the_summary_that_it_writes(tmp_path: Path) -> None:
    summary = make_report([write_run(tmp_path, "one")], tmp_path / "report.html")
    assert (tmp_path / "summary.txt").read_text() == summary + "\n"
    assert {"report.html", "summary.csv"} <= {path.name for path in tmp_path.iterdir()}


# Figures


@given(st.lists(st.floats(0, 100), min_size=1, max_size=1500))
def test_curves_are_thinned_without_moving_their_mean_or_their_end(losses: list[float]) -> None:
    thin = _thin(TrainingLog(tuple(range(1, len(losses) + 1)), tuple(losses)))
    assert len(thin.steps) <= 400
    assert thin.steps[-1] == len(losses)
    if len(losses) % len(thin.steps) == 0:
        assert math.isclose(
            sum(thin.hard_loss) / len(thin.steps), sum(losses) / len(losses), abs_tol=1e-9
        )


@given(st.floats(-5, 5), st.integers(1, 300))
def test_smoothing_keeps_straight_lines_away_from_the_ends(slope: float, count: int) -> None:
    line = [slope * i for i in range(count)]
    reach = count // 40
    smooth = _smooth(line)
    assert len(smooth) == count
    middle = slice(reach, count - reach)
    assert smooth[middle] == pytest.approx(line[middle], abs=1e-6)


def test_costs_are_drawn_for_two_runs_and_more_and_bytes_only_of_what_is_stored(
    tmp_path: Path,
) -> None:
    records = load_metrics(write_demo(tmp_path))
    styles = range(len(records))
    bytes_used, times = draw_costs(records, styles, key="k")
    assert "stored teacher, bytes/token (0: from text alone)" in bytes_used
    assert "training time, seconds" in times
    assert draw_costs(records[:1], styles, key="k") == []
    live = [replace(record, cache=None, training_seconds=900.0) for record in records]
    (alone,) = draw_costs(live, styles, key="k")
    assert "training time, minutes" in alone


# What is written


def test_samples_stand_by_prompt_the_text_first_then_teacher_then_runs(tmp_path: Path) -> None:
    records = load_metrics(write_demo(tmp_path))
    prompts = (Prompt((1,), "once", " upon"), Prompt((2,), "twice", None))
    teacher = Samples(prompts, (Sample("t1", "T1"), Sample("t2", "T2")))
    found: list[dict[str, Samples]] = [
        {"teacher": teacher, "student": Samples(prompts, (Sample("a1", ""), Sample("a2", "")))},
        {"teacher": teacher, "student": Samples(prompts, missing="it cannot")},
        {},
    ]
    first, second = build_samples(records, found)
    assert [line.name for line in first.lines] == [TEXT, "teacher", "output", "logit"]
    assert (first.prompt, first.lines[0].greedy, first.lines[0].drawn) == ("once", " upon", None)
    assert (first.lines[1].greedy, first.lines[1].drawn) == ("t1", "T1")
    assert [(line.name, line.greedy) for line in second.lines] == [
        ("teacher", "t2"),
        ("output", "a2"),
        ("logit", ""),
    ]
    assert second.lines[-1].missing == "it cannot"
    assert build_samples(records, [{}, {}, {}]) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "(nothing)"),
        ("a\nb", "a\nb"),
        ("a\n\n\nb\n", "a\u23ce\u23ce\nb\u23ce"),
        ("a\n" + "\n" * 60, "a\u23ce\u00d760\u23ce"),
    ],
)
def test_empty_lines_become_signs(text: str, shown: str) -> None:
    assert mark_lines(text) == shown


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *[("3.213\u00b10.020", "3.213"), ("-0.572\u00b10.085", "-0.572"), ("918,656", "918656.0")],
        *[("1.235M", "1235000.0"), ("7.1B", "7100000000.0"), ("1.23e+07", "12300000.0")],
        *[("-", ""), ("hybrid", "hybrid"), ("+0.001", "0.001")],
    ],
)
def test_cells_are_sorted_by_their_numbers(text: str, key: str) -> None:
    assert sort_key(text) == key


# Where the numbers come from


def test_the_page_says_commit_versions_and_in_which_keys_runs_differ(tmp_path: Path) -> None:
    def trained(**training: Any) -> dict[str, Any]:
        return {
            "commit": "0123456789abcdef",
            "versions": {"torch": "2.13.0"},
            "finished": "2026-11-25T20:00:00Z",
            "training": {"alpha": 0.5, "batch_size": 16, **training},
        }

    paths = [
        write_run(tmp_path, "slow", trained=trained(learning_rate=1e-3)),
        write_run(tmp_path, "fast", trained=trained(learning_rate=5e-3)),
    ]
    words = " ".join(Page(render_page(tmp_path, paths)).words)
    assert "The runs differ in training.learning_rate" in " ".join(words.split())
    assert "commit 0123456789abcdef" in words and "torch 2.13.0" in words
    assert "batch_size" not in words and "2026-11-25T20" not in words


# What is refused


@pytest.mark.parametrize(
    "key",
    [
        "validation__loss",
        "validation__kl_to_teacher",
        "teacher_validation__loss",
        "training_seconds",
        "cache__tail_mass",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, key: str, value: float) -> None:
    path = write_run(tmp_path, "run", **{key: value})
    name = key.replace("__", r"\.")
    with pytest.raises(
        ValueError, match=rf"{name} is (nan|inf), expected a finite number\. .*train it again"
    ):
        load_metrics([path])


def test_a_log_that_diverged_is_refused(tmp_path: Path) -> None:
    records = load_metrics([write_run(tmp_path, "run")])
    log = records[0].folder / "training_log.csv"
    log.write_text(f"{LOG_HEAD}\n10,1,1,,2,1e-4,9\n20,nan,nan,,nan,1e-4,9\n")
    with pytest.raises(ValueError, match="hard_loss is nan at step 20"):
        load_logs(records)
    log.write_text("step,loss\n10,3\n")
    with pytest.raises(ValueError, match="no training log as `train` writes it"):
        load_logs(records)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "0"}, "seed is '0', expected a whole number"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"validation": {"loss": 3.0}}, "has no 'validation.positions'"),
        ({"validation": None}, "validation.loss is None"),
    ],
)
def test_metrics_of_another_form_are_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write_run(tmp_path, "run", **changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_metrics([path])


def test_unreadable_missing_and_repeated_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no runs to report on"):
        load_metrics([])
    with pytest.raises(ValueError, match="no readable metrics in"):
        load_metrics([tmp_path / "nowhere.json"])
    (tmp_path / "half.json").write_text('{"run": "x"')
    with pytest.raises(ValueError, match="no readable metrics in"):
        load_metrics([tmp_path / "half.json"])
    path = write_run(tmp_path, "run")
    with pytest.raises(ValueError, match="is given 2 times"):
        load_metrics([path, path])


def test_runs_of_one_name_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, "same", id="aaaaaaaaaaaa"), write_run(tmp_path, "same")]
    assert [record.name for record in load_metrics(paths)] == ["same aaaaaa", "same 000000"]


def test_reporting_loads_no_torch() -> None:
    code = "import sys, retort.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
