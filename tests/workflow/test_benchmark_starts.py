"""The benchmark of starts: its students are runs of the pipeline, and gains are between equal seeds."""

import re
from pathlib import Path

import pytest

from support.place import REPOSITORY, TINY, Place


@pytest.mark.slow
def test_parts_and_random_weights_of_their_shape_are_compared_seed_by_seed(
    fresh: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks.defaults.experiment import Experiment
    from benchmarks.training.starts import Comparison, Start, compare, format_table

    monkeypatch.chdir(fresh.path)
    parts = {"layers": {"layers": 1}, "layers, width": {"layers": 1, "intermediate_size": 16}}
    teacher = Path(fresh.path / "teacher")
    dataset = TINY["dataset"] | {"data_files": str(fresh.path / "documents.jsonl")}
    comparison = Comparison(fresh.path, teacher, 2, dataset=dataset, parts=parts)
    found = compare(Experiment(fresh.path, steps=2), comparison, 2)
    assert len(found) == 2 * 3 * 2
    sizes = {(start.part, start.is_random): result.parameters for start, result in found.items()}
    for part in parts:
        assert sizes[part, True] == sizes[part, False]
    assert len(list(fresh.results.glob("pruned/*/pruned.json"))) == 2
    lines = [line for line in format_table(found) if " part " in line]
    gains = [
        min(found[Start(part, True, rate, 0)].loss + found[Start(part, True, rate, 1)].loss
            for rate in (3e-3, 5e-3)) / 2
        - (found[Start(part, False, 1e-3, 0)].loss + found[Start(part, False, 1e-3, 1)].loss) / 2
        for part in parts
    ]  # fmt: skip
    for line, gain in zip(lines, gains, strict=True):
        mean = float(re.findall(r"(-?[\d.]+) \+- ", line)[-1])
        assert mean == pytest.approx(gain, abs=6e-4)
