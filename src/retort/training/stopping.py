"""Checkpoints beside those of every `save_steps`: by the clock, and at the end of the step in which a signal comes.

All ranks save, and stop, after the same step, whichever of them got the signal.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retort.cluster.interrupts import Interrupts
from retort.cluster.ranks import world_size

logger = logging.getLogger(__name__)

STOPPING = (
    "stopping after this step and saving a checkpoint; interrupt again to stop now without one"
)
_SHARE_OF_TIME = 0.05  # at most, for checkpoints by the clock


def train_until_signal(trainer: Trainer, *, start: str | None, save_minutes: float | None) -> None:
    """Train to the end, from a checkpoint's folder if `start` is one. Called by every rank.

    After a SIGINT or SIGTERM on any rank, all of them save a checkpoint and raise that signal again, for the handlers
    that were there before; on another one they do so at once.
    """
    with Interrupts(lambda _: logger.info(STOPPING)) as interrupts:
        trainer.add_callback(StopCallback(interrupts, save_minutes=save_minutes))
        trainer.train(resume_from_checkpoint=start)
        # Which also waits until the first rank has marked the checkpoint as complete.
        (number,) = max_over_ranks([interrupts.number], device=trainer.args.device)
    if number or interrupts.number:
        signal.raise_signal(int(number) or interrupts.number)


class SaveClock:
    """When a checkpoint is due: `minutes` after the last one, later if saving took more than 5 % of that time.

    minutes: None means never.
    """

    def __init__(
        self, minutes: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = float("inf") if minutes is None else 60 * minutes
        self._clock = clock
        self._saved = self._began = clock()
        self._cost_s = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        interval_s = max(self._interval_s, self._cost_s / _SHARE_OF_TIME)
        return self._clock() - self._saved >= interval_s

    def begin(self) -> None:
        """Note that a checkpoint is about to be written."""
        self._began = self._clock()

    def end(self) -> None:
        """Note that it is complete."""
        self._saved = self._clock()
        self._cost_s = self._saved - self._began


class StopCallback(TrainerCallback):  # type: ignore[misc]
    """Saves by the clock and, once a signal has come to any rank, saves and stops at the end of the step."""

    def __init__(self, interrupts: Interrupts, *, save_minutes: float | None) -> None:
        self._interrupts = interrupts
        self._save_clock = SaveClock(save_minutes)
        self._is_due = self._is_stopping = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Agree with the other ranks, where the host waits for the device anyway."""
        if world_size() > 1:
            self._agree(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have a checkpoint saved if one is due, and the training stopped after a signal."""
        if world_size() == 1:
            self._agree(args.device)
        control.should_save |= self._is_due or self._is_stopping
        control.should_training_stop |= self._is_stopping
        self._save_clock.begin()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the time to the next one."""
        self._save_clock.end()

    def _agree(self, device: torch.device) -> None:
        found = [self._interrupts.number, self._save_clock.is_due]
        self._is_stopping, self._is_due = map(bool, max_over_ranks(found, device=device))


def max_over_ranks(values: Sequence[float], *, device: torch.device) -> list[float]:
    """Return the maximum of each value over all ranks, each of which calls this; exact up to 2^24."""
    if world_size() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [float(value) for value in found.tolist()]


def heed_parent_alone() -> None:
    """Let this process, which reads batches, ignore Ctrl-C, and SIGTERM unless its parent sends it.

    A terminal and SLURM signal it too, and the step that its parent finishes needs its batches.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
