"""Train one student from tokens or a cache: builds the trainer, resumes from checkpoints, writes final/ and the curve.

Three kinds: *output* (cross-entropy on the text), *logit* (the teacher's distributions), *hybrid* (both). The data
order depends on the seed and the number of sequences only, so runs that differ in nothing but the loss see the
same batches, on any number of GPUs. Restarted after a kill, a run resumes from its last complete checkpoint.
"""

import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
)

from retort.cache.reader import LogitCache
from retort.cluster.ranks import clear_launcher_environment, rank, split_global_batch, world_size
from retort.config.sections import Student, Tracking, Training
from retort.io.files import apply_umask, file_lock, write_atomically
from retort.models.causal_lm import CausalLM, needs_mask, split_model
from retort.models.ends import list_eos_ids, set_special_ids
from retort.models.load import choose_device, describe_device
from retort.models.students import build_student
from retort.tokens.sequences import SequenceTable
from retort.training.batches import Collator, TrainingData, count_steps, find_tail_column
from retort.training.checkpoints import (
    CheckpointId,
    find_checkpoint,
    is_finished,
    read_progress,
    require_start,
    shared_settings,
)
from retort.training.losses import LossSettings
from retort.training.model_card import write_card
from retort.training.model_loss import attach_loss
from retort.training.packing import choose_order
from retort.training.record import TrainingSummary
from retort.training.stopping import train_until_signal
from retort.training.trainer import DistillationTrainer, ProgressCallback

logger = logging.getLogger(__name__)

# The first name is new in transformers 5.23; vLLM 0.32 needs 5.19.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
LOG_COLUMNS = (
    "step",
    "total_loss",
    "hard_loss",
    "soft_loss",
    "perplexity",
    "learning_rate",
    "tokens_per_second",
)


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, and how.

    identity: digest of all that the result depends on; training: with alpha filled in; vocabulary: the student's,
    where its config names none; teacher: a live one, None with a cache or with text alone; facts: what the student is
    trained on, for its model card; ends: the ids that end a text (none: the tokenizer's and its template's);
    max_length: tokens of a packed row.
    """

    name: str
    identity: str
    source: SequenceTable | LogitCache
    student: Student
    training: Training
    tracking: Tracking
    tokenizer: Any
    vocabulary: int
    teacher: CausalLM | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    max_length: int = 0

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
        return LossSettings(t.alpha, t.temperature, t.divergence, chunk_size=t.loss_chunk_size)


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
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        fsdp=True if is_sharded else None,
        **{_CHECKPOINTING: training.use_gradient_checkpointing is True},
        logging_steps=training.logging_steps,
        logging_first_step=True,  # a run shorter than logging_steps has a curve too
        logging_nan_inf_filter=False,  # it would log 0.0 for a NaN and train on
        save_steps=training.save_steps,
        save_total_limit=max(
            2, training.save_total_limit
        ),  # a kill may leave the newest incomplete
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
        parameters = int(trainer.model.num_parameters())  # now: FSDP shards them later
        checkpoint = _agree_on_checkpoint(folder, job.checkpoint_id)
        progress = ProgressCallback(
            trainer,
            name=job.name,
            checkpoint_id=job.checkpoint_id,
            before=read_progress(checkpoint),
            write_curve=lambda: write_log(folder / "training_log.csv", trainer.state.log_history),
            interval_s=progress_interval_s,
        )
        trainer.add_callback(progress)
        _train(trainer, checkpoint, job)
        totals = progress.totals
        mixed = {"bf16": " with bfloat16", "fp16": " with float16"}
        summary = TrainingSummary(
            steps=trainer.state.global_step,
            trained_positions=int(totals.positions),
            seconds=round(totals.seconds, 3),
            seconds_waiting_for_data=round(trainer.waited_s, 3),
            student_parameters=parameters,
            device=describe_device(trainer.args.device),
            dtype="float32" + mixed.get(choose_precision(job.training, trainer.args.device), ""),
        )
        curve = trainer.state.log_history
        save_final(folder / "final", trainer, job, lambda: _write_card(job, summary, curve))
        if rank() == 0:
            write_log(folder / "training_log.csv", curve)
        return summary


def _set_tracker_folders(folder: Path) -> None:
    """Let trackers write beside the student and continue the same curve after a kill, where the user set nothing."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_RUN_ID", folder.name)
    os.environ.setdefault("WANDB_RESUME", "allow")


