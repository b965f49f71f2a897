"""The section `training.lora`: adapters that are trained in place of a student's weights."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from retort.config.schema import Found, show
from retort.config.section import Count, Section, Texts

if TYPE_CHECKING:
    from retort.config.sections import Config


class Lora(Section):
    """Low-rank adapters of a pretrained student's layers, trained in place of its weights, by peft; null trains all."""

    rank: Count | None = None
    """Rank of the adapters (peft's r); null trains all weights."""
    alpha: Count = 32
    """Adapters are scaled by alpha / rank (peft's lora_alpha)."""
    target_modules: Literal["all-linear"] | Texts = "all-linear"
    """Modules that get an adapter, by the ends of their names, such as [q_proj, v_proj]; all-linear means every linear
    layer but the output layer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters (peft's lora_dropout)."""

    def describe(self) -> str:
        """Return its settings in one line, "none" where all weights are trained."""
        if self.rank is None:
            return "none"
        targets = self.target_modules
        names = targets if isinstance(targets, str) else " ".join(targets)
        return f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout:g}, of {names}"


def check_lora(c: "Config") -> Found:
    training, lora = c.training, c.training.lora
    if lora.rank is None:
        for key in sorted(lora.model_fields_set - {"rank"}):
            yield (
                f"training.lora.{key} is {show(getattr(lora, key))}, but training.lora.rank is null, which trains all "
                "weights. Set training.lora.rank, such as 16, or leave the key out."
            )
        return
    what = f"training.lora.rank is {lora.rank}"
    if c.student.config is not None:
        yield (
            f"{what}, but student.config is {show(c.student.config)}: adapters change the layers of a pretrained "
            "student, and random ones would stay as they are. Set student.model_path or student.from_teacher in its "
            "place, or training.lora: null."
        )
    if training.freeze:
        yield (
            f"{what} and training.freeze is {show(training.freeze)}, but with LoRA all weights are frozen, and the "
            "adapters alone are trained. Leave training.freeze out, or choose layers by training.lora.target_modules."
        )
    if c.student.grow_embedding:
        yield (
            f"{what} and student.grow_embedding is true, but adapters train no embedding, so that new rows would stay "
            "random. Use training.lora: null, or a student of the same tokenizer."
        )
    for key, value, instead in (("strategy", "fsdp", "ddp"), ("torch_compile", True, "false")):
        if getattr(training, key) == value:
            yield (
                f"{what} and training.{key} is {show(value)}, which are not supported together. Use training.{key}: "
                f"{instead}, or training.lora: null."
            )
