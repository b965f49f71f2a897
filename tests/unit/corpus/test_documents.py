"""Documents: assigned to train or val by content, cleaned, counted."""

from collections import Counter
from pathlib import Path

import pytest

from retort.config.sections import Dataset
from retort.corpus.documents import Counts, Document, is_held_out, make_document
from support.corpora import DEFAULTS, read_all, read_shards, write_jsonl, write_numbered
from support.sections import replace


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_numbered(tmp_path_factory.mktemp("numbered"))


def test_the_split_depends_on_content_and_seed_and_nothing_else(
    numbered: Dataset, tmp_path: Path
) -> None:
    dataset = replace(numbered, validation_fraction=0.3)
    sides = {d.text: d.split for d in read_all(dataset)}
    assert set(sides.values()) == {"train", "val"}
    rows = [{"text": text} for text in sorted(sides, reverse=True)] * 2
    copy = replace(dataset, data_files=str(write_jsonl(tmp_path / "c.jsonl", rows)), shuffle=True)
    shards, _ = read_shards(copy, 7)
    assert all(sides[d.text] == d.split for shard in shards for d in shard)
    assert sides != {d.text: d.split for d in read_all(replace(dataset, seed=5))}


def test_the_fraction_held_out_is_the_fraction_asked_for() -> None:
    for fraction in (0.01, 0.25):
        held = sum(is_held_out(f"text {i}", seed=0, fraction=fraction) for i in range(20_000))
        assert abs(held / 20_000 - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


@pytest.mark.parametrize("max_samples", [2, 10, 50])
def test_a_trial_of_few_documents_holds_out_at_least_one(
    numbered: Dataset, max_samples: int
) -> None:
    dataset = replace(numbered, max_samples=max_samples, validation_fraction=0.01)
    sides = [d.split for d in read_all(dataset)]
    assert sides[0] == "val"
    assert "train" in sides
    assert "val" not in {d.split for d in read_all(replace(dataset, validation_fraction=0.0))}


def test_the_prompt_counts_for_the_split() -> None:
    dataset = replace(
        DEFAULTS, prompt_column="p", response_column="r", validation_fraction=0.5, name="json"
    )
    rows = [{"p": f"prompt {i}", "r": "yes"} for i in range(50)]
    made = [make_document(r, dataset, index=0, split=None, counts=Counts()) for r in rows]
    assert {d.split for d in made if d} == {"train", "val"}


def test_skipped_documents_are_counted_by_reason(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "p", "response": "fine", "category": "easy", "language": 7}',
        '{"prompt": "p", "response": " \\u0000 "}',
        '{"prompt": " ", "response": ""}',
        '{"prompt": "p", "response": null}',
        '{"prompt": "p"}',
        '{"prompt": 5, "response": "r"}',
        '{"prompt": "", "response": "no prompt"}',
        '{"prompt": "a\\u0000", "response": "b\\u0000\\ud800c \\ud83d\\ude00"}',
        "",
        '{"prompt": "p", "response": ["list"]}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    dataset = replace(
        DEFAULTS,
        name="json",
        data_files=str(path),
        prompt_column="prompt",
        response_column="response",
        validation_fraction=0.0,
    )
    shards, counts = read_shards(dataset, 2)
    assert counts == Counts(
        read=9,
        used=3,
        skipped=Counter({"empty_response": 1, "empty": 1, "not_text": 4}),
        cleaned=Counter({"nul": 1, "lone_surrogate": 1}),
        rows={"empty_response": [1], "empty": [2], "not_text": [3, 4, 5]},
    )
    assert shards == [
        [
            Document(0, "fine", "p", "easy", "7", "train"),
            Document(6, "no prompt", "", None, None, "train"),
        ],
        [Document(7, "b\ufffdc \U0001f600", "a", None, None, "train")],
    ]
