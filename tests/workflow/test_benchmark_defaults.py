"""The benchmark of defaults: its students are runs of the pipeline, made once; gains are between equal seeds."""

import re
from dataclasses import replace

import pytest

from support.place import REPOSITORY, TINY, Place, snapshot


def test_students_are_made_once_and_compared_seed_by_seed(
    fresh: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks.defaults import __main__ as benchmark
    from benchmarks.defaults import experiment as runs

    caches = {name: runs.CACHES[name] for name in ("top_k 64", "top_p 0.001")}
    for module in (benchmark, runs):
        monkeypatch.setattr(module, "CACHES", caches)
    tiny = {name: TINY[name] for name in ("dataset", "teacher")}
    monkeypatch.setattr(runs, "TEACHERS", {"tiny": tiny})
    monkeypatch.setattr(benchmark, "RATES", (1e-4, 1e-2))
    monkeypatch.setattr(benchmark, "ALPHAS", (0.1,))
    monkeypatch.chdir(fresh.path)
    experiment = runs.Experiment(fresh.path, steps=10)
    text = runs.Way("tiny", 16, 1, rate=1e-2)
    made = fresh.execute(
        experiment.write_command([replace(text, cache=c, alpha=0.1) for c in caches])
    )
    assert made.returncode == 0, made.output
    benchmark.compare(experiment, "tiny", (16, 1), 2)
    said = capsys.readouterr().out
    before = snapshot(fresh.results / "runs")
    benchmark.compare(experiment, "tiny", (16, 1), 2)
    assert snapshot(fresh.results / "runs") == before
    assert "1e-04: " in said or "0.0001: " in said

    # Ten times ten steps at 1e-2 teach more than at 1e-4, so that is the rate of the other students.
    distilled = replace(text, cache="top_p 0.001", alpha=0.1)
    losses = {
        seed: [experiment.measure(replace(way, seed=seed)).loss for way in (text, distilled)]
        for seed in (0, 1)
    }
    gains = [hard - soft for hard, soft in losses.values()]
    mean, half = sum(gains) / 2, abs(gains[0] - gains[1]) / 2
    (line,) = re.findall(r"^top_p 0.001 +1 +0.1 +0.01 .*$", said, re.MULTILINE)
    found = [float(word) for word in re.findall(r"-?[\d.]+", line.split("0.01 ")[1])]
    assert found[1] == pytest.approx(sum(soft for _, soft in losses.values()) / 2, abs=6e-4)
    assert found[3:5] == pytest.approx([mean, 12.706 * half], abs=6e-4)
    assert found[0] == pytest.approx(experiment.measure(distilled).bytes, abs=0.06)
    assert found[-1] == 2
