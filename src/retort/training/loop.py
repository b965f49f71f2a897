"""Train one student from tokens or a cache: builds the trainer, resumes from checkpoints, writes final/ and the curve.

Three kinds: *output* (cross-entropy on the text), *logit* (the teacher's distributions), *hybrid* (both). The data
order depends on the seed and the number of sequences only, so runs that differ in nothing but the loss see the
same batches, on any number of GPUs. Restarted after a kill, a run resumes from its last complete checkpoint.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
)

from retort.cache.mixed import CacheMix
from retort.cluster.ranks import clear_launcher_environment, rank, world_size
from retort.config.optimizer import MUON
from retort.config.sections import Training
from retort.io.files import file_lock
from retort.losses.model_loss import attach_loss
from retort.losses.teacher_rows import Mix
from retort.losses.terms import LossSettings
from retort.models.attention import ON_CPU, set_attention
from retort.models.causal_lm import CausalLM, compile_layers, needs_mask, split_model
from retort.models.frozen import count_trained, freeze_weights
from retort.models.load import describe_device, read_peak_memory
from retort.models.lora import add_adapters, count_merged
from retort.models.students import build_student, name_student
from retort.tokens.sequences import SequenceTable
from retort.training.arguments import CHECKPOINTING, describe_precision, training_arguments
from retort.training.batches import Collator, TrainingData, count_steps, find_tail_column
from retort.training.checkpoints import (
    CheckpointId,
    find_checkpoint,
    is_finished,
    read_progress,
    require_best,
    require_start,
)
from retort.training.curve import write_log
from retort.training.final import save_final
from retort.training.held_out import EvaluationCallback, choose_eval_steps
from retort.training.job import TrainingJob
from retort.training.one_copy import build_in_one_copy
from retort.training.optimizers import set_steps
from retort.training.packing import choose_layout
from retort.training.record import TrainingSummary
from retort.training.stopping import train_until_signal
from retort.training.trainer import DistillationTrainer, ProgressCallback

logger = logging.getLogger(__name__)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Let one process, or one group of ranks, train in a folder at a time: a killed Snakemake's job may still run."""
    if rank() > 0:
        _wait_for_ranks()
        yield
        return
    busy = f"another process is training in {folder}: waiting for it to end"
    with file_lock(folder / ".lock", busy=busy):
        _wait_for_ranks()
        yield


def _wait_for_ranks() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def train_student(
    folder: Path,
    job: TrainingJob,
    *,
    progress_interval_s: float = 10.0,
) -> TrainingSummary:
    """Train until max_steps or num_epochs are done, from the newest complete checkpoint where there is one.

    Writes checkpoint-*/, final/ (model, tokenizer, card) and training_log.csv into `folder`. Called by every rank.

    Raises ValueError when the cache lacks the training's temperature, a checkpoint is of another run or cannot be
    resumed from, the student cannot be built, or a loss, gradient or weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_launcher_environment()
    _set_tracker_folders(folder)
    torch.set_num_threads(job.training.cpu_threads)
    arguments = training_arguments(folder, job)
    with _lock_folder(folder):
        trainer = build_trainer(arguments, job)
        parameters = count_merged(trainer.model)  # now: FSDP shards them later
        trained = count_trained(trainer.model)
        checkpoint = _agree_on_checkpoint(folder, job.checkpoint_id)
        progress = ProgressCallback(
            trainer,
            name=job.name,
            checkpoint_id=job.checkpoint_id,
            before=read_progress(checkpoint),
            write_curve=lambda: write_log(folder / "training_log.csv", trainer.state.log_history),
            save_total_limit=max(2, job.training.save_total_limit),
            interval_s=progress_interval_s,
        )
        trainer.add_callback(progress)
        _train(trainer, checkpoint, job)
        totals = progress.totals
        best = _load_best(trainer, folder, job.training)
        summary = TrainingSummary(
            steps=trainer.state.global_step,
            trained_positions=int(totals.positions),
            seconds=round(totals.seconds, 3),
            seconds_waiting_for_data=round(trainer.waited_s, 3),
            student_parameters=parameters,
            trained_parameters=trained,
            device=describe_device(trainer.args.device),
            dtype=describe_precision(trainer.args),
            best_step=best,
            peak_memory=read_peak_memory(trainer.args.device),
            resumed_step=progress.first_step or None,
        )
        save_final(folder / "final", trainer, job, summary)
        if rank() == 0:
            write_log(folder / "training_log.csv", trainer.state.log_history)
        return summary


def _set_tracker_folders(folder: Path) -> None:
    """Let trackers write beside the student and continue the same curve after a kill, where the user set nothing."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_RUN_ID", folder.name)
    os.environ.setdefault("WANDB_RESUME", "allow")


