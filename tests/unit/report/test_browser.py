"""The report in a real browser: no script errors, no requests, no overflow, tables that sort."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from retort.evaluation.records import Metrics
from retort.models.samples import Sample, SamplePrompt, Samples, write_samples
from retort.report.page import make_report
from support.reports import write_demo, write_run

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Elements outside of the window, except in areas that scroll; and text outside of its figure.
FIND_OVERFLOW = """() => {
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".scroll table, svg")) continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > innerWidth + 1 || box.left < -1)) found.push(element.outerHTML.slice(0, 200));
  }
  for (const text of document.querySelectorAll("svg text")) {
    const box = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
    if (box.left < frame.left - 2 || box.right > frame.right + 2) found.push(text.textContent);
  }
  return found;
}"""
COLUMN = """([table, column]) => [...document.querySelectorAll("table")][table].tBodies[0].rows.length &&
  [...[...document.querySelectorAll("table")][table].tBodies[0].rows].map(row => row.cells[column].innerText)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: tests/install_packages.sh installs it, as root on Debian")
    flags = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


def write_student_samples(path: Path) -> None:
    """Write samples.json as `evaluate` does, with text that is long, markup or empty."""
    prompts = (
        SamplePrompt((1, 2, 3), "Once upon a time <b>there</b> was a & b", " in the text"),
        SamplePrompt((4, 5), "a_very_long_word_without_any_break_" * 12, None),
    )
    teacher = (Sample(" a dog", " a cat"), Sample("x" * 900, ""))
    training = Metrics.read(path).training
    student = (
        Sample(f" {training.run}", "\n\n  indented\n"),
        Sample("", "</script><script>alert(1)</script>"),
    )
    write_samples(
        path.with_name("samples.json"),
        {"teacher": Samples(prompts, teacher), "student": Samples(prompts, student)},
        of=training.id,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    paths = write_demo(folder)
    paths.append(write_run(folder, "a-run-with-a-long-name-" + "longer-" * 8, seed=1, steps=900))
    for path in paths:
        write_student_samples(path)
    make_report(paths, folder / "report.html")
    return folder / "report.html"


def open_page(browser: Browser, report: Path, **options: Any) -> tuple[Page, list[str]]:
    """Return the page, and a list that collects errors, warnings and requests."""
    context = browser.new_context(**options)
    page = context.new_page()
    faults: list[str] = []

    def refuse(dialog: Dialog) -> None:
        faults.append("a dialog")
        dialog.dismiss()

    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("dialog", refuse)
    page.on(
        "request",
        lambda request: (
            None if request.url == report.as_uri() else faults.append(f"fetched {request.url}")
        ),
    )
    page.goto(report.as_uri())
    for closed in page.locator("details:not([open]) summary").all():
        closed.click()
    return page, faults


@pytest.mark.parametrize(
    ("width", "scheme"), [(320, "dark"), (390, "light"), (768, "dark"), (1440, "light")]
)
def test_page_fits_and_writes_nothing_to_the_console(
    width: int, scheme: Any, browser: Browser, report: Path
) -> None:
    size: Any = {"width": width, "height": 900}
    page, faults = open_page(browser, report, viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(FIND_OVERFLOW) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(255, 255, 255)",
        "dark": "rgb(20, 24, 29)",
    }.get(scheme)
    assert faults == []
    page.context.close()


def test_tables_sort_by_the_clicked_column(browser: Browser, report: Path) -> None:
    page, faults = open_page(browser, report)
    table = page.locator("table").first
    losses = table.locator("tbody tr td:nth-child(2)")
    head = table.locator("thead th").nth(1)
    assert head.inner_text().split() == ["held-out", "loss"]
    head.locator("button").click()
    found = [float(text) for text in losses.all_inner_texts()]
    assert found[0] == 2.752 and found[1:] == sorted(found[1:])  # the teacher stays first
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    found = [float(text) for text in losses.all_inner_texts()]
    assert found[0] == 2.752 and found[1:] == sorted(found[1:], reverse=True)
    margins = table.locator("tbody tr td:nth-child(3)")
    table.locator("thead th").nth(2).locator("button").click()
    assert {*margins.all_inner_texts()[-2:]} == {
        "\N{EN DASH}",
        "no match",
    }  # without a margin: last
    table.locator("thead th").first.locator("button").click()
    names = table.locator("tbody tr th").all_inner_texts()
    assert names[1:] == sorted(names[1:])
    assert faults == []


def test_without_scripts_everything_but_sorting_works(browser: Browser, report: Path) -> None:
    page, faults = open_page(browser, report, java_script_enabled=False)
    assert page.locator("table").first.locator("thead button").count() == 0
    assert "Samples" in page.inner_text("main")
    assert page.locator("svg").count() > 5
    assert [fault for fault in faults if "script" not in fault] == []


def test_generated_text_is_text_never_markup(browser: Browser, report: Path) -> None:
    page, faults = open_page(browser, report)
    assert (
        page.locator(".prompt .written").first.inner_text()
        == "Once upon a time <b>there</b> was a & b"
    )
    assert page.locator("script").count() == 1
    assert page.get_by_text("</script><script>alert(1)</script>").count() == 4
    assert faults == []