def build_trainer(arguments: TrainingArguments, job: TrainingJob) -> DistillationTrainer:
    """Build the student and return its trainer; the arguments get the number of steps.

    Raises ValueError when the student cannot be built, the cache lacks the training's temperature, and as
    `choose_order` does.
    """
    model = build_student(
        job.student, vocabulary=job.vocabulary, tokenizer=job.tokenizer, seed=job.training.seed
    )
    split = split_model(model)
    attach_loss(split, job.loss_settings)
    if job.training.use_gradient_checkpointing == "auto":
        recomputes = arguments.device.type == "cuda" and model.supports_gradient_checkpointing
        setattr(arguments, _CHECKPOINTING, recomputes)
    source = job.source
    table = source.table if isinstance(source, LogitCache) else source
    order, teacher = choose_order(
        table.lengths,
        job.training,
        capacity=job.max_length,
        student=split,
        teacher=job.teacher,
        is_on_cpu=arguments.device.type == "cpu",
    )
    arguments.max_steps = count_steps(order.rows_per_epoch, job.training)
    teacher_needs_mask = teacher is not None and teacher.needs_mask
    collator = Collator(needs_mask=teacher_needs_mask or needs_mask(split))
    if isinstance(source, LogitCache):
        codec = source.header.codec
        tail_column = find_tail_column(codec, job.training, path=source.path)
        is_narrower = split.vocabulary < codec.vocabulary
        vocabulary = split.vocabulary if is_narrower else None
        collator = replace(collator, tail_column=tail_column, vocabulary=vocabulary)
    trainer = DistillationTrainer(
        settings=job.loss_settings,
        order=order,
        teacher=teacher,
        num_tokens=len(job.tokenizer),
        model=model,
        args=arguments,
        train_dataset=TrainingData(source),
        data_collator=collator,
    )
    trainer.remove_callback(PrinterCallback)
    _keep_float32(trainer)
    return trainer


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
        trainer.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return
    named = job.training.resume_from_checkpoint
    if checkpoint is None and named is not None:
        require_start(job.training, max_steps=trainer.args.max_steps)
    start = str(checkpoint or named or "")
    train_until_signal(trainer, start=start or None, save_minutes=job.training.save_minutes)


def save_final(
    folder: Path, trainer: DistillationTrainer, job: TrainingJob, card: Callable[[], str]
) -> None:
    """Write the finished student, its tokenizer and card atomically, as a folder that AutoModelForCausalLM loads.

    Called by every rank: under FSDP all of them gather the weights.
    """
    model = trainer.model
    is_sharded = isinstance(model, FSDPModule)
    weights = trainer.accelerator.get_state_dict(model) if is_sharded else model.state_dict()
    # After gathering, a tied weight's two names no longer share memory, and both would be stored.
    weights = {name: w for name, w in weights.items() if name not in model.all_tied_weights_keys}
    if rank() > 0:
        return
    temporary = folder.with_name(".final.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.use_cache = True
    set_special_ids(model, job.tokenizer, _list_final_ends(model, job))
    model.save_pretrained(temporary, state_dict=weights)
    apply_umask(temporary.glob("*.safetensors"))
    job.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card(), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _list_final_ends(model: Any, job: TrainingJob) -> list[int]:
    """Return the ids that end a student's text; its own generation config counts if it began with weights."""
    own = model.generation_config if job.student.model_path else None
    return [*dict.fromkeys([*list_eos_ids(own, job.tokenizer), *job.ends])]


def _write_card(job: TrainingJob, summary: TrainingSummary, curve: list[dict[str, float]]) -> str:
    return write_card(
        job.name,
        distillation_type=job.training.distillation_type,
        facts=job.facts,
        summary=summary,
        config={"student": job.student.model_dump(), "training": job.training.model_dump()},
        curve=curve,
    )


def write_log(path: Path, log_history: list[dict[str, Any]]) -> None:
    """Write Trainer's log history as CSV (LOG_COLUMNS), one row per logged step."""
    rows = [entry for entry in log_history if "total_loss" in entry]
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([json.loads(json.dumps(row)) for row in rows])
    write_atomically(path, text.getvalue().encode())