def _prepare_student(job: TrainingJob) -> tuple[CausalLM, Any]:
    """Return the student with its loss, and what is trained: the model, or peft's wrapper around it with LoRA."""
    training, name = job.training, name_student(job.student)

    def build(is_empty: bool) -> PreTrainedModel:
        return build_student(
            job.student,
            vocabulary=job.vocabulary,
            tokenizer=job.tokenizer,
            seed=training.seed,
            is_empty=is_empty,
        )

    is_sharded = training.strategy == "fsdp" and world_size() > 1
    model = build_in_one_copy(build) if is_sharded else build(False)
    set_attention(model, training.attn_implementation, device="cpu")
    freeze_weights(model, training.freeze, name=name)
    whole: Any = model
    if training.lora.rank is not None:
        whole = add_adapters(model, training.lora, seed=training.seed, name=name)
    split = split_model(model)
    attach_loss(split, job.loss_settings, is_compiled=training.torch_compile)
    return split, whole


def build_trainer(arguments: TrainingArguments, job: TrainingJob) -> DistillationTrainer:
    """Build the student and return its trainer; the arguments get the number of steps.

    Raises ValueError when the student cannot be built, the cache lacks the training's temperature, and as
    `choose_layout` does.
    """
    training = job.training
    split, whole = _prepare_student(job)
    model = split.model
    if training.use_gradient_checkpointing == "auto":
        recomputes = arguments.device.type == "cuda" and model.supports_gradient_checkpointing
        setattr(arguments, CHECKPOINTING, recomputes)
    source = job.source
    table = source if isinstance(source, SequenceTable) else source.table
    teacher = job.teacher
    order, is_joined = choose_layout(
        table.lengths, training, capacity=job.max_length, student=split, teacher=teacher
    )
    set_steps(arguments, training, max_steps=count_steps(order.rows_per_epoch, training))
    teacher_needs_mask = teacher is not None and teacher.needs_mask
    collator = Collator(needs_mask=teacher_needs_mask or needs_mask(split), is_joined=is_joined)
    settings = job.loss_settings
    if not isinstance(source, SequenceTable):
        collator, settings = _fit_to_cache(collator, settings, job, vocabulary=split.vocabulary)
    if training.attn_implementation not in ON_CPU:  # the probes ran on a CPU
        set_attention(model, training.attn_implementation, device=arguments.device.type)
    if training.torch_compile:
        compile_layers(split)
    trainer = DistillationTrainer(
        settings=settings,
        order=order,
        teacher=teacher,
        num_tokens=len(job.tokenizer),
        is_muon=training.optim == MUON,
        held_out=job.held_out,
        model=whole,
        args=arguments,
        train_dataset=TrainingData(source),
        data_collator=collator,
    )
    trainer.remove_callback(PrinterCallback)
    _keep_float32(trainer)
    _add_evaluation(trainer, job, lengths=table.lengths)
    return trainer


