"""What to train, on what, and how: all that the training of one student is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retort.cluster.ranks import world_size
from retort.config.sections import Student, Tracking, Training
from retort.losses.terms import LossSettings
from retort.models.causal_lm import CausalLM
from retort.training.batches import TrainingSource
from retort.training.checkpoints import CheckpointId, shared_settings
from retort.training.held_out import HeldOut
from retort.training.origin import Origin


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, and how.

    identity: digest of all that the result depends on; training: with alpha filled in; vocabulary: the student's,
    where its config names none; teacher: a live one, None with a cache or with text alone; ends: the ids that end a
    text (none: the tokenizer's and its template's); max_length: tokens of a packed row; held_out: what it is measured
    on meanwhile, None for nothing. For its model card: facts, digests of what it is trained on; origin, where it comes
    from; written, the section `student` as the config has it.
    """

    name: str
    identity: str
    source: TrainingSource
    student: Student
    training: Training
    tracking: Tracking
    tokenizer: Any
    vocabulary: int
    teacher: CausalLM | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    max_length: int = 0
    held_out: HeldOut | None = None
    origin: Origin = field(default_factory=Origin)
    written: Student | None = None

    @property
    def checkpoint_id(self) -> CheckpointId:
        """Return the id of its checkpoints, from which alone it resumes."""
        strategy = self.training.strategy if world_size() > 1 else "ddp"
        return CheckpointId(self.identity, strategy, shared_settings(self.training))

    @property
    def loss_settings(self) -> LossSettings:
        """Return the settings of its loss, but for the head's scale and softcap."""
        t = self.training
        assert t.alpha is not None
        return LossSettings(
            t.alpha,
            t.temperature,
            t.divergence,
            chunk_size=t.loss_chunk_size,
            skew=t.skew,
            position_weights=t.position_weights,
            alpha_end=t.alpha_end,
            temperature_end=t.temperature_end,
        )
