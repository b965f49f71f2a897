"""The cost said beforehand bounds the cost paid, and a disk that is too small is named."""

from pathlib import Path

import pytest

from retort.cache.cost import describe_cost, estimate_cost
from retort.cache.top_k_codec import TopKCodec
from retort.tokens.index import IndexRecord
from support.records import make_index_record
from support.sections import section
from support.tiny import WIDTH, make_cache, tokenize

COPY, VIRTUAL = section("merge", mode="copy"), section("merge", mode="virtual")


def make_index(positions: int) -> IndexRecord:
    return make_index_record(positions, num_parts=3)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 8, "full"])
def test_the_plan_bounds_what_parts_and_merged_cache_take(
    top_k: int | str, tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path
) -> None:
    index_path = tokenize(tmp_path / "tokens", tiny_corpus, tiny_teacher)
    index, folder = IndexRecord.read(index_path), tmp_path / "logits"
    cost = estimate_cost(
        index, section("cache", top_k=top_k), COPY, vocabulary=WIDTH, folder=folder
    )
    cache = make_cache(folder, index_path, tiny_teacher, top_k=top_k)
    paid = sum(path.stat().st_size for path in folder.rglob("*.h5"))
    assert len(list((folder / "parts").glob("*.h5"))) == cost.parts
    assert cost.positions == cache.table.num_positions
    assert cache.record_bytes <= cost.record_bytes + 18 * len(cache)
    assert 0.3 * cost.total_bytes < paid <= cost.total_bytes


@pytest.mark.parametrize(("top_k", "kept"), [(64, 64), (500, 320), ("full", 320)])
def test_bytes_per_position_follow_from_the_codec(
    top_k: int | str, kept: int, tmp_path: Path
) -> None:
    cache = section("cache", top_k=top_k, temperatures=[1.0, 2.0, 4.0])
    cost = estimate_cost(make_index(1000), cache, COPY, vocabulary=WIDTH, folder=tmp_path)
    assert cost.record_bytes == 1000 * (kept * (2 + 2) + 3 * 4)
    wide = TopKCodec((1.0,), 128_000, 64).bytes_per_position
    assert wide == 64 * (4 + 2) + 4  # ids beyond 65,535 take four bytes


def test_a_disk_that_is_too_small_is_refused_with_both_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "made" / "yet"
    with pytest.raises(ValueError) as refusal:
        estimate_cost(make_index(10**15), section("cache"), COPY, vocabulary=WIDTH, folder=folder)
    sentence = str(refusal.value)
    assert "1,000,000,000,000,000 positions" in sentence and f"{tmp_path} has" in sentence
    assert (
        "keep less of each distribution (cache.method is top_k)" in sentence
        and "output.cache_dir" in sentence
    )
    assert not folder.exists()  # planning makes nothing


def test_a_relative_folder_is_looked_up_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cost = estimate_cost(
        make_index(10), section("cache"), COPY, vocabulary=WIDTH, folder=Path("results/x")
    )
    assert cost.disk_free_bytes > 0


def test_a_virtual_cache_needs_its_records_once(tmp_path: Path) -> None:
    copied, virtual = (
        estimate_cost(make_index(10**6), section("cache"), merge, vocabulary=WIDTH, folder=tmp_path)
        for merge in (COPY, VIRTUAL)
    )
    assert copied.total_bytes - virtual.total_bytes == virtual.record_bytes


def test_what_is_no_bound_is_not_called_one(tmp_path: Path) -> None:
    cache = section("cache", method="top_p")
    line = describe_cost(
        estimate_cost(make_index(9), cache, COPY, vocabulary=WIDTH, folder=tmp_path)
    )
    assert "for a usual teacher" in line and "at most" not in line


def test_a_store_takes_the_records_but_for_the_part_at_work(tmp_path: Path) -> None:
    arguments = make_index(1_000_000), section("cache"), COPY
    local = estimate_cost(*arguments, vocabulary=WIDTH, folder=tmp_path)
    stored = estimate_cost(*arguments, vocabulary=WIDTH, folder=tmp_path, is_stored=True)
    assert stored.record_bytes == local.record_bytes
    saved = local.total_bytes - stored.total_bytes
    assert saved == 2 * local.record_bytes - local.record_bytes // local.parts


def test_cost_is_said_in_one_line_and_kept_as_json(tmp_path: Path) -> None:
    cost = estimate_cost(
        make_index(1_000_000), section("cache"), COPY, vocabulary=WIDTH, folder=tmp_path
    )
    line = describe_cost(cost)
    assert line.startswith(
        "cache: 1,000,000 positions in 3 parts, 264.0 bytes each (264.0 MB, at most, by the codec)"
    )
    assert "\n" not in line
    assert cost.record_bytes == 264_000_000
    assert describe_cost(
        estimate_cost(make_index(0), section("cache"), COPY, vocabulary=5, folder=tmp_path)
    )
