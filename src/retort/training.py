"""Train one student: data from the cache or from the tokens, transformers' Trainer with our losses.

Three ways: *output* (cross-entropy on the text), *logit* (the teacher's distributions), *hybrid* (both). The data
order depends on the seed and the number of sequences only, so runs that differ in nothing but the loss see the
same batches. A run that was killed goes on from its last whole checkpoint when it is started again.
"""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from retort.cache import LogitCache
from retort.codec import SparseTargets
from retort.config import Student, Teacher, Tracking, Training
from retort.config_checks import DEFAULT_ALPHA
from retort.losses import (
    LossTerms,
    combine,
    compute_dense_kl,
    compute_hard_loss,
    compute_sparse_kl,
    perplexity,
)
from retort.models import (
    CausalLM,
    build_student,
    choose_device,
    describe_device,
    load_recorded_teacher,
)
from retort.provenance import describe_run, read_json, write_atomically, write_json
from retort.shards import TokenIndex
from retort.tokens import Sequence, SequenceTable, load_tokenizer

IGNORE_INDEX = -100
LOG_COLUMNS = (
    "step",
    "total_loss",
    "hard_loss",
    "soft_loss",
    "perplexity",
    "learning_rate",
    "tokens_per_second",
)
# Written last into a checkpoint, so that one cut short by a kill is told from a whole one.
_COMPLETE_MARK = "complete.json"
_PROGRESS_S = 10.0


@dataclass(frozen=True)
class Item:
    """One sequence, and the teacher's distributions at its counted positions where a cache is read."""

    sequence: Sequence
    targets: SparseTargets | None


class TrainingData(Dataset[Item]):
    """Sequences by index, in the token index's order: from a table, or from a cache that holds its own."""

    def __init__(self, source: SequenceTable | LogitCache) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        if isinstance(self.source, LogitCache):
            return Item(self.source.table[index], self.source.read_targets(index))
        return Item(self.source[index], None)


class EpochShuffle(Sampler[int]):
    """A permutation that depends on (seed, epoch, number of sequences) and on nothing else."""

    def __init__(self, num_sequences: int, *, seed: int) -> None:
        self.num_sequences = num_sequences
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch, and on resuming."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_sequences

    def __iter__(self) -> Iterator[int]:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
        return iter(generator.permutation(self.num_sequences).tolist())


