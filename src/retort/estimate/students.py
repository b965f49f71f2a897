"""The training of a student: steps, memory, operations and hours."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retort.artifacts.project import Run
from retort.config.sections import Training
from retort.estimate.memory import Load, Mode, estimate_student_memory
from retort.estimate.options import Measured, Options
from retort.estimate.records import RunEstimate, StudentMemory
from retort.estimate.sizes import ModelSize
from retort.estimate.text import Text
from retort.models.lora import count_adapters
from retort.training.batches import count_steps
from retort.training.packing import fit_lengths

_DRAWN = 200  # batches, whose longest sequence is looked at


@dataclass(frozen=True)
class Layout:
    """How sequences are laid out. rows: of an epoch; tokens: of a row; share: of padding in what is computed."""

    name: str
    rows: int
    tokens: float
    padding: float


def choose_layout(text: Text, training: Training, *, max_length: int) -> Layout:
    """Return the layout of a training whose student takes several sequences in a row, as most do."""
    found, lengths = text.estimate, text.lengths
    is_joined = bool(training.padding_free) and not training.torch_compile
    if training.packing:
        ordered = -np.sort(-np.minimum(lengths, max_length))
        sampled = int(fit_lengths(ordered, max_length).max()) + 1
        rows = math.ceil(sampled * found.sequences / len(lengths))
        return Layout("packed", rows, found.tokens / max(1, rows), 0.0 if is_joined else 0.02)
    if is_joined:
        return Layout("end to end, without padding", found.sequences, text.mean_length, 0.0)
    share = _draw_padding(lengths, training.batch_size)
    return Layout(f"padded, {share:.0%} of it padding", found.sequences, text.mean_length, share)


def _draw_padding(lengths: NDArray[np.int64], batch_size: int) -> float:
    """Return the share of padding in random batches of sequences."""
    drawn = np.random.default_rng(0).choice(lengths, (_DRAWN, batch_size))
    return float(1 - drawn.sum() / (drawn.max(axis=1).sum() * batch_size))


def estimate_run(
    run: Run,
    size: ModelSize,
    teacher: ModelSize | None,
    text: Text,
    options: Options,
    *,
    peak: float,
    measured: Measured | None,
) -> RunEstimate:
    """Return what the training of a run takes.

    teacher: that runs beside it, if one does. peak: operations a second of a device. measured: some of its steps.
    """
    training = run.config.training
    layout = choose_layout(text, training, max_length=run.config.dataset.max_length)
    steps = count_steps(layout.rows, training)
    tokens = steps * training.global_batch * layout.tokens
    trained = size.parameters
    if training.lora.rank is not None:
        trained = count_adapters(size.config, training.lora, name=f"the student of run {run.name}")
    wanted = training.use_gradient_checkpointing
    is_checkpointed = bool(options.gpu) if wanted == "auto" else wanted
    memory = _estimate_memory(
        size, training, find_load(text, training, layout), options, trained=trained
    )
    operations = tokens * _count_operations(
        size,
        teacher,
        text,
        layout,
        is_lora=training.lora.rank is not None,
        recomputes=is_checkpointed,
    )
    devices = training.gpus * training.nodes if options.gpu else 1
    hours = operations / (peak * options.training_share * devices) / 3600
    if measured:
        hours = steps * measured.seconds / 3600
    minutes = options.slots.get("train")
    return RunEstimate(
        name=run.name,
        parameters=size.parameters,
        trained_parameters=trained,
        is_checkpointed=is_checkpointed,
        layout=layout.name,
        memory=memory[is_checkpointed],
        measured_memory=measured.memory if measured else None,
        memory_plain=memory[False],
        memory_checkpointed=memory[True],
        steps=steps,
        tokens=round(tokens),
        epochs=round(steps * training.global_batch / layout.rows, 4),
        operations=operations,
        hours=hours,
        device_hours=hours * devices,
        is_timed=measured is not None,
        slots=math.ceil(hours * 60 / minutes) if minutes else 1,
    )


def find_load(text: Text, training: Training, layout: Layout) -> Load:
    """Return what a forward pass of a student reads: a batch of the longest sequences where they are padded."""
    share = text.estimate.positions / max(1, text.estimate.tokens)
    is_padded = not training.packing and layout.padding > 0
    per_pass = training.batch_size * (text.estimate.longest if is_padded else layout.tokens)
    return Load(
        training.batch_size, max(2, round(per_pass / training.batch_size)), round(per_pass * share)
    )


def _estimate_memory(
    size: ModelSize, training: Training, load: Load, options: Options, *, trained: int
) -> dict[bool, StudentMemory]:
    """Return the memory of a student without recomputation (False) and with it (True)."""
    return {
        is_on: estimate_student_memory(
            size,
            training,
            load,
            trained=trained,
            mode=Mode(
                device=options.device,
                is_checkpointed=is_on,
                in_half=bool(options.gpu) and training.use_mixed_precision,
            ),
        )
        for is_on in (False, True)
    }


def _count_operations(
    size: ModelSize,
    teacher: ModelSize | None,
    text: Text,
    layout: Layout,
    *,
    is_lora: bool,
    recomputes: bool,
) -> float:
    """Return the floating-point operations of a training for a token that it reads.

    Those of a trained weight: 2 forward, 4 backward (Kaplan et al., arXiv 2001.08361, 2020, section 2.1), of a frozen
    one 2 and 2; with recomputation 2 more for those of the layers. A live teacher adds its forward pass.
    """
    share = text.estimate.positions / max(1, text.estimate.tokens)
    context = float((text.lengths.astype(float) ** 2).sum() / text.lengths.sum())
    passes = 2 if is_lora else 3
    found = size.forward_operations(context) * (passes + recomputes) / (1 - layout.padding)
    found += share * size.head_operations * passes
    if teacher:
        found += teacher.forward_operations(context) + share * teacher.head_operations
    return found
