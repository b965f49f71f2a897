"""Complete checkpoints: a marker file, written last, holds the run's identity and a digest of every file."""

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from retort.config.optimizer import WSD, choose_decay_steps
from retort.config.sections import Training
from retort.io.digests import compare_digests, digest_folder
from retort.io.files import apply_umask, read_json
from retort.io.records import Entry, JsonObject, Record

logger = logging.getLogger(__name__)

# Written last into a checkpoint: one that a kill cut short lacks it.
MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")  # not a user's checkpoint-8.bak
_STATE = "trainer_state.json"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_WEIGHTS_ALONE = (
    "to start from its weights with a new optimizer and schedule, name it in student.model_path"
)
# Schedules of transformers whose rate at a step does not depend on the number of all steps.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


# Keys of the optimizer that earlier versions did not have, and trained with the defaults of.
_NEWER = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")
_DECAY = "lr_scheduler_kwargs.num_decay_steps"  # 0: a tenth of the steps

Setting = float | int | str


def shared_settings(training: Training) -> dict[str, Setting]:
    """Return the settings of optimizer and schedule, which a checkpoint goes on with, and the sequences of a step."""
    keys = ("learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps")
    given = training.lr_scheduler_kwargs.given
    decay = {_DECAY: given.pop("num_decay_steps", 0)} if training.lr_scheduler_type == WSD else {}
    return {
        **{key: getattr(training, key) for key in (*keys, *_NEWER)},
        **decay,
        "lr_scheduler_kwargs": ", ".join(f"{k}: {v}" for k, v in given.items()) or "none",
        "freeze": ", ".join(training.freeze) or "none",
        "lora": training.lora.describe(),
        "batch_size x gradient_accumulation_steps": training.global_batch,
    }


@dataclass(frozen=True)
class CheckpointId:
    """Which run a checkpoint is of (a digest of all that its result depends on), and the layout of its files.

    settings: those that another run must share to start from it, see `shared_settings`.
    """

    run: str
    strategy: str  # ddp or fsdp
    settings: Mapping[str, Setting] = field(default_factory=dict)


class Progress(Entry):
    """How far a training is: seconds and positions so far, and the sums since the last log line (`LossWindow`)."""

    step: int
    seconds: float
    positions: float
    window: dict[str, float]


class CheckpointRecord(Record, format="retort-checkpoint", version=3):
    """complete.json of a checkpoint: which run it is of (see `CheckpointId`), and the digests of its files."""

    run: str
    strategy: str
    settings: dict[str, Setting]
    progress: Progress
    files: dict[str, str]

    @classmethod
    def upgrade(cls, content: JsonObject, version: int) -> JsonObject | None:
        """Read version 2, which had no settings."""
        return content | {"settings": {}} if version == 2 else None


def write_marker(folder: Path, checkpoint_id: CheckpointId, progress: Progress) -> None:
    """Mark a checkpoint as complete; `progress` is what `read_progress` returns when the run resumes from it."""
    apply_umask(folder.glob("*.safetensors"))
    CheckpointRecord(
        run=checkpoint_id.run,
        strategy=checkpoint_id.strategy,
        settings=dict(checkpoint_id.settings),
        progress=progress,
        files=digest_folder(folder),
    ).write(folder / MARKER)


def remove_old_checkpoints(folder: Path, *, limit: int, best: int | None) -> None:
    """Remove all but the newest `limit` checkpoints, and the one of the step `best` beside these.

    Called once the newest one is complete: until then, what it replaces is still there.
    """
    steps = _list_steps(folder)
    for step in sorted(steps)[:-limit]:
        if step != best:
            shutil.rmtree(steps[step], ignore_errors=True)


