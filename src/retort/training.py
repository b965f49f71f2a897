"""Train one student: data from the cache or from the tokens, transformers' Trainer with our losses.

Three ways: *output* (cross-entropy on the text), *logit* (the teacher's distributions), *hybrid* (both). The data
order depends on the seed and the number of sequences only, so runs that differ in nothing but the loss see the
same batches. A run that was killed goes on from its last whole checkpoint when it is started again.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
)

from retort.artefacts import student_content
from retort.batches import Collator, TrainingData
from retort.cache import LogitCache
from retort.codec import Codec
from retort.config import Student, Teacher, Tracking, Training
from retort.config_checks import DEFAULT_ALPHA
from retort.fused_loss import LossSettings
from retort.models import (
    CausalLM,
    build_student,
    choose_device,
    describe_device,
    load_recorded_teacher,
    split_model,
)
from retort.provenance import (
    compare_digests,
    describe_run,
    digest,
    digest_folder,
    read_json,
    write_atomically,
    write_json,
)
from retort.shards import TokenIndex
from retort.tokens import SequenceTable, fingerprint_of_tokenizer, load_tokenizer
from retort.trainer import (
    COMPLETE_MARK,
    DistillationTrainer,
    ProgressCallback,
    attach_loss,
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


def find_checkpoint(folder: Path, *, say: Callable[[str], None] = print) -> Path | None:
    """Return the newest whole checkpoint of a run; newer ones that are torn or damaged are removed, aloud."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
    for path in checkpoints:
        fault = _find_fault(path)
        if fault is None:
            return path
        say(f"{path} {fault}: removed")
        shutil.rmtree(path)
    return None


def _find_fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, in words: any of its files missing or changed would go unnoticed."""
    try:
        recorded = read_json(checkpoint / COMPLETE_MARK)["files"]
    except FileNotFoundError:
        return "was cut short by a kill"
    except (ValueError, KeyError, TypeError):
        return f"has a damaged {COMPLETE_MARK}"
    differences = compare_digests(recorded, digest_folder(checkpoint))
    return f"is damaged ({', '.join(differences)})" if differences else None


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
        tail = (
            find_tail(source.header.codec, training, path=source.path)
            if isinstance(source, LogitCache)
            else 0
        )
        settings = LossSettings(
            alpha=1.0 if training.alpha is None else training.alpha,
            temperature=training.temperature,
            divergence=training.divergence,
        )
        attach_loss(split_model(model), settings)
        trainer = DistillationTrainer(
            settings=settings,
            teacher=teacher,
            num_tokens=len(tokenizer),
            model=model,
            args=training_arguments(folder, training, tracking, name=name),
            train_dataset=TrainingData(source),
            data_collator=Collator(tail),
        )
        checkpoint = find_checkpoint(folder, say=say)
        before = (
            read_json(checkpoint / COMPLETE_MARK)
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
            "final": digest_folder(folder / "final"),
        }


def find_tail(codec: Codec, training: Training, *, path: Path) -> int:
    """Return the column of the tail at the training's temperature; the whole vocabulary has none, so any will do.

    Raises ValueError when a cache of this codec cannot be trained from so.
    """
    temperature, divergence = training.temperature, training.divergence
    if codec.method == "sampled" and (temperature != 1.0 or divergence != "forward_kl"):
        raise ValueError(
            f"training.temperature is {temperature} and training.divergence {divergence!r}, but {path} holds draws "
            "(cache.method: sampled), which are unbiased for forward_kl at temperature 1 alone. Use both, or a cache "
            "of cache.method: top_p."
        )
    if temperature in codec.temperatures:
        return codec.temperatures.index(temperature)
    if codec.top_k == codec.vocabulary:
        return 0
    raise ValueError(
        f"training.temperature is {temperature}, but {path} holds the tail's mass at {codec.temperatures} only. "
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
    expected_student: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Train one student in the folder of `out` (training.json), from the tokens, a cache or a live teacher.

    `expected_student`: the digest of the student's content by which `out` is named. Raises ValueError when the signal
    that the distillation type needs is missing, or was made of other tokens, or the student is another.
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
    _refuse_other_tokenizer(index, tokenizer_path, tokenizer)
    source = _open_source(index, cache_path if alpha < 1.0 else None)
    # The width of the teacher's output layer, also for a run that learns from text alone: students of one
    # config are of one size.
    record = read_json(fingerprint_path) if fingerprint_path else None
    vocabulary = record["vocabulary"] if record else len(tokenizer)
    _refuse_other_student(student, expected_student)
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
    _refuse_other_student(student, expected_student)
    about = {
        "run": name,
        "id": out.parent.name,
        "distillation_type": training.distillation_type,
        "alpha": alpha,
        "temperature": training.temperature,
        "seed": training.seed,
        "teacher": record["weights"] if record else None,
        **summary,
    }
    section = {"student": asdict(student), "training": asdict(training)}
    run = describe_run(
        section=section, seed=training.seed, device=summary["device"], seconds=summary["seconds"]
    )
    write_json(out.parent / "run.json", run)
    write_json(out, about)
    say(f"train {name}  {summary['steps']} steps in {summary['seconds']:.0f} s")


def _refuse_other_student(student: Student, expected: str | None) -> None:
    """Raise ValueError when the student's config or weights are not those that its run is named by."""
    if expected not in (None, digest(student_content(student))):
        raise ValueError(
            f"{student.config or student.model_path} changed since the command began, and the run is named by what it "
            "was. Run the same command again: it trains what is there now, as another run."
        )


def _refuse_other_tokenizer(index: TokenIndex, path: str, tokenizer: Any) -> None:
    """Raise ValueError when the tokens were made by another tokenizer than the one that would go into final/."""
    made_by = index.content["tokenizer"]["fingerprint"]
    found = fingerprint_of_tokenizer(path, tokenizer)["fingerprint"]
    if found != made_by:
        raise ValueError(
            f"the tokenizer in {path!r} is not the one that made the tokens: its fingerprint is {found}, but "
            f"{index.path} records {made_by}. The student would be shipped with a tokenizer that it was not trained "
            f"with. Put the old tokenizer back, or delete {index.path.parent} to tokenize the corpus again."
        )


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
