"""The summary and the page of runs made up here."""

import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retort.models.samples import Sample, SamplePrompt, Samples, write_samples
from retort.report.page import WIDTH, make_report
from retort.report.runs import find_folder
from retort.report.tables import build_metric_table
from support.reports import (
    LOG_HEAD,
    PageParser,
    check_alignment,
    compare,
    find_table,
    render_page,
    summarise,
    without_teacher,
    write_demo,
    write_measured,
    write_run,
)

HEADS = ["setting", "loss", "margin", "seeds"]


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo")
    return render_page(folder, write_demo(folder))


def test_teacher_comes_first_and_settings_are_in_the_order_of_their_loss(tmp_path: Path) -> None:
    lines = find_table(summarise(write_demo(tmp_path)))
    assert [line.split()[0] for line in lines] == ["teacher", "hybrid", "logit", "output"]


@pytest.mark.parametrize("width", [WIDTH, 100, 140])
@pytest.mark.parametrize(
    ("names", "loss", "parameters"),
    [(["a"], 0.0, 1), (["x" * 121, "run-1", "y" * 60], 3.2, 10**9), (["b", "c"], 690.0, 10**13)],
)
def test_columns_align_and_no_line_is_wider_than_the_terminal(
    tmp_path: Path, names: list[str], loss: float, parameters: int, width: int
) -> None:
    check_alignment(tmp_path, names, loss, parameters, width)


def test_a_wide_terminal_shows_all_columns_and_a_narrow_one_those_of_the_result(
    tmp_path: Path,
) -> None:
    paths = [write_run(tmp_path, "a-run-with-a-name-of-some-length", "output")]
    wide, narrow = (
        next(line for line in summarise(paths, width).splitlines() if line.startswith("setting"))
        for width in (120, 80)
    )
    assert wide.split() == [
        *HEADS,
        "perplexity",
        "KL",
        "agree",
        "%",
        "type",
        "alpha",
        "T",
        "params",
    ]
    assert narrow.split()[:4] == HEADS and "params" not in narrow


