"""How a student's weights change: optimizers, learning rate schedules, and which weights are trained."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from retort.config.schema import Found, show
from retort.config.section import Count, Fraction, Positive, Section

if TYPE_CHECKING:
    from retort.config.sections import Config, Training

MUON = "muon"
Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adafactor",
    "muon",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "stable_adamw",
]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Shape = Literal["linear", "cosine", "1-sqrt"]
Beta = Annotated[float, Field(ge=0, lt=1)]

WSD = "warmup_stable_decay"
_COSINES = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
# Which schedules take each key of lr_scheduler_kwargs.
_TAKEN_BY = {
    "num_decay_steps": (WSD,),
    "warmup_type": (WSD,),
    "decay_type": (WSD,),
    "min_lr_ratio": (WSD,),
    "min_lr": _COSINES,
    "min_lr_rate": _COSINES,
    "num_cycles": ("cosine", "cosine_with_restarts", *_COSINES, WSD),
    "lr_end": ("polynomial",),
    "power": ("polynomial",),
    "timescale": ("inverse_sqrt",),
}
_SHARDED = ("adamw_torch_fused", "adamw_torch")  # of which fsdp's shards are known to be right
_WITHOUT = {"adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon")} | dict.fromkeys(
    ("lion_8bit", "lion_32bit"), ("adam_epsilon",)
)


class LrSchedulerKwargs(Section):
    """Further settings of training.lr_scheduler_type, by their names in transformers; null means its own default."""

    num_decay_steps: Count | None = None
    """warmup_stable_decay: the last steps, in which the rate falls; null means a tenth of all steps, rounded up."""
    warmup_type: Shape | None = None
    """warmup_stable_decay: how the rate rises; null means linear."""
    decay_type: Shape | None = None
    """warmup_stable_decay: how the rate falls; null means cosine."""
    min_lr_ratio: Fraction | None = None
    """warmup_stable_decay: the last rate, as a part of learning_rate; null means 0."""
    min_lr: Positive | None = None
    """cosine_with_min_lr, cosine_warmup_with_min_lr: the last rate. These schedules need it, or min_lr_rate."""
    min_lr_rate: Fraction | None = None
    """cosine_with_min_lr, cosine_warmup_with_min_lr: the last rate, as a part of learning_rate."""
    num_cycles: Positive | None = None
    """cosine_with_restarts: how often the rate falls (a whole number); the other cosines and warmup_stable_decay: how
    many waves, where 0.5 falls once, from the peak to the end."""
    lr_end: Positive | None = None
    """polynomial: the last rate; null means 1e-7."""
    power: Positive | None = None
    """polynomial: the exponent; null means 1, a line."""
    timescale: Count | None = None
    """inverse_sqrt: steps in which the rate falls as after a warm-up of so many; null means warmup_steps, or 10,000."""

    @property
    def given(self) -> dict[str, float | int | str]:
        """The settings that are not null."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


def choose_decay_steps(given: int | None, *, max_steps: int) -> int:
    """Return in how many last steps warmup_stable_decay lets the rate fall: those given, or a tenth, rounded up."""
    return given if given is not None else -(-max_steps // 10)


def check_optimizer(c: "Config") -> Found:
    training = c.training
    for key in _WITHOUT.get(training.optim, ()):
        if key in training.model_fields_set:
            yield (
                f"training.{key} is {show(getattr(training, key))}, but training.optim {training.optim!r} has none. "
                "Leave the key out, or use another optimizer."
            )
    if training.strategy == "fsdp" and training.optim not in _SHARDED:
        yield (
            f"training.optim is {training.optim!r}, but training.strategy fsdp trains shards of weights, for which "
            f"only {' and '.join(_SHARDED)} are known to be right. Use one of them, or training.strategy: ddp."
        )


def check_lr_scheduler_kwargs(c: "Config") -> Found:
    schedule, given = c.training.lr_scheduler_type, c.training.lr_scheduler_kwargs.given
    for key, value in given.items():
        if schedule not in _TAKEN_BY[key]:
            yield (
                f"training.lr_scheduler_kwargs.{key} is {show(value)}, but training.lr_scheduler_type {schedule!r} "
                f"has no such setting; {' and '.join(_TAKEN_BY[key])} have. Leave the key out."
            )
    if schedule in _COSINES and len({"min_lr", "min_lr_rate"} & given.keys()) != 1:
        yield (
            f"training.lr_scheduler_type is {schedule!r}, which needs its last rate: set one, not both, of "
            "training.lr_scheduler_kwargs.min_lr and min_lr_rate, such as min_lr_rate: 0.1."
        )
    for key in ("min_lr", "lr_end"):
        rate = getattr(c.training.lr_scheduler_kwargs, key)
        if rate is not None and rate >= c.training.learning_rate:
            yield (
                f"training.lr_scheduler_kwargs.{key}, the last rate, is {show(rate)}, but "
                f"training.learning_rate, the highest, is {show(c.training.learning_rate)}. Give a lower last rate."
            )
    if schedule == "cosine_with_restarts" and given.get("num_cycles", 1) % 1:
        yield (
            f"training.lr_scheduler_kwargs.num_cycles is {given['num_cycles']}, but cosine_with_restarts falls a "
            "whole number of times. Give a whole number."
        )


def check_decay_steps(c: "Config") -> Found:
    if c.training.max_steps is not None:
        yield from find_too_many_steps(c.training, max_steps=c.training.max_steps)


def find_too_many_steps(training: "Training", *, max_steps: int) -> Found:
    """Yield the message where warm-up and decay of warmup_stable_decay take more than all steps."""
    if training.lr_scheduler_type != WSD:
        return
    given = training.lr_scheduler_kwargs.num_decay_steps
    decay = choose_decay_steps(given, max_steps=max_steps)
    if training.warmup_steps + decay > max_steps:
        own = "" if given is not None else " (a tenth of all)"
        yield (
            f"training.warmup_steps is {training.warmup_steps} and the rate falls in the last {decay} steps{own}, more "
            f"than the {max_steps} of the training together. Lower training.warmup_steps or "
            "training.lr_scheduler_kwargs.num_decay_steps, or train longer."
        )


def check_freeze(c: "Config") -> Found:
    for pattern in c.training.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            yield (
                f"training.freeze has {show(pattern)}, which is not a regular expression: {error}. Write one that is "
                "found in the names of the parameters to freeze, such as 'embed_tokens' or 'layers\\.[0-3]\\.'."
            )


def check_attention(c: "Config") -> Found:
    attention = c.training.attn_implementation or ""
    if c.training.packing and not c.training.padding_free and "flash" in attention:
        yield (
            f"training.attn_implementation is {attention!r}, which keeps packed sequences apart in a single row only, "
            "and training.padding_free: false makes several. Leave that key out, or use sdpa or flex_attention."
        )
    if c.training.device == "cpu" and attention not in ("", "eager", "sdpa"):
        yield (
            f"training.attn_implementation is {attention!r}, but training.device is cpu, where only eager and sdpa can "
            "be trained. Use one of them, or leave the key out."
        )


def check_torch_compile(c: "Config") -> Found:
    if c.training.torch_compile and c.training.strategy == "fsdp":
        yield (
            "training.torch_compile is true, but training.strategy is fsdp, whose shards are not compiled. Use "
            "training.torch_compile: false, or training.strategy: ddp."
        )
