"""What a training reports: the curve on disk, TensorBoard, W&B, the card, mixed precision, time spent waiting."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # no stubs
    EventAccumulator,
)

from retort.training import arguments
from retort.training.checkpoints import read_progress
from support.bench import Bench, read_log, read_weights
from support.tiny import score_held_out

pytestmark = pytest.mark.slow  # each trains, and some start a tracker

TRACKED = (
    "total_loss",
    "hard_loss",
    "soft_loss",
    "learning_rate",
    "perplexity",
    "tokens_per_second",
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the training sets
        monkeypatch.delenv(name)


def test_tensorboard_shows_the_curve_that_is_on_disk(bench: Bench, tmp_path: Path) -> None:
    held_out = bench.hold_out(score_held_out(tmp_path, bench.index, bench.teacher_path))
    keys: dict[str, Any] = {"held_out": held_out, "eval_steps": 2}
    bench.train(tmp_path, bench.cache, tracking={"use_tensorboard": True}, **keys)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in TRACKED:
        shown = {e.step: e.value for e in events.Scalars(f"train/{name}")}
        written = {int(row["step"]): float(row[name]) for row in read_log(tmp_path)}
        assert shown == pytest.approx(written, rel=1e-6)
    for name in ("loss", "kl"):
        shown = {e.step: e.value for e in events.Scalars(f"eval/{name}")}
        rows = [row for row in read_log(tmp_path) if row[f"eval_{name}"]]
        measured = {int(row["step"]): float(row[f"eval_{name}"]) for row in rows}
        assert shown == pytest.approx(measured, rel=1e-6) and list(measured) == [2, 4]


def _read_when_written(path: Path) -> bytes:
    """Read wandb's file, which another process writes: on a busy machine, only after `finish` returned."""
    deadline = time.monotonic() + 30
    while len(stored := path.read_bytes()) < 1000 and time.monotonic() < deadline:
        time.sleep(0.1)
    return stored


def test_wandb_works_without_a_network(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "0123456789ab"
    tracking = {"use_wandb": True, "wandb_project": "stills", "wandb_run_name": "first"}
    bench.train(folder, bench.cache, tracking=tracking)
    wandb.finish()  # as at the end of a process
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert run.name.endswith(folder.name), "a killed run continues the same curve"
    stored = _read_when_written(next(run.glob("*.wandb")))
    for name in (*TRACKED, "stills", "first"):
        assert name.encode() in stored
    last = read_log(folder)[-1]
    assert json.dumps(float(last["total_loss"])).encode() in stored


def test_the_curve_is_written_during_the_training(bench: Bench, tmp_path: Path) -> None:
    seen: list[int] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "step " in record.getMessage():
                seen.append(len(read_log(tmp_path)))

    lines = Lines()
    progress_logger = logging.getLogger("retort.io.progress")
    progress_logger.addHandler(lines)
    bench.train(tmp_path, bench.cache, max_steps=5, progress_interval_s=0.0)
    progress_logger.removeHandler(lines)
    assert seen == [1, 2, 3, 4, 5]


def test_the_card_says_what_was_learned_from_and_what_came_of_it(
    bench: Bench, tmp_path: Path
) -> None:
    facts = {"logit cache": "abcdef"}
    bench.train(tmp_path, bench.cache, facts=facts)
    text = (tmp_path / "final" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and "distillation" in front["tags"]
    last = read_log(tmp_path)[-1]
    for part in ("abcdef", f"| total_loss | {float(last['total_loss']):.4f} |"):
        assert part in text
    config = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert config["training"]["max_steps"] == 4
    assert config["student"] == {"config": bench.student_path.name}


def test_bfloat16_trains_nearly_the_same_student_and_keeps_float32_weights(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train(tmp_path / "full", bench.cache, max_steps=6)
    monkeypatch.setattr(arguments, "choose_precision", lambda *_: "bf16")
    bench.train(tmp_path / "half", bench.cache, max_steps=6)
    full, half = read_log(tmp_path / "full"), read_log(tmp_path / "half")
    assert [r["total_loss"] for r in full] != [r["total_loss"] for r in half]
    for mine, theirs in zip(half, full, strict=True):
        assert float(mine["total_loss"]) == pytest.approx(float(theirs["total_loss"]), rel=2e-3)
    assert all(
        w.dtype.is_floating_point and w.element_size() == 4
        for w in read_weights(tmp_path / "half").values()
    )


def test_seconds_of_waiting_for_data_are_counted(bench: Bench, tmp_path: Path) -> None:
    found = bench.train(tmp_path, bench.cache)
    assert 0 < found.seconds_waiting_for_data < found.seconds


def test_trackers_leave_the_users_own_settings_alone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    bench.train(tmp_path / "run", bench.cache, tracking={"use_tensorboard": True})
    assert list((tmp_path / "mine").glob("events*")) and "WANDB_DIR" in os.environ
    assert read_progress(tmp_path / "run" / "checkpoint-4").step == 4
