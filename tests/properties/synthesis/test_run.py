"""Whatever the order in which answers arrive, and wherever it was interrupted, a synthesis keeps the same examples."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from retort.synthesis.filters import AnswerFilter
from retort.synthesis.journal import Journal
from retort.synthesis.prompts import LabeledPrompt
from retort.synthesis.run import collect_examples
from support.synthesis import NO_PROBLEMS, make_answer, synthesis_section

PROMPTS = [LabeledPrompt(f"p{i}") for i in range(12)]
TEXTS = [f"answer number {i // 2 * 2} is this" if i % 4 == 1 else f"number {i}" for i in range(12)]
TEXTS[5] = ""


def collect(num_wanted: int, order: list[int], answered: list[int]) -> tuple[list[int], set[int]]:
    """Return (indices of the kept examples, indices asked), given the prompts that are already answered."""
    asked: set[int] = set()
    with (
        TemporaryDirectory() as folder,
        Journal(Path(folder) / "journal.jsonl", PROMPTS) as journal,
    ):
        for index in answered:
            journal.add_answer(index, make_answer(TEXTS[index]))

        def ask(indices: Sequence[int]) -> None:
            asked.update(indices)
            for index in sorted(indices, key=order.index):
                journal.add_answer(index, make_answer(TEXTS[index]))

        section = synthesis_section(num_examples=num_wanted, near_duplicates=None)
        answer_filter = AnswerFilter(section, NO_PROBLEMS)
        found = collect_examples(section, PROMPTS, journal, answer_filter, ask)
    return [row["number"] for row in found.rows], asked


@given(st.permutations(range(12)), st.integers(1, 12))
def test_the_examples_depend_on_the_answers_alone(order: list[int], num_wanted: int) -> None:
    whole, asked = collect(num_wanted, order, [])
    before = [index for index in order[:6] if index in asked]
    resumed, rest = collect(num_wanted, order, before)
    assert resumed == whole and rest == asked - set(before)
