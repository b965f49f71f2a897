"""What the device at hand does in a second, and what a teacher's distributions take, from some seconds of real work.

On a CPU the time is that of its cores, as if nothing else used them.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from retort.cache.codec import Codec, TokenOrder
from retort.cache.cost import SampledBytes
from retort.config.sections import Config, Student, Tracking, Training
from retort.estimate.cache_bytes import bytes_of_records, choose_sequences
from retort.models.causal_lm import CausalLM
from retort.models.load import load_teacher
from retort.teacher.scoring import Scorer, score_part
from retort.tokens.sequences import SequenceTable, concatenate_tables
from retort.training.arguments import training_arguments
from retort.training.job import TrainingJob
from retort.training.loop import build_trainer

_SAMPLED_POSITIONS = 16_384
_SECONDS = 12.0  # of work that is timed, at most a batch or step more
_LEAST_STEPS = 3


def choose_clock(threads: int) -> Callable[[], float]:
    """Return a clock: of a GPU's work that of the wall, of a CPU's the time of its threads divided by their number."""
    if torch.cuda.is_available():

        def read() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return read
    return lambda: time.process_time() / threads


@dataclass(frozen=True)
class TeacherSample:
    """What a teacher did with some sequences: their tokens and the seconds, and the bytes of its distributions."""

    tokens: int
    seconds: float
    bytes: SampledBytes


def sample_teacher(
    path: str, config: Config, table: SequenceTable, codec: Codec, *, num_tokens: int
) -> TeacherSample:
    """Let the teacher read some sequences of a table as a worker does, and encode what it says.

    The longest sequences are read first, and timed alone.
    """
    torch.set_num_threads(config.teacher.generation.cpu_threads)
    teacher = load_teacher(path, config.teacher)
    counts = np.bincount(table.ids, minlength=codec.vocabulary)[: codec.vocabulary]
    order = TokenOrder.from_counts(counts, vocabulary=codec.vocabulary)
    size = config.teacher.generation.batch_size
    first = table.slice(0, min(len(table), size))
    _score(
        teacher, first, codec, order, num_tokens, size
    )  # compiles, and loads what is loaded once
    rate = _score(teacher, first, codec, order, num_tokens, size)[0] / max(1, first.num_positions)
    most = min(_SAMPLED_POSITIONS, max(512, int(_SECONDS / max(rate, 1e-9))))
    chosen = choose_sequences(table, num_positions=most)
    sample = concatenate_tables(table.slice(i, i + 1) for i in chosen.tolist())
    seconds, records, tables = _score(teacher, sample, codec, order, num_tokens, size)
    positions = np.diff(sample.position_offsets)
    return TeacherSample(
        len(sample.ids), seconds, bytes_of_records(records, tables, positions.tolist())
    )


def _score(
    teacher: CausalLM,
    table: SequenceTable,
    codec: Codec,
    order: TokenOrder,
    num_tokens: int,
    batch_size: int,
) -> tuple[float, list[bytes], bytes]:
    clock = choose_clock(torch.get_num_threads())
    started = clock()
    scored = score_part(
        Scorer(teacher, batch_size), table, codec, num_tokens=num_tokens, order=order
    )
    records, tables = codec.encode(scored.sequences)
    return clock() - started, records, tables


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
        is_enough = len(self.times) > _LEAST_STEPS and sum(self.times) > _SECONDS / 2
        control.should_training_stop = is_enough or sum(self.times) > 3 * _SECONDS


def time_student(
    student: Student,
    training: Training,
    table: SequenceTable,
    *,
    tokenizer: Any,
    vocabulary: int,
    max_length: int,
) -> float | None:
    """Return the seconds of an optimizer step of a student that learns from a text; None where there is too little.

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
    return float(np.mean(timed)) if timed else None
