"""The section `student`: the model to train."""

from typing import TYPE_CHECKING

from retort.config.schema import Found, show
from retort.config.section import Section, Text, setting

if TYPE_CHECKING:
    from retort.config.sections import Config


class Student(Section):
    """The model to train. Set exactly one of config and model_path."""

    config: Text | None = setting(None, is_path=True)
    """Path of a transformers config as JSON; the student starts from random weights. If it has no vocab_size, the
    teacher's is used."""
    model_path: Text | None = setting(None, is_model=True)
    """Hub id or folder of a model whose weights the student starts from, such as final/ or checkpoint-N of another
    run; optimizer and schedule are new."""
    revision: Text | None = None
    """Commit, tag or branch of the student on the Hub; null means its newest when the run first starts."""
    grow_embedding: bool = setting(False, changes_id=False)
    """Where the model of model_path has fewer ids than the tokenizer, add rows to its embedding and output layer, drawn
    around the mean of the others; without it such a student is refused."""


def check_student(c: "Config") -> Found:
    config, weights = c.student.config, c.student.model_path
    if config is None and weights is None:
        yield (
            "student.config and student.model_path are both null, so there is no student. Set "
            "student.config to a transformers config as JSON (config/students/ holds some), or "
            "student.model_path to a model to start from."
        )
    if config is not None and weights is not None:
        yield (
            f"student.config is {show(config)} and student.model_path is {show(weights)}, but a student starts either "
            "with random weights or with those of a model. Set one of the two to null."
        )
    if c.student.grow_embedding and weights is None:
        yield (
            "student.grow_embedding is true, but applies to a model of student.model_path, which is null. Leave "
            "vocab_size out of the JSON of student.config: it is filled in."
        )
