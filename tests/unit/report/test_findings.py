"""Sentences on the outcome, and warnings."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retort.corpus.documents import Counts
from retort.evaluation.records import TextCounts
from retort.report.findings import describe_next_best, describe_outcome
from retort.report.page import make_report
from retort.report.runs import find_folder
from support.records import make_totals
from support.reports import (
    LOG_HEAD,
    compare,
    find_all_warnings,
    render_page,
    summarise,
    write_demo,
    write_measured,
    write_run,
    write_trained,
)


def outcome_of(paths: list[Path]) -> str:
    found = compare(paths)
    return describe_outcome(found, found.settings)


def test_outcome_says_by_how_much_the_best_run_won(tmp_path: Path) -> None:
    assert outcome_of(write_demo(tmp_path)) == (
        "hybrid (one seed): held-out loss 3.213, 0.081 below cross-entropy (output, 3.294); teacher 2.752."
    )


@pytest.mark.parametrize(
    ("logit", "hybrid", "message"),
    [
        (
            3.4,
            3.5,
            "did not beat cross-entropy: of the distilled runs, logit (one seed) has the lowest held-out loss, 3.400, "
            "0.106 above cross-entropy (output, 3.294)",
        ),
        (
            3.4,
            3.2936,
            "did not clearly beat cross-entropy: of the distilled runs, hybrid (one seed) has the lowest held-out "
            "loss, 3.294, not different (to 0.001) from cross-entropy",
        ),
        (3.4, 3.2, "Not every distilled run improved: logit is 0.106 above it."),
    ],
)
def test_outcome_says_when_distillation_lost(
    tmp_path: Path, logit: float, hybrid: float, message: str
) -> None:
    paths = [
        write_run(tmp_path, "output", "output"),
        write_run(tmp_path, "logit", "logit", validation__loss=logit),
        write_run(tmp_path, "hybrid", validation__loss=hybrid),
    ]
    assert message in outcome_of(paths)


def test_outcome_is_of_the_best_run_and_not_of_the_worst_baseline(tmp_path: Path) -> None:
    paths = [
        write_trained(tmp_path, "plain", "output", 3.3),
        write_trained(tmp_path, "hot", "output", 4.5, learning_rate=0.1),
        write_trained(tmp_path, "soft", loss=3.2),
        write_trained(tmp_path, "hot-soft", loss=4.0, learning_rate=0.1),
    ]
    message = outcome_of(paths)
    assert message.startswith(
        "soft (one seed): held-out loss 3.200, 0.100 below cross-entropy (plain, 3.300)"
    )
    paths[2] = write_trained(tmp_path, "softer", loss=3.4)
    assert outcome_of(paths) == (
        "Not every distilled run improved: of the distilled runs, softer (one seed) has the lowest held-out loss, "
        "3.400, 0.100 above cross-entropy (plain, 3.300); teacher 2.752. But hot-soft is 0.500 below hot."
    )
    paths[2] = write_trained(tmp_path, "soft", loss=3.2)
    paths[3] = write_trained(tmp_path, "hot-softer", loss=4.6, learning_rate=0.1)
    assert "improved: hot-softer is 0.100 above hot." in outcome_of(paths)


def test_outcome_claims_no_gain_where_nothing_can_be_compared(tmp_path: Path) -> None:
    hybrid, output = (
        write_run(tmp_path, "hybrid"),
        write_run(tmp_path, "output", "output", steps=401),
    )
    lacks = "no matching cross-entropy run to compare with"
    assert lacks in outcome_of([hybrid]) and lacks in outcome_of([hybrid, output])
    assert "no distilled run to compare with" in outcome_of([output])


def test_the_best_run_is_compared_with_the_next_best(tmp_path: Path) -> None:
    paths = write_measured(tmp_path, {"output": 0.0, "hybrid": 0.1, "third": 0.103})
    found = compare(paths)
    message = describe_next_best(found, found.settings)
    assert message is not None and message.startswith("third is tied with hybrid (+0.00")
    assert "; 95 % over documents: -0.00" in message
    assert message in " ".join(make_report(paths, tmp_path / "report.html").split())
    assert message.split(" (")[0] in (tmp_path / "report.html").read_text()
    two = compare(paths[:2])
    assert describe_next_best(two, two.settings) is None  # the outcome says so already
    assert describe_next_best(two, two.settings[:1]) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"student_parameters": 99}, "different sizes (54,272 and 99 parameters)."),
        ({"trained": {"student": {"model_path": "m"}}}, "did not start from the same weights"),
        ({"trained": {"student": {}}}, None),
    ],
)
def test_the_next_best_is_said_to_be_another_student(
    tmp_path: Path, other: dict[str, Any], says: str | None
) -> None:
    paths = [
        write_run(tmp_path, "best", trained={"student": {}}),
        write_run(tmp_path, "next", validation__loss=4.0, **other),
    ]
    found = compare(paths)
    message = describe_next_best(found, found.settings)
    assert message is not None
    assert (says in message) if says else ("best and next" not in message), message


@pytest.mark.parametrize(
    ("key", "allowed", "warned", "message"),
    [
        ("cache__tail_mass", 0.2, 0.2001, "Tail mass 0.200 is high"),
        ("cache__fidelity_kl", 0.05, 0.051, "Fidelity KL 0.051 nats is high"),
        (
            "validation__leaked_sequences",
            0,
            25,
            "25 of 500 held-out sequences are also in the training text",
        ),
        ("validation__positions", 1000, 999, "Only 999 held-out positions: too few to tell"),
        ("teacher_validation__loss", 3.213, 3.214, "A teacher's held-out loss is worse"),
    ],
)
def test_a_warning_starts_at_its_threshold(
    tmp_path: Path, key: str, allowed: Any, warned: Any, message: str
) -> None:
    assert " ".join(message.split()[-3:]) not in find_all_warnings(
        [write_run(tmp_path, "quiet", **{key: allowed})]
    )
    assert message in find_all_warnings([write_run(tmp_path, "loud", **{key: warned})])


def test_one_seed_and_another_training_text_are_warned_of(tmp_path: Path) -> None:
    paths = write_demo(tmp_path)
    assert "With one seed, the intervals account" in find_all_warnings(paths)
    assert "training text" not in find_all_warnings(paths)
    paths.append(write_run(tmp_path, "longer", validation__tokens="another corpus"))
    need = "add one with the same training text."
    assert f"No margin for longer: no matching cross-entropy run; {need}" in find_all_warnings(
        paths
    )


def write_skipped(folder: Path, used: int) -> Path:
    """Write a run whose corpus had 100 rows, of which some had empty responses and the rest numbers."""
    skipped = Counter(empty_response=(100 - used) // 2, not_text=100 - used - (100 - used) // 2)
    documents = Counts(read=100, used=used, skipped=+skipped, rows={"empty_response": [1, 3, 5]})
    text = TextCounts(documents=documents, train=make_totals(409_600))
    return write_run(folder, f"of_{used}", validation__text=text)


def test_skipped_rows_are_counted_by_reason_and_many_are_warned_of(tmp_path: Path) -> None:
    few, half = write_skipped(tmp_path, 95), write_skipped(tmp_path, 50)
    counted = (
        "corpus: 100 rows read = 50 used + 50 skipped: 25 empty_response (rows 1, 3, 5, ...), 25 not_text; "
        "trained for 4.00 epochs"
    )
    assert counted in " ".join(summarise([half]).split())
    assert counted in render_page(tmp_path, [half])
    message = find_all_warnings([half])
    assert (
        "50% of the corpus's rows were skipped, so of_50 learned nothing from them: 50 of 100"
        in message
    )
    assert "rows were skipped" not in find_all_warnings([few])


@pytest.mark.parametrize(("slope", "is_falling"), [(-0.004, True), (0.0, False), (0.004, False)])
def test_a_run_whose_loss_still_fell_is_said_to_be_improving(
    tmp_path: Path, slope: float, is_falling: bool
) -> None:
    path = write_run(tmp_path, "run")
    noise = np.random.default_rng(3).normal(0, 0.01, 100)
    rows = [f"{i},1,{3 + slope * i + noise[i - 1]},,2,1e-4,9" for i in range(1, 101)]
    log = find_folder(path) / "training_log.csv"
    log.write_text("\n".join([LOG_HEAD, *rows]) + "\n")
    message = "Still improving at the end of training: run. Their training loss fell by 0.0"
    assert (message in find_all_warnings([path])) is is_falling
    assert compare([path]).runs.last_change["run"] == pytest.approx(10 * slope, abs=0.02)
    log.write_text("\n".join([LOG_HEAD, *rows[:7]]) + "\n")
    assert np.isnan(compare([path]).runs.last_change["run"])  # too few to tell


def test_few_documents_are_warned_of(tmp_path: Path) -> None:
    assert "Only 9 held-out documents" in find_all_warnings(
        [write_run(tmp_path, "few", validation__documents=9)]
    )
    assert "held-out documents: too few" not in find_all_warnings([write_run(tmp_path, "many")])


def test_a_run_without_a_margin_says_which_cross_entropy_run_is_missing(tmp_path: Path) -> None:
    others = [
        write_trained(tmp_path, "far", "output", learning_rate=0.1, batch_size=4, weight_decay=0.5),
        write_trained(tmp_path, "near", "output", learning_rate=0.001, lr_scheduler_type="linear"),
    ]
    paths = [write_trained(tmp_path, name, learning_rate=0.002) for name in ("a", "b")]
    need = "training.learning_rate: 0.002 (near: 0.001), training.lr_scheduler_type: cosine (near: linear)."
    lacks = "no matching cross-entropy run; add one with"
    for order in ([*others, *paths], [*paths, *reversed(others)]):
        assert f"No margin for a, b: {lacks} {need}" in find_all_warnings(order)
        lost = "a (one seed; tied with 2 others): held-out loss 3.200 nats/token, no matching cross-entropy run"
        assert lost in outcome_of([paths[0], *others])
    assert f"{lacks} training.distillation_type: output." in find_all_warnings(paths)
    far = write_run(tmp_path, "elsewhere", "output", validation__content="beef", seed=3)
    assert (
        f"{lacks} the same held-out text, training.learning_rate: 0.002 (elsewhere: 0.0001), "
        in (find_all_warnings([paths[0], far]))
    )
    bare = write_run(tmp_path, "bare", "output", trained={})
    assert "not all settings of these runs and of bare are recorded" in find_all_warnings(
        [paths[0], bare]
    )
    many = [write_trained(tmp_path, f"rate{n}", learning_rate=0.1 + n) for n in range(9)]
    message = find_all_warnings([*many, others[0]])
    assert (
        message.count(lacks) == 3 and "No margin for rate3, rate4, rate5, 3 more either" in message
    )
