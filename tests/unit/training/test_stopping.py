"""Signals and checkpoints by the clock: a training that was interrupted goes on as if it had not been."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from retort.cli import run_script
from retort.training.batches import Item, Row, TrainingData
from retort.training.stopping import STOPPING, SaveClock
from support.bench import Bench, assert_same_curve, assert_same_weights
from support.tiny import real_processes

KEYS: dict[str, Any] = {
    "max_steps": 8,
    "logging_steps": 3,
    "lr_scheduler_type": "constant",  # a rate of 0 at the end would hide a step too many
    "dataloader_num_workers": 1,
}


def train_and_interrupt(bench: Bench, folder: Path, log: Path, numbers: list[int]) -> None:
    """Train in a process group of its own, all of which gets signals as soon as the 14th row is read."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as without this fork server
    stream = log.open("w")
    sys.stderr = stream
    read, reads = TrainingData.__getitem__, []

    def read_and_interrupt(data: TrainingData, row: Row) -> list[Item]:
        reads.append(row)
        if len(reads) == 14:
            for number in numbers:
                os.killpg(os.getpgrp(), number)
                while "stopping" not in log.read_text():
                    time.sleep(0.01)
        return read(data, row)

    TrainingData.__getitem__ = read_and_interrupt  # type: ignore[method-assign]

    def main() -> None:
        bench.train(folder, bench.cache, **KEYS)

    run_script(main)


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    bench.train(folder, bench.cache, **KEYS | {"dataloader_num_workers": 0})
    return folder


@pytest.mark.parametrize(
    "numbers, status, said",
    [
        ([signal.SIGINT], 130, "interrupted by Ctrl-C. "),
        ([signal.SIGTERM], 143, "warning: interrupted by SIGTERM. "),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted by Ctrl-C. "),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_an_interrupted_training_saves_stops_and_goes_on_from_there(
    bench: Bench,
    uninterrupted: Path,
    tmp_path: Path,
    numbers: list[int],
    status: int,
    said: str,
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    process = real_processes().Process(
        target=train_and_interrupt, args=(bench, folder, log, numbers)
    )
    process.start()
    process.join()
    lines = [
        line for line in log.read_text().splitlines() if "step" not in line or line == STOPPING
    ]
    assert process.exitcode == status, lines
    assert lines[0] == STOPPING and lines[1].startswith(said) and len(lines) == 2
    assert not (folder / "final").exists()
    saved = [path.parent.name for path in folder.glob("checkpoint-*/complete.json")]
    assert len(saved) == (len(numbers) == 1), "none after the second signal"
    if saved:
        assert saved[0] in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4")
        bench.train(folder, bench.cache, **KEYS | {"dataloader_num_workers": 0})
        assert_same_weights(folder, uninterrupted)
        assert_same_curve(folder, uninterrupted)


def test_a_checkpoint_is_saved_by_the_clock(bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path, bench.cache, max_steps=2, save_minutes=1e-9)
    saved = sorted(path.parent.name for path in tmp_path.glob("checkpoint-*/complete.json"))
    assert saved == ["checkpoint-1", "checkpoint-2"]


def test_checkpoints_by_the_clock_take_a_twentieth_of_the_time_at_most() -> None:
    now = 0.0
    clock = SaveClock(10, clock=lambda: now)
    now = 599
    assert not clock.is_due
    now = 600
    assert clock.is_due
    clock.begin()
    now = 660  # it took a minute
    clock.end()
    now = 660 + 19 * 60
    assert not clock.is_due
    now = 660 + 20 * 60
    assert clock.is_due
    assert not SaveClock(None, clock=lambda: now).is_due
