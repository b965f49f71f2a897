"""Kills and checkpoints: a training that was stopped anywhere ends with the weights of an uninterrupted one."""

import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from retort.io.digests import digest_folder
from retort.io.files import write_json
from retort.training.checkpoints import CheckpointId, CheckpointRecord, find_checkpoint
from support.bench import (
    GPT2_WITH_DROPOUT,
    Bench,
    assert_same_curve,
    assert_same_weights,
    read_log,
    train_in_a_process,
)
from support.tiny import real_processes

pytestmark = pytest.mark.slow  # each trains two or three times

LONG: dict[str, Any] = {
    "max_steps": 36,
    "save_steps": 3,
    "save_total_limit": 20,
    "batch_size": 24,
    "learning_rate": 1e-2,
    "dataloader_num_workers": 1,
    "lr_scheduler_type": "constant",  # a rate of 0 at the end would hide a step too many
}


def id_of(folder: Path) -> CheckpointId:
    marker = CheckpointRecord.read(next(folder.glob("checkpoint-*/complete.json")))
    return CheckpointId(marker.run, marker.strategy)


def has_more(folder: Path, before: set[Path]) -> bool:
    return bool(set(folder.glob("checkpoint-*")) - before)


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def dropout_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "gpt2.json"
    write_json(path, GPT2_WITH_DROPOUT)
    return path


@pytest.fixture(scope="module")
def uninterrupted(
    bench: Bench, dropout_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    epochs = LONG["max_steps"] * LONG["batch_size"] / len(bench.table)
    assert epochs > 2  # so that the order of a later epoch is restored too
    bench.train(folder, bench.cache, student=dropout_student, **LONG)
    return folder


def test_a_run_killed_at_random_steps_ends_with_the_weights_of_an_uninterrupted_one(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    folder, log = tmp_path / "run", tmp_path / "log"
    context, kills = real_processes(), 0
    while not (folder / "final").exists():
        process = context.Process(
            target=train_in_a_process,
            args=(bench, folder, log, LONG | {"student": dropout_student}),
        )
        process.start()
        if kills < 3:
            before = set(folder.glob("checkpoint-*"))
            wait_for(partial(has_more, folder, before))
            time.sleep(rng.random() * 0.03)
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
        assert kills < 3 or process.exitcode in (0, -signal.SIGKILL)
    assert kills == 3
    assert "resuming from checkpoint-" in log.read_text()
    assert_same_weights(folder, uninterrupted)
    # Every step is logged, so no window of the log spans a checkpoint, and the curve is the same too.
    assert_same_curve(folder, uninterrupted)


def test_an_incomplete_checkpoint_is_removed_and_the_one_before_is_used(
    bench: Bench,
    dropout_student: Path,
    uninterrupted: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "final")
    newest, before = folder / "checkpoint-36", folder / "checkpoint-33"
    (newest / "complete.json").unlink()
    (newest / "model.safetensors").write_bytes(b"torn")
    assert find_checkpoint(folder, id_of(uninterrupted)) == before
    assert not newest.exists()
    bench.train(folder, bench.cache, student=dropout_student, **LONG)
    assert "train run: resuming from checkpoint-33" in caplog.messages
    assert_same_weights(folder, uninterrupted)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "complete.json"])
