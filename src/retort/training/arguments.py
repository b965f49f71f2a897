"""Our keys as transformers' TrainingArguments."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from retort.cluster.ranks import split_global_batch, world_size
from retort.config.sections import Training
from retort.models.load import choose_device
from retort.training.job import TrainingJob
from retort.training.optimizers import optimizer_arguments

# The first name is new in transformers 5.23; vLLM 0.32 needs 5.19.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def training_arguments(folder: Path, job: TrainingJob) -> TrainingArguments:
    """Return transformers' TrainingArguments for our keys; with several ranks, this starts torch.distributed.

    The number of steps is missing: `build_trainer` sets it, once it is known which sequences share a row.

    Raises ValueError when the ranks cannot share the global batch evenly.
    """
    training, tracking = job.training, job.tracking
    device = choose_device(training.device)
    size, accumulation = split_global_batch(
        training.batch_size, training.gradient_accumulation_steps, world_size()
    )
    precision = choose_precision(training, device)
    is_sharded = world_size() > 1 and training.strategy == "fsdp"
    trackers = [
        t
        for t, on in (("wandb", tracking.use_wandb), ("tensorboard", tracking.use_tensorboard))
        if on
    ]
    return TrainingArguments(
        output_dir=str(folder),
        run_name=tracking.wandb_run_name or job.name,
        project=tracking.wandb_project or "retort",
        report_to=trackers or "none",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **optimizer_arguments(training),
        seed=training.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        fsdp=True if is_sharded else None,
        **{CHECKPOINTING: training.use_gradient_checkpointing is True},
        logging_steps=training.logging_steps,
        logging_first_step=True,  # a run shorter than logging_steps has a curve too
        logging_nan_inf_filter=False,  # it would log 0.0 for a NaN and train on
        save_steps=training.save_steps,
        save_total_limit=None,  # `remove_old_checkpoints` waits until the newest is complete
        dataloader_num_workers=training.dataloader_num_workers,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )


def choose_precision(training: Training, device: torch.device) -> str:
    """Return bf16, fp16 or no: a CPU trains in float32, and a GPU without bfloat16 in float16."""
    if not training.use_mixed_precision or device.type != "cuda":
        return "no"
    wants_bf16 = training.mixed_precision_dtype == "bf16"
    return (
        "bf16" if wants_bf16 and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    )


def describe_precision(arguments: TrainingArguments) -> str:
    """Return what numbers it trains in, in words."""
    half = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    return f"float32 with {half}" if half else "float32"
