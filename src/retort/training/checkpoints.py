"""Checkpoints that are whole or not there: marked last, with a digest of every file and the run that they are of."""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.io.digests import compare_digests, digest_folder
from retort.io.files import read_json, write_json

logger = logging.getLogger(__name__)

# Written last into a checkpoint, so that one cut short by a kill is told from a whole one.
COMPLETE_MARK = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")  # a person's checkpoint-8.bak is none of ours
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Stamp:
    """Whose checkpoint it is: a digest of all that the run's result depends on, and how its files are laid out."""

    run: str
    strategy: str  # ddp or fsdp


def mark_checkpoint(folder: Path, stamp: Stamp, progress: dict[str, Any]) -> None:
    """Declare a checkpoint whole; `progress` is what `read_progress` returns when a run goes on from it."""
    found = {"run": stamp.run, "strategy": stamp.strategy, **progress}
    write_json(folder / COMPLETE_MARK, found | {"files": digest_folder(folder)})


def find_checkpoint(folder: Path, stamp: Stamp) -> Path | None:
    """Return the newest whole checkpoint of a run; newer ones that are torn or damaged are removed, aloud.

    Raises ValueError when a whole one is of another run, or was saved by the other strategy.
    """
    steps = {
        int(found[1]): path
        for path in folder.glob("checkpoint-*")
        if (found := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    for _, path in sorted(steps.items(), reverse=True):
        fault = _find_fault(path)
        if fault is None:
            _require_stamp(path, stamp)
            return path
        logger.warning(f"{path} {fault}: removed")
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


def _require_stamp(checkpoint: Path, stamp: Stamp) -> None:
    mark = read_json(checkpoint / COMPLETE_MARK)
    if mark.get("run") != stamp.run:
        raise ValueError(
            f"{checkpoint} is of another run ({mark.get('run')}) than this one ({stamp.run}): its student, data or "
            "training keys differ. Delete it to begin anew, give another --output, or, to start from its weights and "
            "optimizer on purpose, move it elsewhere and name it in training.resume_from_checkpoint."
        )
    if mark.get("strategy") != stamp.strategy:
        raise ValueError(
            f"{checkpoint} was saved with training.strategy {mark.get('strategy')!r}, which {stamp.strategy!r} cannot "
            "read. Go on with the old strategy, or delete the checkpoint."
        )


def require_start(checkpoint: Path, *, max_steps: int) -> None:
    """Raise ValueError unless a run of `max_steps` steps can start from a checkpoint that a person named."""
    what = f"training.resume_from_checkpoint is {str(checkpoint)!r}"
    advice = "Name a whole folder checkpoint-N of an unfinished training, or leave the key out."
    needed = (_STATE, "scheduler.pt")
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not any((checkpoint / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):
        missing.append("optimizer.pt")
    fault = f"lacks {', '.join(missing)}" if missing else None
    if fault is None and (checkpoint / COMPLETE_MARK).exists():
        fault = _find_fault(checkpoint)
    if fault is not None:
        raise ValueError(f"{what}, which {fault}. {advice}")
    step = read_json(checkpoint / _STATE)["global_step"]
    if step >= max_steps:
        raise ValueError(
            f"{what}, which is of step {step}, but this run ends at step {max_steps}. Raise training.max_steps or "
            "num_epochs, or, for its weights alone, name it in student.model_path."
        )


def read_progress(checkpoint: Path | None) -> dict[str, Any]:
    """Return what was marked: seconds and positions so far, and the sums of the log's open window."""
    if checkpoint is None:
        return {"seconds": 0.0, "positions": 0, "window": None}
    mark: dict[str, Any] = read_json(checkpoint / COMPLETE_MARK)
    return mark


def is_finished(checkpoint: Path) -> bool:
    """Say whether it was saved after the last step: Trainer, asked to go on from it, would make one more."""
    state = read_json(checkpoint / _STATE)
    return bool(state["global_step"] >= state["max_steps"])
