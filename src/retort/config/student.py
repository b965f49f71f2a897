"""The section `student`: the model to train."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from retort.config.schema import Found, show
from retort.config.section import Count, NonEmptyUnique, NonNegative, Section, Text, setting

if TYPE_CHECKING:
    from retort.config.sections import Config


class FromTeacher(Section):
    """The student starts as a part of the teacher, or of the model of student.model_path where that is set: pruned
    once, before training. A size that is null stays as it is there."""

    layers: Count | None = None
    """Number of layers to keep, spread evenly from the first to the last. To choose them yourself set layer_indices."""
    layer_indices: NonEmptyUnique[NonNegative] | None = None
    """The layers to keep, in ascending order from 0, instead of their number."""
    hidden_size: Count | None = None
    """Hidden channels to keep, the same in all layers. As the two below, for decoders like Llama only (Qwen, Mistral,
    Gemma, SmolLM): what the model is most active in on a sample of the training text is kept."""
    intermediate_size: Count | None = None
    """Neurons of the MLP to keep in each layer."""
    num_attention_heads: Count | None = None
    """Attention heads to keep in each layer, of the same size; heads that share a key head stay together."""
    vocab_size: Count | None = None
    """Rows of embedding and output layer to keep, the first: cuts the padding beyond the tokenizer's ids, no token."""
    calibration_samples: Count = 256
    """Training sequences, evenly spaced, that activations are measured on."""

    @property
    def sizes(self) -> dict[str, Any]:
        """What is asked for, by key; empty if the student does not start as a part of another model."""
        names = [name for name in type(self).model_fields if name != "calibration_samples"]
        known = {name: getattr(self, name) for name in names}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def is_measured(self) -> bool:
        """Whether what to keep depends on activations, that is, on text."""
        return bool({"hidden_size", "intermediate_size", "num_attention_heads"} & self.sizes.keys())


class Student(Section):
    """The model to train. Set one of config, model_path and from_teacher; with model_path, from_teacher prunes that
    model."""

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
    from_teacher: FromTeacher = Field(default_factory=FromTeacher)
    license: Text | None = setting(None, changes_id=False)
    """The student's licence in its model card, by its name on the Hub, such as apache-2.0. null takes that of the model
    it starts from, if its card is here, and leaves it to be filled in otherwise."""

    @property
    def is_pruned(self) -> bool:
        """Whether the student starts as a part of another model."""
        return bool(self.from_teacher.sizes)

    @property
    def start(self) -> str:
        """What the student starts from, in words: a path, or what is kept of a model."""
        if not self.is_pruned:
            return str(self.config or self.model_path)
        sizes = (f"{key} {show(value)}" for key, value in self.from_teacher.sizes.items())
        return f"{', '.join(sizes)} of {self.model_path or 'the teacher'}"


def check_student(c: "Config") -> Found:
    config, weights = c.student.config, c.student.model_path
    if config is None and weights is None and not c.student.is_pruned:
        yield (
            "student.config and student.model_path are both null, so there is no student. Set "
            "student.config to a transformers config as JSON (config/students/ holds some), "
            "student.model_path to a model to start from, or student.from_teacher.layers to start with some of the "
            "teacher's layers."
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


def check_from_teacher(c: "Config") -> Found:
    student, part = c.student, c.student.from_teacher
    if not student.is_pruned:
        return
    if student.config is not None:
        yield (
            f"student.from_teacher is set ({student.start}), and student.config is {show(student.config)}, but a "
            "student has either weights of the teacher or random ones of a config. Set student.config: null, or leave "
            "student.from_teacher out."
        )
    if part.layers is not None and part.layer_indices is not None:
        yield (
            f"student.from_teacher.layers is {part.layers} and student.from_teacher.layer_indices is "
            f"{show(list(part.layer_indices))}. Set one of the two: a number of layers, or the layers."
        )
    if part.layer_indices is not None and list(part.layer_indices) != sorted(part.layer_indices):
        yield (
            f"student.from_teacher.layer_indices is {show(list(part.layer_indices))}, but layers keep their order. "
            f"Write {show(sorted(part.layer_indices))}."
        )
    if student.model_path is None and c.teacher.model_path is None:
        yield (
            f"student.from_teacher is set ({student.start}), but teacher.model_path is null. Set teacher.model_path, "
            "or student.model_path to the model to prune."
        )
    if student.model_path is None and c.teacher.trust_remote_code:
        yield (
            f"student.from_teacher is set ({student.start}), but teacher.trust_remote_code is true: code that comes "
            "with a model is not pruned. Use a teacher that transformers has the code of, or student.config."
        )
