"""`retort trial`: through every rule in a folder of its own, then the estimate of the whole by its speed."""

import sys

import pytest

from retort.evaluation.records import Metrics
from retort.tokens.index import IndexRecord
from support.place import Place, tiny

pytestmark = pytest.mark.slow


def test_a_trial_leaves_no_trace_in_the_results_and_ends_with_the_estimate(fresh: Place) -> None:
    fresh.write_config(tiny(training={"max_steps": 5000}))
    said = fresh.execute([sys.executable, "-m", "retort", "trial", "tiny.yaml"])
    assert said.returncode == 0, said.output
    assert not fresh.results.exists()
    trial = fresh.path / "results-trial"
    (index,) = map(IndexRecord.read, trial.glob("tokens/*/index.json"))
    assert 12 <= index.counts.documents.read <= 100
    metrics = {p.parents[3].name for p in trial.glob("runs/*/*/evaluation/*/metrics.json")}
    assert metrics == {"hard", "both"}
    for path in trial.glob("runs/*/*/evaluation/*/metrics.json"):
        Metrics.read(path)
    rest = said.output[said.output.index("The whole run, by this trial's speed") :]
    assert "5,000" in rest and "speed of the students: measured by this trial" in rest

    wrong = fresh.execute([sys.executable, "-m", "retort", "trial", "none.yaml"])
    assert wrong.returncode == 1 and "none.yaml' does not exist" in wrong.output
    none = fresh.execute([sys.executable, "-m", "retort", "trial", "tiny.yaml", "--steps", "0"])
    assert none.returncode == 1 and "--steps is 0: give 1 or more" in none.output
