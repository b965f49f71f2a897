"""Comparison of two tokenizers: does every id mean the same token? Distributions and weights are paired by id.

Sizes and files do not tell: vocabularies of equal size may differ, and files may differ only in the chat template or
the choice of special tokens.
"""

from typing import Any

from retort.tokens.tokenizer import load_tokenizer


def min_output_width(tokenizer: Any) -> int:
    """Return the least width of an output layer that can predict every token; ids may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def find_difference(tokenizer: Any, other: Any, *, may_lack: bool = False) -> str | None:
    """Return how ids of `tokenizer` mean other tokens in `other`, with an example; None if all mean the same.

    Extra tokens of `other` do not matter. may_lack: a token that `other` lacks is fine if its id is unused there.
    """
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    names = {i: token for token, i in theirs.items()}
    different = [
        (token not in theirs, i, token)
        for token, i in mine.items()
        if theirs.get(token) != i and not (may_lack and token not in theirs and i not in names)
    ]
    if not different:
        return None
    is_missing, i, token = min(different)
    if not is_missing:
        there = f"is id {theirs[token]} in the second"
    elif i in names:
        there = f"is missing in the second, where id {i} is {names[i]!r}"
    else:
        there = f"is missing in the second, where id {i} is unused"
    return f"{token!r}, id {i} in the first, {there}; {len(different):,} of {len(mine):,} tokens differ"


def require_teacher_ids(
    tokenizer: Any, teachers: Any, *, width: int, source: str, teacher: str
) -> None:
    """Raise ValueError unless every id of the text's tokenizer means the same token in the teacher's, `teachers`.

    source, teacher: where the two were loaded from; width: of the teacher's output layer, in tokens.
    """
    if len(tokenizer) > width:
        raise ValueError(
            f"the tokenizer {source!r} has {len(tokenizer)} tokens, but the output layer of teacher {teacher!r} has "
            f"only {width}: they do not belong together. Remove dataset.tokenizer to use the teacher's own; only "
            "runs of type output can use another one."
        )
    difference = find_difference(tokenizer, teachers)
    if difference:
        raise ValueError(
            f"the text's tokenizer {source!r} and that of the teacher {teacher!r} give different ids: {difference}. "
            "The teacher's distributions would be paired with wrong tokens. Remove dataset.tokenizer to use the "
            "teacher's own (without the workflow: tokenize with it); only runs of type output can use another one."
        )


def require_student_ids(
    tokenizer: Any, *, source: str, student: str, revision: str | None = None
) -> str | None:
    """Raise ValueError when an id of the text's tokenizer means another token in the student's own.

    Ids unused in the student's tokenizer are accepted: they are learned, and a base model's layer often has spare rows
    for the tokens of its instruct variant. Returns why the two could not be compared, or None if they were.
    """
    try:
        own = load_tokenizer(student, revision=revision)
    except ValueError as error:
        return f"the student's own tokenizer was not compared with the text's: {error}"
    difference = find_difference(tokenizer, own, may_lack=True)
    if difference:
        raise ValueError(
            f"the text's tokenizer {source!r} and that of the student {student!r} give different ids: {difference}. "
            "The student's weights would be used for wrong tokens. Use a student with the same tokenizer, or "
            "student.config, which starts from random weights."
        )
    return None
