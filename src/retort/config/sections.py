"""All settings of one run, assembled from the sections' modules, and where a dotted key is in them."""

from collections.abc import Callable, Iterator, Sequence

from pydantic import Field

from retort.config import (
    cache,
    dataset,
    evaluation,
    lora,
    optimizer,
    output,
    student,
    synthesis,
    teacher,
    training,
)
from retort.config.cache import Cache, Merge
from retort.config.dataset import Dataset
from retort.config.evaluation import HUMANEVAL, Evaluation
from retort.config.output import Output, Tracking
from retort.config.schema import Found, KeyPath
from retort.config.section import Section, item_section, subsection
from retort.config.student import Student
from retort.config.synthesis import Synthesis
from retort.config.teacher import Generation, Teacher
from retort.config.training import Training

__all__ = [
    "HUMANEVAL",
    "Cache",
    "Config",
    "Dataset",
    "Evaluation",
    "Generation",
    "Merge",
    "Output",
    "Student",
    "Synthesis",
    "Teacher",
    "Tracking",
    "Training",
]


class Config(Section):
    """All settings of one run."""

    output: Output = Field(default_factory=Output)
    dataset: Dataset = Field(default_factory=Dataset)
    teacher: Teacher = Field(default_factory=Teacher)
    cache: Cache = Field(default_factory=Cache)
    merge: Merge = Field(default_factory=Merge)
    student: Student = Field(default_factory=Student)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    synthesis: Synthesis = Field(default_factory=Synthesis)
    tracking: Tracking = Field(default_factory=Tracking)


# Checks across keys, in the order of the sections: the functions check_... beside them.
CHECKS: tuple[Callable[[Config], Found], ...] = tuple(
    check
    for module in (
        dataset,
        teacher,
        cache,
        student,
        training,
        optimizer,
        lora,
        evaluation,
        synthesis,
        output,
    )
    for name, check in vars(module).items()
    if name.startswith("check_")
)


def section_at(path: Sequence[str | int]) -> type[Section] | None:
    """Return the class of a section such as ("teacher", "generation") or ("dataset", "mix", 0), None if it is none."""
    section: type[Section] | None = Config
    items: type[Section] | None = None  # of the list of sections that the next step is a number of
    for step in path:
        if items is not None:
            section, items = items if isinstance(step, int) else None, None
            continue
        known = section is not None and step in section.model_fields
        items = item_section(section, str(step)) if section and known else None
        section = subsection(section, str(step)) if section and known else None
    return section


def key_paths(section: type[Section] = Config, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key that is not a section, in order."""
    for name in section.model_fields:
        if below := subsection(section, name):
            yield from key_paths(below, (*path, name))
        else:
            yield (*path, name)


def section_paths(section: type[Section] = Config, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every section, each before those in it."""
    for name in section.model_fields:
        if below := subsection(section, name):
            yield (*path, name)
            yield from section_paths(below, (*path, name))
