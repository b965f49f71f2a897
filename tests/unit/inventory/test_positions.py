"""The surprise at a token, where it is kept and where it is not, and its text, whatever the tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from retort.cache.codec import SparseTargets
from retort.inventory.positions import (
    Surprise,
    find_logprob,
    highlight,
    name_token,
    render_html,
    split_text,
)

TEXT = 'Grün ist <b> "schön" 🙂, 漢字\n\tand plain.'


def make_targets(num_exact: int | None = None) -> SparseTargets:
    """One position with two tokens kept, of probability 0.6 and 0.3, and 0.1 outside."""
    return SparseTargets(
        np.array([0, 2]),
        np.array([5, 7], np.int32),
        np.log(np.array([0.6, 0.3], np.float32)),
        np.log(np.array([[0.1]], np.float32)),
        None if num_exact is None else np.array([num_exact]),
    )


def test_a_token_that_is_not_kept_has_at_most_what_the_others_leave() -> None:
    found = [
        find_logprob(make_targets(), 0, 7),
        find_logprob(make_targets(), 0, 6),
        find_logprob(make_targets(1), 0, 7),  # a sampled token's number is a weight
    ]
    assert [is_kept for _, is_kept in found] == [True, False, False]
    assert np.exp([logprob for logprob, _ in found]) == pytest.approx([0.3, 0.1, 0.4], rel=1e-5)


def test_pieces_are_the_text_whatever_the_tokenizer(tiny_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    ids = tokenizer(TEXT)["input_ids"]
    pieces = split_text(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert split_text(None, [3, 1]) == ["3 ", "1 "]
    for at in range(1, len(ids)):
        name = name_token(tokenizer, ids[:at], ids[at])
        assert name and "\N{REPLACEMENT CHARACTER}" not in name


def test_marks_are_colours_brackets_or_a_page() -> None:
    found = Surprise(
        ["a", " b", " <c>", "\nd"], np.array([np.nan, 0.2, 4.0, 6.0]), np.zeros(4, np.bool_)
    )
    assert highlight(found, is_coloured=False) == "a b [[<c>]]\n[[[d]]]"
    spaces = Surprise([" ", "\n", "\n x\n"], np.full(3, 2.0), np.zeros(3, np.bool_))
    assert highlight(spaces, is_coloured=False) == "[ ][ ]\n\n [x]\n"
    coloured = highlight(found, is_coloured=True)
    assert coloured.count("\x1b[0m") == 2 and "\x1b[0m\n" not in coloured.split("<c>")[0]
    page = render_html(found, title="<cache>")
    assert "&lt;c&gt;" in page and "<c>" not in page and "&lt;cache&gt;" in page
    assert found.mean == pytest.approx((0.2 + 4 + 6) / 3)
