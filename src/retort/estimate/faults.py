"""Why a config cannot run as it is, each with the smallest change that makes it fit."""

import os
from collections.abc import Iterator, Mapping, Sequence

from retort.artifacts.project import Logits, Project, Run
from retort.cache.cost import find_lack_of_space
from retort.config.sections import Training
from retort.estimate.memory import (
    Load,
    estimate_teacher_memory,
    find_smallest_group,
    teacher_bytes,
)
from retort.estimate.options import Options
from retort.estimate.records import RunEstimate
from retort.estimate.sizes import ModelSize
from retort.estimate.teachers import TeacherWork
from retort.io.units import format_bytes


def is_live(run: Run) -> bool:
    """Say whether a teacher runs beside the student."""
    return not run.logits and run.teacher is not None and run.config.training.needs_teacher


def find_faults(
    project: Project,
    works: Mapping[str, TeacherWork],
    sizes: Mapping[str, ModelSize],
    runs: Sequence[RunEstimate],
    options: Options,
) -> Iterator[str]:
    """Yield what does not fit the devices or the disk, each fault once."""
    said: dict[str, None] = {}
    for id, work in works.items():
        logits = project.logits[id]
        size = sizes[logits.teacher.id]
        said |= dict.fromkeys(_find_teacher_faults(logits, work, size, options))
        # Without a sample only the usual size is known, which need not be this teacher's.
        cost, copies = work.cost, work.copies
        if cost.basis == "table":
            usual = 2 * (cost.file_bytes - cost.record_bytes) + copies * cost.record_bytes
            cost = cost.model_copy(update={"total_bytes": usual})
        lack = find_lack_of_space(cost, logits.config.cache, copies, folder=logits.folder)
        said |= dict.fromkeys([lack] if lack else [])
    for found in runs:
        run = project.runs[found.name]
        beside = 0.0
        if is_live(run) and run.teacher:
            beside = sizes[run.teacher.id].weight_bytes("bfloat16" if options.gpu else "float32")
        said |= dict.fromkeys(_find_student_faults(run, found, beside, options))
    yield from said


def _find_teacher_faults(
    logits: Logits, work: TeacherWork, size: ModelSize, options: Options
) -> Iterator[str]:
    found, memory = work.teacher, work.teacher.memory
    needs = f"{format_bytes(memory.weights)} of weights in {found.dtype}"
    if options.gpu is None:
        total = memory.weights + memory.activations + memory.selection
        if total > (have := total_memory()):
            yield (
                f"the teacher {found.name!r} needs {format_bytes(total)} of memory ({needs}), but this machine has "
                f"{format_bytes(have)}. Use a GPU, a smaller teacher.dtype, or a smaller teacher."
            )
        return
    usable, group = options.usable, found.gpus_per_model
    if teacher_bytes(memory, size, group) <= usable:
        return
    alone = Load(1, work.load.length, max(1, work.load.positions // work.load.batch))
    config = logits.config
    least = estimate_teacher_memory(size, config, alone, dtype=found.dtype, device="cuda")
    smallest = find_smallest_group(least, size, usable)
    if smallest <= group:  # batches that do not fit are halved
        return
    number = options.num_devices if options.is_counted else smallest
    whole = next((n for n in range(smallest, number) if number % n == 0), number)
    more = f", or {whole}, with which none of the {number} is left over" if whole > smallest else ""
    advice = (
        f"Set teacher.generation.gpus_per_model: {smallest}{more}"
        if smallest <= number
        else f"It takes {smallest} such GPUs, more than the {number} here: use GPUs with more memory, a "
        "checkpoint with quantized weights, or a smaller teacher"
    )
    yield (
        f"teacher.generation.gpus_per_model is {group}, but the teacher {found.name!r} has {needs}, and "
        f"{format_bytes(least.activations + least.selection)} more to read one sequence, while a GPU has "
        f"{format_bytes(usable)} for it ({options.gpu.name}). {advice}."
    )


def total_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _find_student_faults(
    run: Run, found: RunEstimate, beside: float, options: Options
) -> Iterator[str]:
    peak = found.memory.peak + beside
    have = options.usable if options.gpu else total_memory()
    if peak <= have:
        return
    training = run.config.training
    parts = (
        f"{format_bytes(found.memory.weights)} of weights, {format_bytes(found.memory.gradients)} of gradients, "
        f"{format_bytes(found.memory.optimizer)} of {training.optim}, {format_bytes(found.memory.activations)} of "
        f"activations, {format_bytes(found.memory.loss)} for the loss"
    )
    if beside:
        parts += f", {format_bytes(beside)} of the live teacher"
    yield (
        f"run {found.name!r} needs {format_bytes(peak)} to train a student of {found.parameters:,} parameters "
        f"({parts}), but {options.gpu.name if options.gpu else 'this machine'} has {format_bytes(have)} for it. "
        f"{_advise(training, found, beside, have, options)}"
    )


def _advise(
    training: Training, found: RunEstimate, beside: float, have: float, options: Options
) -> str:
    """Return the smallest change with which a student fits: recomputation, batches, shards, or fewer weights."""
    kept = found.memory_checkpointed if options.gpu else found.memory
    fixed = kept.peak - kept.activations + beside
    if not found.is_checkpointed and found.memory_checkpointed.peak + beside <= have:
        return "Set training.use_gradient_checkpointing: true."
    more = "" if found.is_checkpointed else "training.use_gradient_checkpointing: true, "
    size, steps = training.batch_size, training.gradient_accumulation_steps
    each = found.memory_checkpointed.activations / size
    ranks = max(1, training.gpus * training.nodes)
    while size > ranks and size % 2 == 0:
        size, steps = size // 2, steps * 2
        if fixed + each * size <= have:
            return f"Set {more}training.batch_size: {size} and gradient_accumulation_steps: {steps}, the same steps."
    static = found.memory.weights + found.memory.gradients + found.memory.optimizer
    room = have - beside - found.memory.loss - each * ranks
    shards = max(1, -(-static // max(1.0, room)))
    if options.gpu and room > 0 and shards <= options.num_devices and training.gpus < shards:
        return f"Set {more}training.strategy: fsdp and training.gpus: {int(shards)}."
    return "Use a smaller student, training.lora, or GPUs with more memory."
