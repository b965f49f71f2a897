"""Tokenizers are compared by the tokens that ids mean, not by size or files."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from retort.tokens.tokenizer import load_tokenizer
from retort.tokens.vocabularies import (
    find_difference,
    min_output_width,
    require_student_ids,
    require_teacher_ids,
)
from support.tiny import NUM_TOKENS, WIDTH, name_token, swap_tokens


@pytest.fixture
def own(tiny_teacher: Path) -> Any:
    return load_tokenizer(str(tiny_teacher))


def test_vocabularies_of_equal_size_may_differ(
    own: Any, tiny_teacher: Path, tmp_path: Path
) -> None:
    swapped = swap_tokens(tmp_path / "swapped", tiny_teacher)
    other = load_tokenizer(str(swapped))
    assert len(other) == len(own) and set(other.get_vocab()) == set(own.get_vocab())
    one, two = own.convert_tokens_to_ids(["a", "b"])
    found = find_difference(own, other)
    assert found == (
        f"'a', id {one} in the first, is id {two} in the second; 2 of {NUM_TOKENS} tokens differ"
    )
    with pytest.raises(ValueError, match=r"different ids: 'a', id .* paired with wrong tokens"):
        require_teacher_ids(own, other, width=WIDTH, source="a", teacher="b")
    with pytest.raises(ValueError, match=rf"student '{swapped}' give different ids: 'a', id"):
        require_student_ids(own, source="a", student=str(swapped))


def test_a_chat_template_and_special_tokens_change_no_id(
    own: Any, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "chat")
    other = load_tokenizer(str(tiny_teacher))
    other.chat_template = "{{ messages[0].content }}"
    other.pad_token = other.eos_token = "<s>"
    other.save_pretrained(tmp_path / "chat")
    other = load_tokenizer(str(tmp_path / "chat"))
    assert other.chat_template and other.eos_token_id != own.eos_token_id
    assert find_difference(own, other) is None and find_difference(other, own) is None
    require_teacher_ids(own, other, width=WIDTH, source="a", teacher="b")
    assert require_student_ids(own, source="a", student=str(tmp_path / "chat")) is None


def test_an_id_unused_in_the_other_is_fine_for_a_student_and_not_for_a_teacher(
    own: Any, tiny_teacher: Path, tmp_path: Path
) -> None:
    instruct = load_tokenizer(str(name_token(tmp_path / "instruct", tiny_teacher, "<|user|>")))
    assert instruct.convert_tokens_to_ids("<|user|>") == NUM_TOKENS
    assert find_difference(own, instruct) is None, "extra tokens of the other do not matter"
    assert require_student_ids(instruct, source="a", student=str(tiny_teacher)) is None
    words = rf"'<\|user\|>', id {NUM_TOKENS} in the first, is missing in the second, where id {NUM_TOKENS} is unused"
    with pytest.raises(ValueError, match=words):
        require_teacher_ids(instruct, own, width=WIDTH, source="a", teacher="b")


def test_one_id_with_two_names_is_a_difference_for_both(tiny_teacher: Path, tmp_path: Path) -> None:
    one = load_tokenizer(str(name_token(tmp_path / "one", tiny_teacher, "<|user|>")))
    two = name_token(tmp_path / "two", tiny_teacher, "<|bot|>")
    words = rf"'<\|user\|>', id {NUM_TOKENS} .* is missing in the second, where id {NUM_TOKENS} is '<\|bot\|>'; 1 of"
    with pytest.raises(ValueError, match=words):
        require_student_ids(one, source="a", student=str(two))
    with pytest.raises(ValueError, match=words):
        require_teacher_ids(one, load_tokenizer(str(two)), width=WIDTH, source="a", teacher="b")


def test_ids_with_gaps_need_a_layer_as_wide_as_the_largest_id(own: Any) -> None:
    class Gap:
        def __len__(self) -> int:
            return 2

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 7}

    assert min_output_width(own) == NUM_TOKENS and min_output_width(Gap()) == 8


def test_a_student_without_a_tokenizer_is_not_compared(
    own: Any, tiny_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    found = require_student_ids(own, source="a", student=str(tmp_path / "bare"))
    assert found and re.match("the student's own tokenizer was not compared.*bare", found)