def test_a_damaged_checkpoint_is_not_resumed_from(
    name: str, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (33, 36):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged = tmp_path / "checkpoint-36" / name
    content = damaged.read_bytes()
    for bad in (None, content[: len(content) // 2], content[:-3] + b"?" + content[-2:]):
        if bad is None:
            damaged.unlink()
        else:
            shutil.copytree(uninterrupted / "checkpoint-36", tmp_path / "checkpoint-36")
            damaged.write_bytes(bad)
        caplog.clear()
        found = find_checkpoint(tmp_path, id_of(uninterrupted))
        assert found == tmp_path / "checkpoint-33"
        (said,) = caplog.messages
        assert "checkpoint-36" in said and "removed" in said and name in said


def test_resuming_at_an_epochs_end_or_within_one_gives_the_same_weights(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    steps_per_epoch = len(bench.table) // LONG["batch_size"]
    assert len(bench.table) == steps_per_epoch * LONG["batch_size"] and steps_per_epoch % 3 == 0
    for step in (3, steps_per_epoch, steps_per_epoch + 3):
        folder = tmp_path / str(step)
        checkpoint = f"checkpoint-{step}"
        shutil.copytree(uninterrupted / checkpoint, folder / checkpoint)
        bench.train(folder, bench.cache, student=dropout_student, **LONG)
        assert_same_weights(folder, uninterrupted)


def test_a_run_killed_after_its_last_step_only_writes_what_is_missing(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "final")
    (folder / "training_log.csv").unlink()
    summary = bench.train(folder, bench.cache, student=dropout_student, **LONG)
    assert_same_weights(folder, uninterrupted)
    assert read_log(folder) == read_log(uninterrupted)
    assert summary.steps == 36


def test_seconds_and_positions_add_up_over_attempts(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoint-36")
    marker = CheckpointRecord.read(folder / "checkpoint-33" / "complete.json")
    progress = marker.progress.model_copy(update={"seconds": 1000.0})
    marker.model_copy(update={"progress": progress}).write(folder / "checkpoint-33/complete.json")
    summary = bench.train(folder, bench.cache, student=dropout_student, **LONG)
    assert summary.seconds > 1000.0
    whole = CheckpointRecord.read(uninterrupted / "checkpoint-36/complete.json").progress
    assert summary.trained_positions == whole.positions > progress.positions


@pytest.mark.parametrize("limit", [2, 3])
def test_old_checkpoints_are_removed(limit: int, bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path, bench.cache, max_steps=5, save_steps=1, save_total_limit=limit)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == [f"checkpoint-{n}" for n in (3, 4, 5)][-limit:]


def test_a_second_process_on_the_same_run_waits(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    context, folder = real_processes(), tmp_path / "run"
    first, second = (
        context.Process(
            target=train_in_a_process,
            args=(bench, folder, tmp_path / name, LONG | {"student": dropout_student}),
        )
        for name in ("first", "second")
    )
    first.start()
    wait_for(lambda: (folder / "checkpoint-3" / "complete.json").exists())
    second.start()
    for process in (first, second):
        process.join()
        assert process.exitcode == 0
    assert "resuming" not in (tmp_path / "first").read_text()
    waiting, resuming = (tmp_path / "second").read_text().splitlines()[:2]
    assert "another process is training in" in waiting
    # Without waiting, it would have resumed from an earlier checkpoint.
    assert resuming == "train run: resuming from checkpoint-36"
    assert_same_weights(folder, uninterrupted)


def test_a_window_of_the_log_that_spans_a_checkpoint_is_complete(
    bench: Bench, dropout_student: Path, tmp_path: Path
) -> None:
    keys = LONG | {"max_steps": 14, "logging_steps": 5, "save_steps": 3}
    bench.train(tmp_path / "whole", bench.cache, student=dropout_student, **keys)
    for step in (3, 9, 12):  # the log's windows end after steps 1, 5 and 10
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        summary = bench.train(folder, bench.cache, student=dropout_student, **keys)
        assert_same_curve(folder, tmp_path / "whole")
        whole = CheckpointRecord.read(tmp_path / "whole/checkpoint-14/complete.json").progress
        assert summary.trained_positions == whole.positions + whole.window["positions"]


@pytest.mark.parametrize(
    "change", [{"alpha": 0.25}, {"seed": 1}, {"learning_rate": 0.5}, {"divergence": "reverse_kl"}]
)
def test_the_checkpoint_of_another_run_is_never_resumed_from(
    change: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "batch_size": 4}
    bench.train(tmp_path, bench.cache, **keys)
    shutil.rmtree(tmp_path / "final")
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of another run .*resume_from_checkpoint"
    ):
        bench.train(tmp_path, bench.cache, **keys, **change)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_keys_of_the_machine_do_not_make_another_run(bench: Bench, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "batch_size": 4}
    bench.train(tmp_path / "one", bench.cache, **keys)
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    bench.train(
        tmp_path / "two", bench.cache, **(keys | {"save_steps": 3}), dataloader_num_workers=2
    )
    assert_same_weights(tmp_path / "two", tmp_path / "one")


def test_a_run_starts_from_weights_optimizer_and_schedule_of_a_named_checkpoint(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    start = uninterrupted / "checkpoint-33"
    keys = LONG | {"resume_from_checkpoint": str(start)}
    summary = bench.train(tmp_path, bench.cache, student=dropout_student, **keys)
    assert summary.steps == 36
    assert_same_weights(tmp_path, uninterrupted)
    assert [row["step"] for row in read_log(tmp_path)] == ["34", "35", "36"], "not the other run's"


def test_a_student_that_starts_from_a_checkpoints_weights_has_a_new_optimizer_and_schedule(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    start = uninterrupted / "checkpoint-33"
    keys: dict[str, Any] = {"learning_rate": 0.02, "warmup_steps": 1}
    for name in ("model_path", "plain"):  # the same weights, with nothing of a training beside them
        shutil.copytree(start, tmp_path / "start" / name)
    for path in (tmp_path / "start" / "plain").iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            path.unlink()
    for name in ("model_path", "plain"):
        bench.train(tmp_path / name, bench.cache, student=tmp_path / "start" / name, **keys)
    assert_same_weights(tmp_path / "model_path", tmp_path / "plain")
    rows = read_log(tmp_path / "model_path")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["learning_rate"]) for row in rows[:2]] == [0.0, 0.02]
    first = float(read_log(uninterrupted)[0]["total_loss"])
    assert float(rows[0]["total_loss"]) < first - 0.1, "the weights are not new"


def test_a_named_checkpoint_must_be_complete_and_before_the_end(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    def refuse(pattern: str, start: Path) -> None:
        keys = LONG | {"resume_from_checkpoint": str(start)}
        with pytest.raises(ValueError, match=rf"resume_from_checkpoint is .*{pattern}"):
            bench.train(tmp_path / "run", bench.cache, student=dropout_student, **keys)

    refuse("lacks trainer_state.json, scheduler.pt, optimizer.pt", tmp_path / "nowhere")
    refuse("of step 36, but this run ends at step 36", uninterrupted / "checkpoint-36")
    half = tmp_path / "half"
    shutil.copytree(uninterrupted / "checkpoint-33", half)
    (half / "model.safetensors").write_bytes(b"torn")
    refuse("is damaged", half)
    (half / "optimizer.pt").unlink()
    refuse("lacks optimizer.pt", half)


def test_folders_of_the_users_own_are_left_alone(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted / "checkpoint-33", tmp_path / "checkpoint-33")
    for name in ("checkpoint-99.bak", "checkpoint-36-keep"):
        shutil.copytree(uninterrupted / "checkpoint-33", tmp_path / name)
        (tmp_path / name / "complete.json").unlink()
    bench.train(tmp_path, bench.cache, student=dropout_student, **LONG)
    assert_same_weights(tmp_path, uninterrupted)
    assert (tmp_path / "checkpoint-99.bak").exists() and (tmp_path / "checkpoint-36-keep").exists()


def test_environment_variables_of_other_launchers_are_ignored(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train(tmp_path / "plain", bench.cache)
    left = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "PMI_SIZE": "2"}
    for name, value in (left | {"ACCELERATE_MIXED_PRECISION": "bf16"}).items():
        monkeypatch.setenv(name, value)
    bench.train(tmp_path / "left", bench.cache)
    assert_same_weights(tmp_path / "left", tmp_path / "plain")


def test_no_checkpoint_can_run_code(
    bench: Bench, dropout_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """A pickle instead of a checkpoint's file, with its digest in the marker, is refused by torch, not run."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted / "checkpoint-33", folder / "checkpoint-33")
    victim = tmp_path / "was_run"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree(folder)
        shutil.copytree(uninterrupted / "checkpoint-33", folder / "checkpoint-33")
        torch.save(Touch(victim), folder / "checkpoint-33" / name)
        path = folder / "checkpoint-33" / "complete.json"
        files = digest_folder(path.parent)
        del files["complete.json"]
        CheckpointRecord.read(path).model_copy(update={"files": files}).write(path)
        with pytest.raises(pickle.UnpicklingError):
            bench.train(folder, bench.cache, student=dropout_student, **LONG)
        assert not victim.exists()


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
