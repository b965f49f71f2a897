"""Which tokens the ids of two tokenizers mean: distributions and weights are paired by ids alone.

Equal sizes prove nothing, and different files do not either: a chat template, or another choice among the special
tokens, leaves every id with its token.
"""

from typing import Any

from retort.tokens.tokenizer import load_tokenizer


def count_ids(tokenizer: Any) -> int:
    """Return how wide an output layer must be to predict every token: ids may have gaps, so not only their number."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def find_difference(tokenizer: Any, other: Any, *, may_lack: bool = False) -> str | None:
    """Return, with an example, how ids of `tokenizer` mean other tokens in `other`; None where all mean the same.

    What `other` has beyond them does not matter. may_lack: an id that `other` has no token for is no difference, if
    it does not know the token by another id either.
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
    there = "no token" if is_missing else f"id {theirs[token]}"
    instead = (
        f" (id {i} is {names[i]!r} there)" if i in names else f" (nor has id {i} a token there)"
    )
    return (
        f"{token!r}, id {i} in the first, is {there} in the second{instead if is_missing else ''}; {len(different):,} "
        f"of {len(mine):,} tokens differ"
    )


def require_teacher_ids(
    tokenizer: Any, teachers: Any, *, width: int, source: str, teacher: str
) -> None:
    """Raise ValueError unless every id of the text's tokenizer means the same token to the teacher.

    source, teacher: where the text's tokenizer and the teacher's own, `teachers`, were loaded from; width: of the
    teacher's output layer.
    """
    if len(tokenizer) > width:
        raise ValueError(
            f"the tokenizer {source!r} has {len(tokenizer)} tokens, but the output layer of teacher {teacher!r} only "
            f"{width}: they do not belong together. Leave dataset.tokenizer out to use the teacher's own; runs of type "
            "output may keep another one."
        )
    difference = find_difference(tokenizer, teachers)
    if difference:
        raise ValueError(
            f"the text's tokenizer {source!r} and that of the teacher {teacher!r} give different ids: {difference}. "
            "The teacher's distributions would be paired with wrong tokens. Leave dataset.tokenizer out to use the "
            "teacher's own (by hand: tokenize with it); runs of type output may keep another one."
        )


def require_student_ids(tokenizer: Any, *, source: str, student: str) -> str | None:
    """Raise ValueError when a student's own tokenizer gives an id of the text's tokenizer to another token.

    Ids that the student's tokenizer has no token for are learned: a base model's layer often has rows to spare for what
    its instruct variant names. Return why the two could not be compared, None where they were.
    """
    try:
        own = load_tokenizer(student)
    except ValueError as error:
        return f"the student's own tokenizer was not compared with the text's: {error}"
    difference = find_difference(tokenizer, own, may_lack=True)
    if difference:
        raise ValueError(
            f"the text's tokenizer {source!r} and that of the student {student!r} give different ids: {difference}. "
            "What the student's weights know of its tokens would be taken for knowledge of others. Use a student "
            "of the same tokenizer, or student.config, which starts from random weights."
        )
    return None
