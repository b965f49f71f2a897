"""The journal of answers: kills, changed prompts, other settings, flipped bits."""

from pathlib import Path

import pytest

from retort.synthesis.journal import Journal
from retort.synthesis.prompts import LabeledPrompt
from support.synthesis import make_answer

PROMPTS = [LabeledPrompt(f"p{i}") for i in range(12)]


def test_a_journal_survives_a_torn_line_and_counts_what_was_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, PROMPTS) as journal:
        for index in (0, 1, 2, 3):
            journal.add_sent(index, (10, 20))
        journal.add_answer(0, make_answer("half a \ud83d character"))
        journal.add_unavailable(1)
        journal.add_lost(2)
        assert (journal.reserved.tokens, journal.usage.tokens) == (8 + 30 + 30, 8 + 30)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"event":"answer","index":9,"ans')
    for _ in range(2):
        with Journal(path, PROMPTS) as journal:
            assert list(journal.answers) == [0] and journal.answers[0].text.startswith("half")
            usage = journal.usage
            assert (usage.requests, usage.lost_requests) == (1, 2)  # prompt 2, and 3 in flight
        assert path.read_bytes() == whole
    path.write_bytes(b'{"event":"other","index":1}\n' + whole)
    with pytest.raises(ValueError, match="line 1, is not a line of a journal"):
        Journal(path, PROMPTS).__enter__()
    assert path.read_bytes().endswith(whole), "nothing that was paid for is cut off"


def test_an_answer_stays_with_its_prompt_when_other_prompts_change(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, [LabeledPrompt(text) for text in ("one", "two", "three")]) as journal:
        for index, text in enumerate(("1", "2", "3")):
            journal.add_sent(index, (10, 20))
            journal.add_answer(index, make_answer(text))
        journal.add_sent(1, (10, 20))
    with Journal(path, [LabeledPrompt(text) for text in ("new", "three", "one")]) as journal:
        assert {index: a.text for index, a in journal.answers.items()} == {1: "3", 2: "1"}
        usage = journal.usage
        assert (usage.requests, usage.lost_requests) == (3, 1), "still paid"


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    """For example, when a standalone command writes beside another synthesis."""
    path = tmp_path / "journal.jsonl"
    with Journal(path, PROMPTS, "greedy") as journal:
        journal.add_sent(1, (10, 20))
        journal.add_answer(1, make_answer("One."))
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 1, .* or has other settings"):
        Journal(path, PROMPTS, "sampled").__enter__()
    with Journal(path, [*PROMPTS, LabeledPrompt("one more")], "greedy") as journal:
        assert journal.answers == {1: make_answer("One.")}
    assert path.read_bytes() == whole


# As version 0.2 wrote it.
EARLIER = (
    r'{"event":"sent","place":0,"prompt":"4a2a28729fac32ba583322296c3b462d","input":10,"output":20,"seal":"6bdcebe1895d0f1c"}'
    "\n"
    r'{"event":"away","place":0,"prompt":"4a2a28729fac32ba583322296c3b462d","seal":"94e922d32f5ca318"}'
    "\n"
    r'{"event":"sent","place":1,"prompt":"be84658b697c9cd6cc49fdcc510be364","input":10,"output":20,"seal":"02f981117c35d512"}'
    "\n"
    r'{"event":"answer","place":1,"prompt":"be84658b697c9cd6cc49fdcc510be364","answer":{"text":"One.","finish":"stop","input_tokens":3,"output_tokens":5,"model":"m-1"},"seal":"705bbf38cdf3425a"}'
    "\n"
)


def test_answers_that_an_earlier_version_paid_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(EARLIER)
    for _ in range(2):  # also with lines of both versions
        with Journal(path, PROMPTS) as journal:
            assert journal.answers[1] == make_answer("One.")
            assert not journal.in_flight and journal.usage.lost_requests == 0
            journal.add_sent(2, (10, 20))
            journal.add_unavailable(2)
    path.write_text(EARLIER.replace("One.", "Two."))
    with pytest.raises(ValueError, match="was edited"):
        Journal(path, PROMPTS).__enter__()


@pytest.mark.slow
def test_no_bit_of_a_journal_changes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, PROMPTS) as journal:
        for index in range(2):
            journal.add_sent(index, (10, 20))
            journal.add_answer(index, make_answer(f"Answer {index}."))
        written = dict(journal.answers)
    whole = path.read_bytes()
    num_refused = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            with Journal(path, PROMPTS) as journal:
                assert journal.answers.items() <= written.items()
        except ValueError:
            num_refused += 1
    assert num_refused >= 8 * len(whole) - 8  # except the last line's end: that line counts as torn
