"""Classes of positions, against loops over documents and tokens."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retort.corpus.documents import Document
from retort.evaluation.breakdowns import Classes, find_classes
from retort.tokens.sequences import SequenceTable, build_table
from retort.tokens.tokenize import TokenCounts, tokenize_documents
from retort.tokens.tokenizer import load_tokenizer
from support.sections import section


@pytest.fixture(scope="module")
def table(tiny_teacher: Path) -> SequenceTable:
    """Documents of 1 to 400 words, cut at 16 tokens, with labels."""
    tokenizer = load_tokenizer(str(tiny_teacher))
    documents = [
        Document(
            i,
            "bird house " * (1 + 17 * i) + "z" * i,
            None,
            ("code", None, "prose")[i % 3],
            ("en", "de")[i % 2],
            "val",
        )
        for i in range(12)
    ]
    dataset = section("dataset", max_length=16)
    return tokenize_documents(documents, tokenizer, dataset, counts=TokenCounts())


def names_of(classes: Classes) -> list[str]:
    return [classes.names[index] for index in classes.indices]


def positions(table: SequenceTable) -> list[tuple[int, int, int]]:
    """Return (document, tokens of it before the next token, next token) of each counted position."""
    found = []
    before: Counter[int] = Counter()
    for s in range(len(table)):
        row, document = table[s], int(table.documents[s])
        found += [
            (document, before[document] + t + 1, int(row.ids[t + 1]))
            for t in np.flatnonzero(row.loss_mask).tolist()
        ]
        before[document] += len(row.ids) - 1
    return found


def test_places_count_tokens_of_the_document_over_all_its_sequences(table: SequenceTable) -> None:
    classes = find_classes(table, token_counts=None, teacher_entropy=None)["place"]
    assert classes.names == ("1 to 15", "16 to 63", "64 to 255", "256 to 1,023", "from 1,024")
    for name, (_, before, _) in zip(names_of(classes), positions(table), strict=True):
        low, *high = name.replace(",", "").removeprefix("from ").split(" to ")
        assert int(low) <= before and all(before <= int(x) for x in high)


def test_frequency_is_the_rank_in_the_training_text(table: SequenceTable) -> None:
    counts = np.zeros(290, np.int64)  # fewer than there are ids: the last ones do not occur
    rng = np.random.default_rng(0)
    counts[rng.permutation(290)[:240]] = rng.permutation(240) + 1
    classes = find_classes(table, token_counts=counts, teacher_entropy=None)["frequency"]
    order = sorted(range(290), key=lambda token: -counts[token])
    for name, (_, _, token) in zip(names_of(classes), positions(table), strict=True):
        if token >= 290 or counts[token] == 0:
            assert name == "never in training text"
        else:
            rank = order.index(token) + 1
            low, high = name.replace(",", "").removeprefix("rank ").split(" to ")
            assert int(low) <= rank <= int(high) and int(high) in (10, 100, 1000)


def test_entropy_has_fixed_borders(table: SequenceTable) -> None:
    entropy = np.linspace(0, 3.2, table.num_positions)
    classes = find_classes(table, token_counts=None, teacher_entropy=entropy)["entropy"]
    assert classes.names == ("0 to 0.5", "0.5 to 1.5", "1.5 to 3", "from 3")
    for name, value in zip(names_of(classes), entropy, strict=True):
        low = float(name.replace("from ", "").split(" to ")[0])
        assert value >= low
        assert name.startswith("from") or value < float(name.split(" to ")[1])


def test_labels_are_those_of_the_documents(table: SequenceTable) -> None:
    found = find_classes(table, token_counts=None, teacher_entropy=None)
    categories, languages = names_of(found["category"]), names_of(found["language"])
    for category, language, (document, _, _) in zip(
        categories, languages, positions(table), strict=True
    ):
        assert category == ("code", "(none)", "prose")[document % 3]
        assert language == ("en", "de")[document % 2]


def test_of_many_labels_the_smallest_are_one_class() -> None:
    rows = [([1] * (i + 2), [True] * (i + 1) + [False], i, (f"c{i:02d}", "")) for i in range(30)]
    found = find_classes(build_table(rows), token_counts=None, teacher_entropy=None)
    classes = found["category"]
    assert len(classes.names) == 20 and classes.names[-1] == "11 others"
    assert set(classes.names[:-1]) == {f"c{i:02d}" for i in range(11, 30)}
    sizes = Counter(names_of(classes))
    assert sizes["11 others"] == sum(range(1, 12)) and sizes["c29"] == 30


def test_a_partition_with_one_class_is_left_out() -> None:
    table = build_table([([1, 2, 3], [True, True, False], 0, ("a", "b"))])
    assert find_classes(table, token_counts=None, teacher_entropy=np.array([0.1, 0.2])) == {}
