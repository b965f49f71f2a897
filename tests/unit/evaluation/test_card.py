"""The held-out numbers in a student's card."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from retort.evaluation.card import add_scores, complete_card
from retort.evaluation.intervals import Estimate
from retort.evaluation.records import Metrics
from retort.io.digests import digest_folder
from retort.training.model_card import SCORES
from support.reports import write_run

CARD = f"""---
license: mit
datasets:
- someone/stories
mine: kept
---

# soft

{SCORES[0]}
Not measured yet.
{SCORES[1]}

## Use

My own words.
"""


def read_data(text: str) -> Any:
    return ModelCard(text).data


def read_metrics(folder: Path, **values: Any) -> Metrics:
    return Metrics.read(write_run(folder, "soft", "hybrid", **values))


def test_numbers_and_intervals_are_those_of_metrics_json(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path)
    student = metrics.scores.student
    student.metrics["loss"] = Estimate(student.metrics["loss"].value, 3.1234, 3.3456)
    text = add_scores(CARD, metrics)
    found, teacher = metrics.scores.student.metrics, metrics.scores.teacher
    assert teacher is not None
    loss = found["loss"]
    row = next(r for r in text.splitlines() if r.startswith("| held-out loss"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{loss.value:.3f} (3.123 to 3.346)"
    assert cells[2].startswith(f"{teacher.metrics['loss'].value:.3f}")
    for part in (
        f"{found['perplexity'].value:.3f}",
        f"{found['kl_to_teacher'].value:.3f}",
        f"{100 * found['agreement'].value:.1f}",
        f"{metrics.scores.student.positions:,} tokens",
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}, "no cell is cut in two"
    assert "Not measured yet" not in text and "My own words." in text


def test_the_hub_reads_the_numbers_back_and_the_rest_of_the_metadata_is_kept(
    tmp_path: Path,
) -> None:
    metrics = read_metrics(tmp_path)
    data = read_data(add_scores(CARD, metrics))
    assert data.license == "mit" and data.get("mine") == "kept" and data.eval_results
    found = {result.metric_type: result for result in data.eval_results}
    assert found["loss"].metric_value == round(metrics.scores.student.metrics["loss"].value, 4)
    assert found["perplexity"].dataset_type == "someone/stories"
    assert found["perplexity"].task_type == "text-generation" and data.model_name == "soft"


def test_a_local_corpus_has_no_place_in_the_index(tmp_path: Path) -> None:
    text = add_scores(CARD.replace("datasets:\n- someone/stories\n", ""), read_metrics(tmp_path))
    assert read_data(text).eval_results is None and "held-out loss" in text


def test_a_second_evaluation_replaces_the_numbers_of_the_first(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path)
    once = add_scores(CARD, metrics)
    assert add_scores(once, metrics) == once


def test_a_card_of_an_earlier_version_gets_the_numbers_at_its_end(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path)
    text = add_scores("---\ntags: [retort]\n---\n\n# soft\n\nOld.\n", metrics)
    assert text.index("Old.") < text.index("## Held-out numbers") < text.index("perplexity")
    assert add_scores(text, metrics) == text


def test_a_folder_without_a_card_stays_so_and_a_damaged_card_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, final = read_metrics(tmp_path), tmp_path / "final"
    final.mkdir()
    complete_card(final, metrics)
    assert not [*final.iterdir()]
    (final / "README.md").write_bytes(b"\xff\xfe\xfa")
    complete_card(final, metrics)
    assert "stays without the held-out numbers" in caplog.text
    (final / "README.md").write_text(CARD)
    complete_card(final, metrics)
    assert (final / "README.md").read_text() == add_scores(CARD, metrics)
    assert [p.name for p in final.iterdir()] == ["README.md"]
    assert not [*tmp_path.glob(".README*")]


def test_two_evaluations_that_end_at_once_leave_one_of_their_cards(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "README.md").write_text(CARD)
    both = [read_metrics(tmp_path / str(loss), validation__loss=loss) for loss in (3.2, 3.4)]
    texts = [add_scores(CARD, metrics) for metrics in both]
    assert texts[0] != texts[1]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        ends = [pool.submit(repeat_card, final, metrics) for metrics in both]
        while not all(end.done() for end in ends):
            assert digest_folder(final).keys() == {"README.md"}
            assert (final / "README.md").read_text() in (CARD, *texts)
    assert (final / "README.md").read_text() in texts


def repeat_card(final: Path, metrics: Metrics) -> None:
    for _ in range(30):
        complete_card(final, metrics)
