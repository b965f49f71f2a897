"""How long a student's step takes on the device at hand, and its memory, from some seconds of its real training."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from retort.config.sections import Student, Tracking, Training
from retort.estimate.calibrate import SECONDS, choose_clock
from retort.estimate.options import Measured
from retort.models.load import read_peak_memory
from retort.tokens.sequences import SequenceTable
from retort.training.arguments import training_arguments
from retort.training.job import TrainingJob
from retort.training.loop import build_trainer

_LEAST_STEPS = 3


class _Watch(TrainerCallback):  # type: ignore[misc]  # of transformers
    """The seconds of each step; ends the training when there are enough."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.append(self.clock() - self.started)
        is_enough = len(self.times) > _LEAST_STEPS and sum(self.times) > SECONDS / 2
        control.should_training_stop = is_enough or sum(self.times) > 3 * SECONDS


def time_student(
    student: Student,
    training: Training,
    table: SequenceTable,
    *,
    tokenizer: Any,
    vocabulary: int,
    max_length: int,
) -> Measured | None:
    """Return the seconds of a step of a student that learns from a text, and the most memory of this process.

    None where there is too little text.

    It is the real training, from the text alone: learning from a cache takes as long to within a tenth.
    """
    torch.set_num_threads(training.cpu_threads)
    quick = training.model_copy(
        update={
            "distillation_type": "output",
            "alpha": 1.0,
            "alpha_end": None,
            "max_steps": 10**6,
            "dataloader_num_workers": 0,
            "eval_steps": None,
            "warmup_steps": 0,
            "resume_from_checkpoint": None,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        job = TrainingJob(
            name="estimate",
            identity="estimate",
            source=table,
            student=student,
            training=quick,
            tracking=Tracking(),
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            max_length=max_length,
        )
        arguments = training_arguments(Path(folder), job)
        arguments.save_strategy, arguments.logging_strategy = "no", "no"
        trainer = build_trainer(arguments, job)
        watch = _Watch(choose_clock(training.cpu_threads))
        trainer.add_callback(watch)
        trainer.train()
    timed = watch.times[1:]
    memory = read_peak_memory(arguments.device)
    return Measured(float(np.mean(timed)), memory) if timed else None
