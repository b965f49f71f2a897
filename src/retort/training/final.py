"""The finished student: final/ with its weights, tokenizer and card, and of LoRA the adapters in final/adapter/."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel

from retort.cluster.ranks import rank
from retort.io.files import apply_umask
from retort.models.ends import list_eos_ids, set_special_ids
from retort.training.job import TrainingJob
from retort.training.model_card import CARD, write_card
from retort.training.record import TrainingSummary
from retort.training.trainer import DistillationTrainer


def save_final(
    folder: Path, trainer: DistillationTrainer, job: TrainingJob, summary: TrainingSummary
) -> None:
    """Write the finished student, its tokenizer and card atomically, as a folder that AutoModelForCausalLM loads.

    Adapters are written in its folder adapter/, and then merged. Called by every rank: under FSDP all of them gather
    the weights.
    Raises ValueError when a weight is beyond the range of training.save_dtype.
    """
    model = trainer.model
    temporary = folder.with_name(".final.tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        if job.training.lora.rank is not None:
            model.save_pretrained(temporary / "adapter")
            (temporary / "adapter" / CARD).unlink()  # a form of peft's, not filled in
            model = model.merge_and_unload()
    is_sharded = isinstance(model, FSDPModule)
    weights = trainer.accelerator.get_state_dict(model) if is_sharded else model.state_dict()
    if rank() > 0:
        return
    # After gathering, a tied weight's two names no longer share memory, and both would be stored.
    weights = {name: w for name, w in weights.items() if name not in model.all_tied_weights_keys}
    model.config.use_cache = True
    set_special_ids(model, job.tokenizer, _list_final_ends(model, job))
    _save_weights(temporary, model, weights, job.training.save_dtype)
    apply_umask(temporary.rglob("*.safetensors"))
    job.tokenizer.save_pretrained(temporary)
    card = write_card(
        job.name,
        origin=job.origin,
        facts=job.facts,
        summary=summary,
        student=job.written or job.student,
        training=job.training,
        curve=trainer.state.log_history,
        is_chat=bool(getattr(job.tokenizer, "chat_template", None)),
    )
    (temporary / CARD).write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _save_weights(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], dtype: str
) -> None:
    """Write float32 weights, and the model's configs, in another data type.

    transformers converts them as it loads them: it knows which weights an architecture keeps in float32.
    Raises ValueError when a weight becomes infinite.
    """
    if dtype == "float32":
        model.save_pretrained(folder, state_dict=weights)
        return
    full = folder.with_name(".final.float32.tmp")
    shutil.rmtree(full, ignore_errors=True)
    model.save_pretrained(full, state_dict=weights)
    converted = AutoModelForCausalLM.from_pretrained(full, dtype=getattr(torch, dtype))
    if not all(weight.isfinite().all() for weight in converted.parameters()):
        raise ValueError(
            f"training.save_dtype is {dtype!r}, but weights of the student are larger than its largest number, "
            f"{torch.finfo(getattr(torch, dtype)).max:g}. Use training.save_dtype: bfloat16."
        )
    converted.save_pretrained(folder)
    shutil.rmtree(full)


def _list_final_ends(model: Any, job: TrainingJob) -> list[int]:
    """Return the ids that end a student's text; its own generation config counts if it began with weights."""
    own = model.generation_config if job.student.model_path else None
    return [*dict.fromkeys([*list_eos_ids(own, job.tokenizer), *job.ends])]
