"""Complete checkpoints: a marker file, written last, holds the run's identity and a digest of every file."""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retort.io.digests import compare_digests, digest_folder
from retort.io.files import read_json, write_json

logger = logging.getLogger(__name__)

# Written last into a checkpoint: one that a kill cut short lacks it.
MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")  # not a user's checkpoint-8.bak
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class CheckpointId:
    """Which run a checkpoint is of (a digest of all that its result depends on), and the layout of its files."""

    run: str
    strategy: str  # ddp or fsdp


def write_marker(folder: Path, checkpoint_id: CheckpointId, progress: dict[str, Any]) -> None:
    """Mark a checkpoint as complete; `progress` is what `read_progress` returns when the run resumes from it."""
    content = {"run": checkpoint_id.run, "strategy": checkpoint_id.strategy, **progress}
    write_json(folder / MARKER, content | {"files": digest_folder(folder)})


def find_checkpoint(folder: Path, checkpoint_id: CheckpointId) -> Path | None:
    """Return the newest complete checkpoint of a run, None where there is none; remove newer, damaged ones and say so.

    Raises ValueError when the newest complete one is of another run, or was saved with the other strategy.
    """
    steps = {
        int(found[1]): path
        for path in folder.glob("checkpoint-*")
        if (found := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    for _, path in sorted(steps.items(), reverse=True):
        fault = _find_fault(path)
        if fault is None:
            _require_same_run(path, checkpoint_id)
            return path
        logger.warning(f"{path} {fault}: removed")
        shutil.rmtree(path)
    return None


def _find_fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None if nothing: Trainer does not notice a missing one."""
    try:
        recorded = read_json(checkpoint / MARKER)["files"]
    except FileNotFoundError:
        return f"is incomplete (it has no {MARKER})"
    except (ValueError, KeyError, TypeError):
        return f"has a damaged {MARKER}"
    differences = compare_digests(recorded, digest_folder(checkpoint))
    return f"is damaged ({', '.join(differences)})" if differences else None


def _require_same_run(checkpoint: Path, expected: CheckpointId) -> None:
    marker = read_json(checkpoint / MARKER)
    run, strategy = marker.get("run"), marker.get("strategy")
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


def require_start(checkpoint: Path, *, max_steps: int) -> None:
    """Check the checkpoint that training.resume_from_checkpoint names.

    Raises ValueError when its files are missing or damaged, or it is not before the last of `max_steps` steps.
    """
    what = f"training.resume_from_checkpoint is {str(checkpoint)!r}"
    advice = "Name a complete folder checkpoint-N of an unfinished training, or leave the key out."
    needed = (_STATE, "scheduler.pt")
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not any((checkpoint / name).is_file() for name in ("optimizer.pt", "optimizer.bin")):
        missing.append("optimizer.pt")
    fault = f"lacks {', '.join(missing)}" if missing else None
    if fault is None and (checkpoint / MARKER).exists():
        fault = _find_fault(checkpoint)
    if fault is not None:
        raise ValueError(f"{what}, which {fault}. {advice}")
    step = read_json(checkpoint / _STATE)["global_step"]
    if step >= max_steps:
        raise ValueError(
            f"{what}, which is of step {step}, but this run ends at step {max_steps}. Raise training.max_steps or "
            "training.num_epochs, or, to use its weights alone, name it in student.model_path."
        )


def read_progress(checkpoint: Path | None) -> dict[str, Any]:
    """Return a marker's content: `seconds` and `positions` so far, and `window`, the sums since the last log line."""
    if checkpoint is None:
        return {"seconds": 0.0, "positions": 0, "window": None}
    marker: dict[str, Any] = read_json(checkpoint / MARKER)
    return marker


def is_finished(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved after the last step: resumed from it, Trainer would make one more."""
    state = read_json(checkpoint / _STATE)
    return bool(state["global_step"] >= state["max_steps"])
