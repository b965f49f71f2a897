"""The benchmark of defaults: its students are runs of the pipeline, made once; gains are between equal seeds."""

import re
from dataclasses import replace

import pytest

from support.place import REPOSITORY, TINY, Place, snapshot


@pytest.mark.slow
def test_students_are_made_once_and_compared_seed_by_seed(
    fresh: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks.defaults import __main__ as benchmark
    from benchmarks.defaults import experiment as runs

    caches = {name: runs.CACHES[name] for name in ("top_k 64", "top_p 0.001")}
    for module in (benchmark, runs):
        monkeypatch.setattr(module, "CACHES", caches)
    monkeypatch.setattr(runs, "TEACHERS", {"tiny": {k: TINY[k] for k in ("dataset", "teacher")}})
    monkeypatch.setattr(benchmark, "RATES", (1e-4, 1e-2))
    monkeypatch.setattr(benchmark, "ALPHAS", (0.1,))
    monkeypatch.chdir(fresh.path)
    experiment = runs.Experiment(fresh.path, steps=10)
    soft = runs.Way("tiny", 16, 1, rate=1e-2, cache="top_p 0.001", alpha=0.1)
    config = experiment.describe([replace(soft, cache=name) for name in caches])
    made = fresh.execute(experiment.write_command(config, "merge_h5"))
    assert made.returncode == 0, made.output
    benchmark.compare(experiment, soft, num_seeds=2, is_new=True)
    before = snapshot(fresh.results / "runs")
    said = capsys.readouterr().out
    benchmark.compare(experiment, soft, num_seeds=2, is_new=False)
    table = capsys.readouterr().out
    assert snapshot(fresh.results / "runs") == before
    assert table.strip() and said.endswith(table)

    # Ten steps at 1e-2 teach more than ten at 1e-4, so that is the rate of the other students.
    (line,) = re.findall(r"^top_p 0.001 +1 +0.1 +0.01 (.*)$", table, re.MULTILINE)
    size, loss, _, *gains, seeds = [float(word) for word in re.findall(r"-?[\d.]+", line)]
    pairs = [
        (experiment.measure(replace(benchmark.without_teacher(soft), seed=seed)), own)
        for seed in (0, 1)
        if (own := experiment.measure(replace(soft, seed=seed)))
    ]
    differences = [hard.loss - own.loss for hard, own in pairs if hard]
    assert size == pytest.approx(pairs[0][1].bytes, abs=0.06)
    assert loss == pytest.approx(sum(own.loss for _, own in pairs) / 2, abs=6e-4)
    mean, reach = (
        sum(differences) / 2,
        12.706 * abs(differences[0] - differences[1]) / 2,
    )  # Student's t
    assert gains == pytest.approx([mean, reach, 0.0, 0.0], abs=1e-3)  # itself is the best one
    assert seeds == 2