def test_the_summary_that_is_shown_is_as_wide_as_the_terminal_and_the_file_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, "one")
    found = []
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = make_report([path], tmp_path / "report.html")
        found.append((shown, (tmp_path / "summary.txt").read_text()))
    assert found[0][1] == found[1][1] == found[0][0] + "\n" and found[1][0] != found[0][0]
    assert {"report.html", "summary.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_runs_of_different_validation_sets_get_tables_of_their_own(tmp_path: Path) -> None:
    paths = [*write_demo(tmp_path), write_run(tmp_path, "else", validation__positions=70_000)]
    assert list(compare(paths).runs.group) == [0, 0, 0, 1]
    summary = summarise(paths)
    assert summary.count("perplexity") == 2
    assert "2 different validation sets (65,536, 70,000 positions)" in " ".join(summary.split())


def test_summary_points_to_the_page_the_students_and_the_cache(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    summary = summarise(paths)
    assert "report: results/report.html" in summary
    assert all(f"{find_folder(path)}/" in summary for path in paths)
    text = " ".join(summary.split())
    assert "cache of logit, hybrid: top_k, k = 64: 131.2 bytes/position, tail mass 0.0182" in text
    assert "fidelity KL 3.1e-05 nats" in text


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        make_report(paths, folder / "report.html")
        made.append({p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".txt"})
    assert set(made[0]) == {"report.html", "summary.csv"}
    assert made[0] == made[1]


def test_page_fetches_nothing_and_runs_only_its_own_script(demo_page: str) -> None:
    page = PageParser(demo_page)
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
    ids = [value for key, value in PageParser(demo_page).attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', demo_page)) <= set(ids)


def test_figures_use_only_variables_that_light_and_dark_define(demo_page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", demo_page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)
    light, dark = re.findall(r":root \{(.*?)\}", demo_page, flags=re.DOTALL)
    used = set(re.findall(r"var\((--\w[\w-]*)\)", demo_page))
    for definitions in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", definitions))


def test_run_names_are_text_never_markup_or_formulas(tmp_path: Path) -> None:
    name = "<b onclick=x>&amp;</b> $x^2$ {{7*7}}"
    text = render_page(tmp_path, [write_run(tmp_path, name)])
    page = PageParser(text)
    drawn = PageParser("".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))).texts
    assert drawn.count(name) == 2  # losses, KL
    assert "b" not in page.tags
    assert page.texts.count(name) >= 4  # the tables, the legend and the figures
    assert not [k for k, _ in page.attributes if k == "onclick"]


@pytest.mark.parametrize("num_runs", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_every_run_is_in_page_table_and_csv(tmp_path: Path, num_runs: int) -> None:
    names = [f"run-{i:02d}" for i in range(num_runs)]
    changes = [without_teacher() if i % 5 == 4 else {} for i in range(num_runs)]
    paths = [
        write_run(tmp_path, name, "hybrid" if i % 3 else "output", **changes[i])
        for i, name in enumerate(names)
    ]
    texts = PageParser(render_page(tmp_path, paths)).texts
    assert all(texts.count(name) >= 4 for name in names)
    summary = (tmp_path / "summary.txt").read_text()
    assert all(name in summary for name in names)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [row["name"] for row in rows] == names


def test_a_name_of_any_length_is_complete_in_the_page(tmp_path: Path) -> None:
    name = "x" * 300 + "-end"
    assert name in PageParser(render_page(tmp_path, [write_run(tmp_path, name)])).texts


@pytest.mark.slow
def test_missing_logs_are_warned_of_and_not_drawn(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    first, *others = (find_folder(path) / "training_log.csv" for path in paths)
    first.unlink()
    text = render_page(tmp_path, paths)
    assert "so no learning curve: output." in text
    for log in others:
        log.write_text(LOG_HEAD + "\n")
    assert "No run has a training log." in render_page(tmp_path, paths)


def test_the_reason_for_missing_metrics_is_given_once(tmp_path: Path) -> None:
    paths = [write_run(tmp_path, name, "output", **without_teacher()) for name in ("a", "b")]
    text = " ".join(PageParser(render_page(tmp_path, paths)).texts)
    assert text.count("because there is no teacher to compare with") == 1
    assert "a, b: no KL(teacher || student), KL(student || teacher), top-1 agreement" in text


def test_each_model_has_a_reliability_curve(tmp_path: Path, demo_page: str) -> None:
    assert demo_page.count('aria-label="accuracy over confidence"') == 4
    alone = render_page(
        tmp_path, [write_run(tmp_path / "x", "alone", "output", **without_teacher())]
    )
    assert alone.count('aria-label="accuracy over confidence"') == 1
    assert "All held-out positions are in one class." in alone


def test_a_clear_gain_is_bold_in_the_page(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1})
    assert 'class="better"' in render_page(tmp_path, paths)


def test_samples_of_another_run_are_refused_and_missing_ones_named(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    samples = Samples((SamplePrompt((1,), "once", None),), (Sample("a", "b"),))
    for path, run in zip(paths[:2], compare(paths).runs.id, strict=False):
        write_samples(path.with_name("samples.json"), {"student": samples}, of=run)
    page = render_page(tmp_path, paths)
    assert "No samples (no samples.json): hybrid." in page
    shutil.copy(paths[0].with_name("samples.json"), paths[1].with_name("samples.json"))
    with pytest.raises(ValueError, match="is of 000000000000, not of 000000000001"):
        make_report(paths, tmp_path / "report.html")


def test_the_page_shows_commit_versions_and_differing_keys(tmp_path: Path) -> None:
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
    texts = " ".join(PageParser(render_page(tmp_path, paths)).texts)
    assert "The runs differ in training.learning_rate" in " ".join(texts.split())
    assert "commit 0123456789abcdef" in texts and "torch 2.9" in texts
    assert "batch_size" not in texts and "2026-11-29T04" not in texts


def test_reporting_loads_no_torch() -> None:
    code = "import sys, retort.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_metric_of_every_model_is_in_the_page(tmp_path: Path, demo_page: str) -> None:
    found = compare(write_demo(tmp_path))
    table = build_metric_table(found, found.settings)
    assert [name for name, _, _ in table.rows] == ["teacher", "hybrid", "logit", "output"]
    texts = dict(zip(table.heads[1:], [cell.text for cell in table.rows[3][2]], strict=True))
    assert texts["bits per byte, bits/byte"] == "1.210" and texts["top-1 agreement, %"] == "43.1"
    assert texts["speculative acceptance, %"] == "72.0"
    assert texts["calibration error (ECE), %"] == "2.0"
    agreement = table.rows[3][2][table.heads.index("top-1 agreement, %") - 1]
    assert agreement.below == "42.0 to 44.0"
    of_teacher = dict(zip(table.heads[1:], table.rows[0][2], strict=True))
    assert of_teacher["bits per byte, bits/byte"].text == "1.000"
    assert of_teacher["top-1 agreement, %"].text == "-"
    assert {"42.0 to 44.0", "72.0", "1.210"} <= set(PageParser(demo_page).texts)