def require_best(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step. Raises ValueError when it is missing or damaged."""
    path = folder / f"checkpoint-{step}"
    if fault := _find_fault(path):
        raise ValueError(
            f"{path}, which is to be the student (training.load_best_model_at_end), {fault}. Restore it, or delete all "
            f"checkpoints in {folder} and rerun the same command to train again."
        )
    return path


def _list_steps(folder: Path) -> dict[int, Path]:
    """Return the folders of checkpoints by step."""
    return {
        int(found[1]): path
        for path in folder.glob("checkpoint-*")
        if (found := _NAME.fullmatch(path.name)) and path.is_dir()
    }


def find_checkpoint(folder: Path, checkpoint_id: CheckpointId) -> Path | None:
    """Return the newest complete checkpoint of a run, None where there is none; remove newer, damaged ones and say so.

    Raises ValueError when the newest complete one is of another run, or was saved with the other strategy.
    """
    for _, path in sorted(_list_steps(folder).items(), reverse=True):
        fault = _find_fault(path)
        if fault is None:
            _require_same_run(path, checkpoint_id)
            return path
        logger.warning(f"{path} {fault}: removed")
        shutil.rmtree(path)
    return None


def _find_fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None if nothing: Trainer does not notice a missing one."""
    if not (checkpoint / MARKER).exists():
        return f"is incomplete (it has no {MARKER})"
    try:
        recorded = CheckpointRecord.read(checkpoint / MARKER)
    except ValueError:
        return f"has a damaged {MARKER}"
    differences = compare_digests(recorded.files, digest_folder(checkpoint))
    return f"is damaged ({', '.join(differences)})" if differences else None


def _require_same_run(checkpoint: Path, expected: CheckpointId) -> None:
    marker = CheckpointRecord.read(checkpoint / MARKER)
    run, strategy = marker.run, marker.strategy
    if run != expected.run:
        raise ValueError(
            f"{checkpoint} is of another run ({run}) than this one ({expected.run}): its student, data or training "
            "keys differ. Delete it to start from the beginning, give another --output, or, to start from its weights "
            "and optimizer, move it to another folder and name it in training.resume_from_checkpoint."
        )
    if strategy != expected.strategy:
        raise ValueError(
            f"{checkpoint} was saved with training.strategy {strategy!r}, and {expected.strategy!r} cannot read it. "
            f"Set training.strategy: {strategy}, or delete the checkpoint."
        )


def require_start(training: Training, *, max_steps: int | None) -> None:
    """Check the checkpoint that training.resume_from_checkpoint names; `max_steps` is None where not yet known.

    Raises ValueError when its files are missing or damaged, when optimizer, schedule or sequences of a step are not
    those of the training, which would take over some of its own and not others, or when it is not before the last step.
    """
    checkpoint = Path(str(training.resume_from_checkpoint))
    what = f"training.resume_from_checkpoint is {str(checkpoint)!r}"
    state, found = _read_start(checkpoint, what)
    step, here = state["global_step"], shared_settings(training)
    is_endless = training.lr_scheduler_type in _ENDLESS
    if max_steps is not None and not is_endless:
        here["max_steps"], found["max_steps"] = max_steps, state.get("max_steps", max_steps)
    if _DECAY in here and (max_steps is None or _is_stable(here, found, step=step)):
        here.pop("max_steps", None)
        del here[_DECAY]
    for key in here:
        if found.get(key, here[key]) != here[key]:
            raise ValueError(
                f"{what}, which goes on with {key} {found[key]}, but training.{key} is {here[key]}. Use "
                f"{found[key]} here too, or, {_WEIGHTS_ALONE}."
            )
    if max_steps is not None and step >= max_steps:
        longer = "raise training.max_steps or training.num_epochs, or, " if is_endless else ""
        raise ValueError(
            f"{what}, which is of step {step}, but this run ends at step {max_steps}: {longer}{_WEIGHTS_ALONE}."
        )


def _is_stable(here: Mapping[str, Setting], found: Mapping[str, Setting], *, step: int) -> bool:
    """Return whether two runs of warmup_stable_decay have the same rates up to a step: neither has begun to decay."""
    if _DECAY not in found:
        return False
    ends = []
    for settings in (here, found):
        max_steps, given = int(settings["max_steps"]), int(settings[_DECAY])
        ends.append(max_steps - choose_decay_steps(given or None, max_steps=max_steps))
    return step <= min(ends)


def _read_start(checkpoint: Path, what: str) -> tuple[dict[str, Any], dict[str, Setting]]:
    """Return the trainer's state in a checkpoint, and those of `shared_settings` that are known of it.

    One that Retort did not write has those of its optimizer alone.
    """
    advice = "Name a complete folder checkpoint-N of an unfinished training, or leave the key out."
    missing = [name for name in (_STATE, "scheduler.pt") if not (checkpoint / name).is_file()]
    optimizers = [p for p in map(checkpoint.joinpath, _OPTIMIZERS) if p.is_file()]
    if not optimizers:
        missing.append("optimizer.pt")
    fault = f"lacks {', '.join(missing)}" if missing else None
    is_ours = (checkpoint / MARKER).exists()
    if fault is None and is_ours:
        fault = _find_fault(checkpoint)
    if fault is not None:
        raise ValueError(f"{what}, which {fault}. {advice}")
    try:
        groups = torch.load(optimizers[0], mmap=True, weights_only=True)["param_groups"]
    except (RuntimeError, UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{what}, whose {optimizers[0].name} cannot be read. {advice}") from error
    names = {"learning_rate": "initial_lr", "weight_decay": "weight_decay"}
    found = {key: max(group.get(name, 0.0) for group in groups) for key, name in names.items()}
    settings: dict[str, Setting] = {}
    if is_ours:
        earlier = {key: Training.model_fields[key].default for key in _NEWER}
        settings = earlier | dict.fromkeys(("lr_scheduler_kwargs", "freeze", "lora"), "none")
        settings |= CheckpointRecord.read(checkpoint / MARKER).settings
    return read_json(checkpoint / _STATE), settings | found | _find_betas(groups)


def _find_betas(groups: list[dict[str, Any]]) -> dict[str, Setting]:
    """Return betas and epsilon of AdamW's groups; of another optimizer's nothing."""
    for group in groups:
        if "betas" in group and isinstance(group.get("eps"), float):
            beta1, beta2 = group["betas"][:2]
            return {"adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": group["eps"]}
    return {}


def read_progress(checkpoint: Path | None) -> Progress:
    """Return how far a checkpoint is; without one, nothing."""
    if checkpoint is None:
        return Progress(step=0, seconds=0.0, positions=0.0, window={})
    return CheckpointRecord.read(checkpoint / MARKER).progress


def is_finished(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved after the last step: resumed from it, Trainer would make one more."""
    state = read_json(checkpoint / _STATE)
    return bool(state["global_step"] >= state["max_steps"])
