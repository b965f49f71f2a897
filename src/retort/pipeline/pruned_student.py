"""The shape of a student that starts as a part of a model, before anything is pruned."""

from transformers import PretrainedConfig

from retort.config.sections import Config
from retort.models.load import load_model_config
from retort.pipeline.demo_teacher import demo_config
from retort.pruning.cut import require_prunable
from retort.pruning.shapes import find_mistakes, plan_pruning


def shape_student(config: Config) -> tuple[PretrainedConfig, list[str]]:
    """Return the config that the student will have, and what is wrong with student.from_teacher.

    Where something is wrong, the config is that of the whole model. Raises ValueError when that cannot be loaded, or
    cannot be pruned so.
    """
    student, teacher = config.student, config.teacher
    if student.model_path is None and teacher.model_path == "demo":
        name, whole = "the demo's teacher", demo_config(config.dataset)
    else:
        path, revision = (
            (student.model_path, student.revision)
            if student.model_path
            else (str(teacher.model_path), teacher.revision)
        )
        name, whole = f"the model {path!r}", load_model_config(path, revision=revision)
    if wrong := list(find_mistakes(student, whole, name=name)):
        return whole, wrong
    plan = plan_pruning(student, whole, name=name)
    require_prunable(whole, plan, name=name)
    return plan.config, []
