"""A sample of a teacher's own distributions says what its cache will take, whatever the teacher."""

from pathlib import Path
from typing import Any

import pytest

from retort.cache.cost import estimate_cost
from retort.estimate.plan import plan_cache
from retort.tokens.index import TokenIndex
from support.jobs import make_job
from support.records import make_index_record
from support.sections import section
from support.tiny import WIDTH, make_cache, record, score_held_out


@pytest.fixture(scope="module")
def features(
    tmp_path_factory: pytest.TempPathFactory, index: TokenIndex, tiny_teacher: Path
) -> Path:
    folder = tmp_path_factory.mktemp("features")
    samples = section("evaluation.samples", num_samples=0)
    return score_held_out(folder, index, tiny_teacher, fidelity_positions=900, samples=samples)


@pytest.mark.parametrize(
    "cache",
    [
        {
            "method": "top_p",
            "min_probability": 1e-5,
        },  # of this near-uniform teacher it keeps all ids
        {"method": "sampled", "head_probability": 0.05},
        {"top_k": 8},
    ],
    ids=["top_p", "sampled", "top_k"],
)
def test_the_plan_is_what_the_merged_cache_takes(
    cache: dict[str, Any], tmp_path: Path, index: TokenIndex, tiny_teacher: Path, features: Path
) -> None:
    job = make_job(cache=section("cache", **cache))
    paths = {"index_path": index.path, "fingerprint_path": record(tmp_path, tiny_teacher)}
    cost = plan_cache(tmp_path, job, features_path=features, **paths)
    made = make_cache(tmp_path, index.path, tiny_teacher, **cache)
    paid = made.record_bytes + made.table_bytes
    assert (cost.basis, cost.positions) == ("sample", made.table.num_positions)
    assert cost.record_bytes == pytest.approx(paid, rel=0.05)
    assert cost.relative_error is not None and 0 < cost.relative_error < 0.1
    assert made.path.stat().st_size <= cost.total_bytes / 2


def test_without_scores_a_table_is_used_and_said(
    tmp_path: Path, index: TokenIndex, tiny_teacher: Path
) -> None:
    job = make_job(cache=section("cache", method="top_p"))
    paths = {"index_path": index.path, "fingerprint_path": record(tmp_path, tiny_teacher)}
    cost = plan_cache(tmp_path, job, features_path=None, **paths)
    assert (cost.basis, cost.relative_error, cost.sampled_positions) == ("table", None, 0)


def test_the_smallest_change_that_fits_is_named(tmp_path: Path) -> None:
    merge = section("merge", mode="copy")
    cache = section("cache", top_k=64)

    def plan(positions: int) -> str:
        index = make_index_record(positions, num_parts=3)
        with pytest.raises(ValueError) as refusal:
            estimate_cost(index, cache, merge, vocabulary=WIDTH, folder=tmp_path)
        return str(refusal.value)

    free = estimate_cost(
        make_index_record(9, num_parts=3), cache, merge, vocabulary=WIDTH, folder=tmp_path
    ).disk_free_bytes
    assert "set merge.mode: virtual" in plan(round(free / 264 / 1.5))
    far = plan(free // 100)
    assert "virtual" not in far and "lower dataset.max_samples to" in far
