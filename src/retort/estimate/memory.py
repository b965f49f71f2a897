"""Memory of a teacher and of a student, from their sizes.

Legend: B sequences at once, T tokens of each, N = B x T, D hidden size, V vocabulary, R rows of logits at once.
"""

import math
from dataclasses import dataclass

from retort.config.sections import Config, Training
from retort.estimate.records import StudentMemory, TeacherMemory
from retort.estimate.sizes import DTYPE_BYTES, ModelSize
from retort.losses.fused_loss import choose_chunk_size

_HEAD_ROWS = {"cpu": 256, "cuda": 2048}  # as in teacher.scoring
# [R, V] of float32 at once: logits, and what selection makes of them; on a CPU it works on few rows at a time.
_LOGIT_BUFFERS = {"cpu": 1.0, "cuda": 3.0}
# Resident bytes of a job on a CPU with all that it imports, before its model: as measured with PyTorch 2.13. Of the
# teacher's 70 MB are the codec's compiled functions.
_TEACHER_PROGRAM, _TRAINING_PROGRAM = 0.54e9, 0.57e9
# Bytes of an optimizer's state for a trained weight (a moment of float32 has 4, one of 8 bits 1).
_STATE_BYTES = {
    "adafactor": 0.1,
    "muon": 4,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "lion_32bit": 4,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
}
_ADAM_STATE = 8


@dataclass(frozen=True)
class Load:
    """What a forward pass reads: sequences at once, tokens of the longest, and counted positions of them all."""

    batch: int
    length: int
    positions: int


@dataclass(frozen=True)
class Mode:
    """How a student is trained: on which device, with recomputation, with activations in half precision."""

    device: str
    is_checkpointed: bool
    in_half: bool


def estimate_teacher_memory(
    size: ModelSize, config: Config, load: Load, *, dtype: str, device: str
) -> TeacherMemory:
    """Return the bytes of a teacher that reads a batch; nothing is kept for a backward pass.

    Of one layer at a time there are the residual, what the norm made of it in float32, and the widest of queries, keys
    and values or the MLP's three activations.
    """
    each, tokens = DTYPE_BYTES[dtype], load.batch * load.length
    activations = tokens * (each * _count_of_layer(size) + 8 * size.hidden)
    if config.teacher.attn_implementation == "eager":
        heads = size.attention_width / 64
        activations += round(load.batch * heads * load.length**2 * (each + 4))
    rows = min(_HEAD_ROWS[device], max(1, load.positions))
    selection = rows * size.vocabulary * 4 * _LOGIT_BUFFERS[device]
    selection += load.positions * size.hidden * each  # features at the counted positions
    if device == "cpu" and dtype != "float32":
        selection += 8192 * size.hidden * 4  # columns of the head that are converted at once
    return TeacherMemory(
        program=round(_TEACHER_PROGRAM) if device == "cpu" else 0,
        weights=round(size.weight_bytes(dtype)),
        activations=round(activations),
        selection=round(selection),
    )


def _count_of_layer(size: ModelSize) -> int:
    """Return the numbers that a layer has for a token at a time."""
    inner = max(3 * size.intermediate, 2 * size.attention_width + 2 * size.kv_width + size.hidden)
    return 2 * size.hidden + inner


def find_smallest_group(memory: TeacherMemory, size: ModelSize, usable: float) -> int:
    """Return the smallest number of GPUs that hold a copy of the teacher: its layers are divided, its activations not.

    Layers are not cut, so a GPU may get one more than its share; embedding and head are on the first and the last.
    """
    for group in range(1, max(2, size.layers + 1)):
        if teacher_bytes(memory, size, group) <= usable:
            return group
    return max(2, size.layers + 1)


def teacher_bytes(memory: TeacherMemory, size: ModelSize, group: int) -> float:
    """Return the bytes on the fullest GPU of a group."""
    share = 1.0 if group == 1 else math.ceil(size.layers / group) / max(1, size.layers)
    return min(1.0, max(share, 1 / group)) * memory.weights + memory.activations + memory.selection


def estimate_student_memory(
    size: ModelSize,
    training: Training,
    load: Load,
    *,
    trained: int,
    mode: Mode,
) -> StudentMemory:
    """Return the bytes of a student in training on each of its GPUs, at the fullest moment of a step.

    Weights, their gradients and the optimizer's moments are float32. The fullest moment is that of the loss, where all
    activations are kept and of the gradients the head's alone, or the end of the backward pass with all gradients;
    where gradients accumulate, both.
    """
    batch = max(1, load.batch // max(1, training.gpus * training.nodes))
    attention = training.attn_implementation if training.attn_implementation == "eager" else None
    saved = size.saved_bytes(
        batch=batch, length=load.length, in_half=mode.in_half, attention=attention
    )
    tokens = batch * load.length
    of_layer = saved / max(1, size.layers)
    if mode.is_checkpointed:
        # Inputs of all layers, and what one keeps (Chen et al., arXiv 1604.06174, 2016).
        saved = 4 * tokens * size.hidden * (size.layers + 2) + of_layer
    half = 2 if mode.in_half else 4
    chunk = training.loss_chunk_size or choose_chunk_size(size.vocabulary, mode.device)
    positions = max(1, round(load.positions * batch / max(1, load.batch)))
    tempered = 1.125 if training.temperature != 1.0 else 1.0  # `compute_chunk` copies an eighth
    loss = min(chunk, positions) * size.vocabulary * (4 * tempered + (half if mode.in_half else 0))
    loss += size.head * (half if mode.in_half else 0) + positions * size.hidden * 4
    is_lora = training.lora.rank is not None
    head_grad = 0 if is_lora else 4 * size.head
    ranks = training.gpus * training.nodes
    shards = ranks if training.strategy == "fsdp" else 1
    weights = 4 * (size.parameters + (trained if is_lora else 0)) / shards
    gradients = 4 * trained / shards
    if ranks > 1 and training.strategy == "ddp":
        gradients *= 2  # the buckets that are exchanged
    optimizer = _STATE_BYTES.get(training.optim, _ADAM_STATE) * trained / shards
    # Of the gradients of activations there are those of one layer.
    working = (half * _count_of_layer(size)) * tokens
    at_loss = saved + loss + (gradients if training.gradient_accumulation_steps > 1 else head_grad)
    at_end = gradients + (of_layer if mode.is_checkpointed else 0)
    program = _TRAINING_PROGRAM if mode.device == "cpu" else 0
    peak = program + weights + optimizer + working + max(at_loss, at_end)
    return StudentMemory(
        program=round(program),
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(saved),
        loss=round(loss),
        peak=round(peak),
    )
