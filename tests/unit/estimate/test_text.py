"""Tokens that are counted before tokenization are those that tokenization counts."""

from pathlib import Path
from typing import Any

import pytest

from retort.artifacts.project import Corpus, Tokens
from retort.artifacts.responses import Responses
from retort.config.sections import Config
from retort.estimate import text as counting
from retort.estimate.table import format_hours
from retort.estimate.text import UncountedError, count_text
from retort.tokens.index import TokenIndex
from retort.tokens.tokenizer import load_tokenizer
from support.tiny import tiny_dataset


def make_tokens(dataset: Any, folder: Path, *, synthesis: Responses | None = None) -> Tokens:
    """The tokens of a section of documents."""
    corpus = Corpus("0" * 12, folder, dataset, False, "", synthesis)
    return Tokens("1" * 12, folder, corpus, None, None)


def test_a_small_corpus_is_counted_exactly(
    tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path, index: TokenIndex
) -> None:
    tokens = make_tokens(tiny_dataset(tiny_corpus), tmp_path)
    found = count_text(tokens, load_tokenizer(str(tiny_teacher)), given=None).estimate
    train = index.record.train
    assert (found.documents, found.sequences, found.tokens, found.positions, found.longest) == (
        train.documents,
        train.sequences,
        train.tokens,
        train.positions,
        train.longest,
    )
    assert found.relative_error == 0
    indexed = make_tokens(tiny_dataset(tiny_corpus), index.path.parent)
    again = count_text(indexed, None, given=None).estimate
    assert again == found.model_copy(update={"basis": again.basis})


def test_a_larger_one_is_sampled_within_its_interval(
    tmp_path: Path, tiny_corpus: Path, tiny_teacher: Path, index: TokenIndex,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    path = tmp_path / "large.jsonl"
    path.write_text("".join(lines * 10))
    monkeypatch.setattr(counting, "_TOKENIZED_BYTES", path.stat().st_size // 4)
    tokens = make_tokens(tiny_dataset(path), tmp_path)
    found = count_text(tokens, load_tokenizer(str(tiny_teacher)), given=None).estimate
    assert found.relative_error is not None and 0.01 < found.relative_error < 0.3
    assert found.tokens == pytest.approx(
        10 * index.record.train.tokens, rel=2 * found.relative_error
    )
    assert "of 1,200 documents" in found.basis


def test_a_number_that_is_given_needs_no_corpus(tmp_path: Path) -> None:
    tokens = make_tokens(tiny_dataset(tmp_path / "none.jsonl"), tmp_path)
    found = count_text(tokens, None, given=1_000_000).estimate
    assert (found.tokens, found.sequences) == (1_000_000, 20_834)
    with pytest.raises(UncountedError, match="--tokens 1e9"):
        count_text(tokens, None, given=None)


def test_responses_that_are_not_written_yet_are_not_looked_for(tmp_path: Path) -> None:
    responses = Responses("2" * 12, "3" * 12, tmp_path / "synthesis", Config(), "")
    dataset = responses.as_dataset(Config().dataset)
    tokens = make_tokens(dataset, tmp_path, synthesis=responses)
    with pytest.raises(UncountedError, match="has not been written yet"):
        count_text(tokens, object(), given=None)


@pytest.mark.parametrize(
    ("hours", "said"),
    [(0.0001, "1 seconds"), (0.5, "30 minutes"), (5, "5 hours"), (50, "2.08 days"), (4e7, "4,563 years")],
)  # fmt: skip
def test_times_are_said_in_units_that_a_person_reads(hours: float, said: str) -> None:
    assert format_hours(hours) == said