def _fit_to_cache(
    collator: Collator, settings: LossSettings, job: TrainingJob, *, vocabulary: int
) -> tuple[Collator, LossSettings]:
    """Return the collator and the settings of the loss for a job's cache, or caches; `vocabulary`: the student's.

    Raises ValueError as `find_tail_column` does, and where several teachers have no mixture that the loss needs.
    """
    source, training = job.source, job.training
    assert not isinstance(source, SequenceTable)
    caches = source.caches if isinstance(source, CacheMix) else (source,)
    columns = [find_tail_column(c.header.codec, training, path=c.path) for c in caches]
    column = None if None in columns else columns[0]
    is_narrower = any(vocabulary < cache.header.codec.vocabulary for cache in caches)
    mix = Mix(source.weights, source.is_whole) if isinstance(source, CacheMix) else None
    is_linear = training.divergence == "forward_kl" and training.position_weights is None
    if mix is not None and not (mix.is_whole or is_linear):
        raise ValueError(
            f"training.divergence is {training.divergence} and training.position_weights {training.position_weights}, "
            "but the mixture of several teachers is not known from kept tokens: use forward_kl and no weights, or "
            "caches of cache.top_k: full."
        )
    if column is None:
        settings = replace(settings, stored=caches[0].header.codec.temperatures)
    kept = vocabulary if is_narrower else None
    return replace(collator, tail_column=column, vocabulary=kept, mix=mix), settings


def _add_evaluation(
    trainer: DistillationTrainer, job: TrainingJob, *, lengths: NDArray[np.int64]
) -> None:
    """Have the held-out loss measured during the training, if that is asked for; `lengths` [S]: of its sequences."""
    if job.held_out is None:
        return
    rows = trainer.args.max_steps * job.training.global_batch
    steps = choose_eval_steps(
        job.training,
        job.held_out,
        max_steps=trainer.args.max_steps,
        num_tokens=float(lengths.sum()) * rows / trainer.order.rows_per_epoch,
        parameters=int(trainer.model.num_parameters()),
    )
    if steps is None:
        logger.debug(f"train {job.name}: too short for evaluations in between")
        return
    best_metric = job.training.best_metric
    trainer.add_callback(EvaluationCallback(job.name, steps=steps, best_metric=best_metric))


def _keep_float32(trainer: DistillationTrainer) -> None:
    """Let FSDP with half precision leave losses in float32, and add the ranks' gradients in it.

    accelerate's policy rounds both: a loss of 5.711642 arrived as 5.703125.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def _agree_on_checkpoint(folder: Path, checkpoint_id: CheckpointId) -> Path | None:
    """Return the first rank's `find_checkpoint` on every rank: it removes damaged ones, so only one may call it."""
    found: list[Path | None] = [None]
    if rank() == 0:
        found = [find_checkpoint(folder, checkpoint_id)]
    if world_size() > 1:
        broadcast_object_list(found)
    return found[0]


def _train(trainer: DistillationTrainer, checkpoint: Path | None, job: TrainingJob) -> None:
    """Train from this run's checkpoint, from one that the config names, or from the beginning."""
    if checkpoint:
        logger.info(f"train {job.name}: resuming from {checkpoint.name}")
        trainer.window.restore(read_progress(checkpoint).window)
    if checkpoint and is_finished(checkpoint):
        _load_weights(trainer, checkpoint, job.training)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return
    named = job.training.resume_from_checkpoint
    if checkpoint is None and named is not None:
        require_start(job.training, max_steps=trainer.args.max_steps)
    start = str(checkpoint or named or "")
    train_until_signal(trainer, start=start or None, save_minutes=job.training.save_minutes)


def _load_best(trainer: DistillationTrainer, folder: Path, training: Training) -> int | None:
    """Give the trainer the weights of its best checkpoint, and return its step, if the student is to have these."""
    step: int | None = trainer.state.best_global_step
    if not training.load_best_model_at_end or step is None:
        return None
    logger.info(
        f"the best {training.best_metric}, {trainer.state.best_metric:.4f}, is of step {step}"
    )
    _load_weights(trainer, require_best(folder, step), training)
    return step


def _load_weights(trainer: DistillationTrainer, checkpoint: Path, training: Training) -> None:
    """Give the trainer the weights of a checkpoint, or with LoRA its adapters."""
    if training.lora.rank is not None:
        trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
    else:
        trainer.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