@dataclass(frozen=True)
class Collator:
    """Pad items to a batch; `temperature_place` is the column of the stored tail that training uses."""

    temperature_place: int = 0

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels [B, T] (labels[t] = ids[t] where its prediction counts) and,
        from a cache, top_k_ids and top_k_logprobs [P, K] and tail_logprob [P] in the batch's row order."""
        width = max(len(item.sequence.ids) for item in items)
        batch = {
            "input_ids": torch.zeros((len(items), width), dtype=torch.long),
            "attention_mask": torch.zeros((len(items), width), dtype=torch.long),
            "labels": torch.full((len(items), width), IGNORE_INDEX, dtype=torch.long),
        }
        for b, item in enumerate(items):
            ids = torch.from_numpy(np.array(item.sequence.ids, dtype=np.int64))
            counts = torch.from_numpy(np.array(item.sequence.loss_mask))
            batch["input_ids"][b, : len(ids)] = ids
            batch["attention_mask"][b, : len(ids)] = 1
            batch["labels"][b, 1 : len(ids)] = ids[1:].masked_fill(~counts[:-1], IGNORE_INDEX)
        targets = [item.targets for item in items if item.targets is not None]
        if targets:
            batch["top_k_ids"] = torch.from_numpy(np.concatenate([t.top_k_ids for t in targets]))
            batch["top_k_logprobs"] = torch.from_numpy(
                np.concatenate([t.top_k_logprobs for t in targets])
            )
            tails = np.concatenate([t.tail_logprobs[:, self.temperature_place] for t in targets])
            batch["tail_logprob"] = torch.from_numpy(tails)
        return batch


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss of room `losses`, normalised by the global number of positions."""

    # compute_loss divides by the number of positions of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        alpha: float,
        temperature: float,
        teacher: CausalLM | None,
        num_tokens: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        # True makes Trainer count the labels of the whole accumulated batch, whatever the model's signature.
        self.model_accepts_loss_kwargs = True
        self.alpha = alpha
        self.temperature = temperature
        self.teacher = teacher
        self.num_tokens = (
            num_tokens  # of the tokenizer: a live teacher's ids beyond have probability 0
        )
        self.window = LossWindow()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochShuffle(len(train_dataset or self.train_dataset), seed=self.args.seed)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the mean loss over the accumulated batch's positions."""
        assert num_items_in_batch is not None
        labels_BT = inputs["labels"]
        counts_BT = labels_BT[:, 1:] != IGNORE_INDEX
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        logits_PV = outputs.logits[:, :-1][counts_BT]
        hard = compute_hard_loss(logits_PV, labels_BT[:, 1:][counts_BT])
        kl = self._compute_kl(logits_PV, counts_BT, inputs) if self.alpha < 1.0 else None
        terms = combine(hard, kl, alpha=self.alpha, temperature=self.temperature)
        if not bool(torch.isfinite(terms.total)):
            raise ValueError(
                f"the loss is {terms.total.item()} at step {self.state.global_step + 1} (hard {terms.hard.item():.4g}, "
                f"soft {terms.soft.item() if terms.soft is not None else 0:.4g}). Checkpoints before it are kept. "
                "Try a lower training.learning_rate, or training.use_mixed_precision: false."
            )
        self.window.add(terms, positions=len(logits_PV))
        loss = terms.total / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _compute_kl(
        self, logits_PV: Tensor, counts_BT: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        """KL from the cache's targets, or from the live teacher over the whole vocabulary."""
        if self.teacher is None:
            return compute_sparse_kl(
                logits_PV,
                inputs["top_k_ids"],
                inputs["top_k_logprobs"],
                inputs["tail_logprob"],
                temperature=self.temperature,
            )
        with torch.no_grad():
            features_BTD = self.teacher.features(inputs["input_ids"], inputs["attention_mask"])
            teacher_logits_PV = self.teacher.head.logits(features_BTD[:, :-1][counts_BT])
            teacher_logits_PV = teacher_logits_PV[:, : self.num_tokens]  # a wider student is legal
        return compute_dense_kl(logits_PV, teacher_logits_PV, temperature=self.temperature)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of our terms under the names users know, in place of Trainer's `loss`."""
        if "loss" in logs:
            logs.pop("loss")
            logs |= self.window.take()
        super().log(logs, *args, **kwargs)


class LossWindow:
    """Sums of the loss terms since the last log line."""

    def __init__(self) -> None:
        self.positions = 0
        self.total_positions = 0
        self._sums = {"total_loss": 0.0, "hard_loss": 0.0, "soft_loss": 0.0}
        self._has_soft = False
        self._since = time.monotonic()

    def add(self, terms: LossTerms, *, positions: int) -> None:
        """Add one micro-batch."""
        self.positions += positions
        self.total_positions += positions
        self._sums["total_loss"] += float(terms.total.detach())
        self._sums["hard_loss"] += float(terms.hard.detach())
        if terms.soft is not None:
            self._has_soft = True
            self._sums["soft_loss"] += float(terms.soft.detach())

    def take(self) -> dict[str, float]:
        """Return the means over the window's positions, and start a new window."""
        positions = max(1, self.positions)
        means = {name: value / positions for name, value in self._sums.items()}
        if not self._has_soft:
            del means["soft_loss"]
        now = time.monotonic()
        rates = {
            "perplexity": perplexity(means["hard_loss"]),
            "tokens_per_second": self.positions / max(1e-9, now - self._since),
        }
        self.positions, self._since = 0, now
        self._sums = dict.fromkeys(self._sums, 0.0)
        return means | rates


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Plain progress lines, and the mark that makes a checkpoint whole."""

    def __init__(
        self,
        trainer: DistillationTrainer,
        *,
        name: str,
        before: dict[str, float],
        say: Callable[[str], None],
    ) -> None:
        self.trainer = trainer
        self.say = say
        self.name = name
        self.before = before
        self.started = time.monotonic()
        self._said = 0.0
        self._first_step = 0

    @property
    def totals(self) -> dict[str, float]:
        """Seconds and positions of this attempt and of those before it."""
        return {
            "seconds": self.before["seconds"] + time.monotonic() - self.started,
            "positions": self.before["positions"] + self.trainer.window.total_positions,
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Remember where this attempt begins, for the time left."""
        self._first_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        """Say one line at most every few seconds."""
        now = time.monotonic()
        is_due = now - self._said >= _PROGRESS_S or state.global_step >= state.max_steps
        if not logs or "total_loss" not in logs or not is_due:
            return
        self._said = now
        steps = max(1, state.global_step - self._first_step)
        left = (now - self.started) / steps * (state.max_steps - state.global_step)
        self.say(
            f"train {self.name}  step {state.global_step}/{state.max_steps}  loss {logs['total_loss']:.4f}  "
            f"{logs['tokens_per_second']:,.0f} tokens/s  {left:,.0f} s left"
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint that was just written as whole."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_json(folder / _COMPLETE_MARK, {"step": state.global_step, **self.totals})


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, and remove torn ones."""
    whole = None
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in checkpoints:
        if (path / _COMPLETE_MARK).exists():
            whole = path
        else:
            print(f"{path} was cut short by a kill: removed")
            shutil.rmtree(path)
    return whole


def _is_finished(checkpoint: Path) -> bool:
    """Say whether it was saved after the last step: Trainer, asked to go on from it, would make one more."""
    state = read_json(checkpoint / "trainer_state.json")
    return bool(state["global_step"] >= state["max_steps"])


def training_arguments(
    folder: Path, training: Training, tracking: Tracking, *, name: str
) -> TrainingArguments:
    """Translate our keys into transformers' TrainingArguments."""
    device = choose_device(training.device)
    mixed = training.use_mixed_precision and device.type == "cuda"  # a CPU trains in float32
    trackers = [
        t
        for t, on in (("wandb", tracking.use_wandb), ("tensorboard", tracking.use_tensorboard))
        if on
    ]
    return TrainingArguments(
        output_dir=str(folder),
        run_name=tracking.wandb_run_name or name,
        project=tracking.wandb_project or "retort",
        report_to=trackers or "none",
        max_steps=training.max_steps if training.max_steps is not None else -1,
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=mixed and training.mixed_precision_dtype == "bf16",
        fp16=mixed and training.mixed_precision_dtype == "fp16",
        activation_checkpointing=training.use_gradient_checkpointing,
        logging_steps=training.logging_steps,
        logging_first_step=True,  # a run shorter than logging_steps has a curve too
        logging_nan_inf_filter=False,  # it would log 0.0 for a NaN and train on
        save_steps=training.save_steps,
        save_total_limit=max(2, training.save_total_limit),  # the newest may be torn by a kill
        dataloader_num_workers=training.dataloader_num_workers,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
    )


def train_student(
    folder: Path,
    *,
    name: str,
    source: SequenceTable | LogitCache,
    student: Student,
    training: Training,
    tracking: Tracking,
    tokenizer: Any,
    vocabulary: int,
    teacher: CausalLM | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train until max_steps or num_epochs are done, from the newest whole checkpoint where there is one.

    Writes checkpoint-*/, final/ (model and tokenizer) and training_log.csv into `folder`, and returns what is
    worth keeping: steps, trained positions, seconds over all attempts, parameters, device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(training.cpu_threads)
    with filelock.FileLock(
        folder / ".lock"
    ):  # an orphan of a killed Snakemake may still be training here
        model = build_student(
            student, vocabulary=vocabulary, tokenizer=tokenizer, seed=training.seed
        )
        trainer = DistillationTrainer(
            alpha=1.0 if training.alpha is None else training.alpha,
            temperature=training.temperature,
            teacher=teacher,
            num_tokens=len(tokenizer),
            model=model,
            args=training_arguments(folder, training, tracking, name=name),
            train_dataset=TrainingData(source),
            data_collator=Collator(_find_temperature(source, training.temperature)),
        )
        checkpoint = find_checkpoint(folder)
        before = (
            read_json(checkpoint / _COMPLETE_MARK)
            if checkpoint
            else {"seconds": 0.0, "positions": 0}
        )
        progress = ProgressCallback(trainer, name=name, before=before, say=say)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
        if checkpoint:
            say(f"train {name}: going on from {checkpoint.name}")
        if checkpoint and _is_finished(checkpoint):
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            start = str(checkpoint or training.resume_from_checkpoint or "")
            trainer.train(resume_from_checkpoint=start or None)
        save_final(folder / "final", trainer.model, tokenizer)
        write_log(folder / "training_log.csv", trainer.state.log_history)
        return {
            "steps": trainer.state.global_step,
            "trained_positions": int(progress.totals["positions"]),
            "seconds": round(progress.totals["seconds"], 3),
            "student_parameters": int(model.num_parameters()),
            "device": describe_device(trainer.args.device),
        }


def _find_temperature(source: SequenceTable | LogitCache, temperature: float) -> int:
    """Return the column of the tail at that temperature; the whole vocabulary has no tail, so any will do.

    Raises ValueError when the cache holds the tail at other temperatures only.
    """
    if not isinstance(source, LogitCache):
        return 0
    codec = source.header.codec
    if temperature in codec.temperatures:
        return codec.temperatures.index(temperature)
    if codec.top_k == codec.vocabulary:
        return 0
    raise ValueError(
        f"training.temperature is {temperature}, but {source.path} holds the tail's mass at {codec.temperatures} only. "
        f"Use one of them, or add {temperature} to cache.temperatures, which makes a new cache."
    )


def save_final(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write the finished student and its tokenizer: a folder that AutoModelForCausalLM loads, whole or not at
    all."""
    temporary = folder.with_name(".final.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.use_cache = True
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_log(path: Path, log_history: list[dict[str, Any]]) -> None:
    """Write the training curve as CSV, one row per logged step."""
    rows = [entry for entry in log_history if "total_loss" in entry]
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([json.loads(json.dumps(row)) for row in rows])
    write_atomically(path, text.getvalue().encode())


def train_run(
    out: Path,
    *,
    name: str,
    index_path: Path,
    tokenizer_path: str,
    tokenizer_revision: str | None,
    cache_path: Path | None,
    teacher_path: str | None,
    fingerprint_path: Path | None,
    student: Student,
    training: Training,
    tracking: Tracking,
    teacher_section: Teacher,
    say: Callable[[str], None] = print,
) -> None:
    """Train one student in the folder of `out` (training.json), from the tokens, a cache or a live teacher.

    Raises ValueError when the signal that the distillation type needs is missing, or was made of other tokens.
    """
    alpha = (
        training.alpha if training.alpha is not None else DEFAULT_ALPHA[training.distillation_type]
    )
    training = replace(training, alpha=alpha)
    if alpha < 1.0 and not (cache_path or teacher_path):
        raise ValueError(
            f"distillation type {training.distillation_type!r} (alpha {alpha}) learns from a teacher: give "
            "--cache teacher_logits.h5 or --teacher, or use --distillation-type output."
        )
    index = TokenIndex.read(index_path)
    tokenizer = load_tokenizer(
        tokenizer_path,
        revision=tokenizer_revision,
        trust_remote_code=teacher_section.trust_remote_code,
    )
    source = _open_source(index, cache_path if alpha < 1.0 else None)
    # The width of the teacher's output layer, also for a run that learns from text alone: students of one
    # config are of one size.
    vocabulary = read_json(fingerprint_path)["vocabulary"] if fingerprint_path else len(tokenizer)
    teacher = None
    if alpha < 1.0 and cache_path is None and teacher_path and fingerprint_path:
        teacher = load_recorded_teacher(teacher_path, teacher_section, record_path=fingerprint_path)
    summary = train_student(
        out.parent,
        name=name,
        source=source,
        student=student,
        training=training,
        tracking=tracking,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        teacher=teacher,
        say=say,
    )
    about = {
        "run": name,
        "id": out.parent.name,
        "distillation_type": training.distillation_type,
        "alpha": alpha,
        "temperature": training.temperature,
        "seed": training.seed,
        **summary,
    }
    section = {"student": asdict(student), "training": asdict(training)}
    run = describe_run(
        section=section, seed=training.seed, device=summary["device"], seconds=summary["seconds"]
    )
    write_json(out.parent / "run.json", run)
    write_json(out, about)
    say(f"train {name}  {summary['steps']} steps in {summary['seconds']:.0f} s")


def _open_source(index: TokenIndex, cache_path: Path | None) -> SequenceTable | LogitCache:
    """Return what is trained on; a cache must be of the very tokens of the index."""
    if cache_path is None:
        return index.read_split("train")
    if not cache_path.exists():
        raise ValueError(
            f"{cache_path} is gone, but its manifest.json remains, so it passes for made. Delete the manifest too and "
            "run the same command again: the teacher makes the cache anew."
        )
    cache = LogitCache(cache_path)
    if cache.header.tokens != index.content["content"]:
        raise ValueError(
            f"{cache_path} holds distributions for other tokens (content {cache.header.tokens}) than {index.path} "
            f"lists ({index.content['content']}). Give the cache that was made from this index."
        )
    return cache
