"""Students trained on GPUs, each in a process of its own: half precision, a kill and resume, several ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from retort.models.attention import split_attention
from retort.models.causal_lm import RowBounds, split_model
from retort.models.packing import find_joining_fault, number_positions
from support.bench import (
    GPT2_WITH_DROPOUT,
    Bench,
    read_log,
    read_weights,
    train_in_a_process,
)
from support.gpu_table import Table
from support.kinds import SIZES, VOCABULARY, make_model
from support.place import wait_until
from support.tiny import real_processes

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).parents[2]
# Of a step's loss, relative. bfloat16 has 8 bits, float16 11; both are far below a wrong loss.
TOLERANCE = {"bf16": 0.02, "fp16": 0.01}
KEYS = (
    *("batch_size=4", "max_steps=8", "logging_steps=1", "learning_rate=1e-3"),
    *("temperature=1.0", "use_mixed_precision=false"),
)
SAVED: dict[str, Any] = {
    "max_steps": 24,
    "save_steps": 3,
    "save_total_limit": 20,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


class Trainings:
    """Trainings of the tiny student on the first GPU, or on a CPU."""

    def __init__(self, bench: Bench, device: torch.device) -> None:
        self.bench, self.device = bench, device

    def start(self, folder: Path, **keys: Any) -> BaseProcess:
        """Start a training in a process."""
        keys = {"device": self.device.type, "use_mixed_precision": False} | keys
        arguments = (self.bench, folder, folder.with_suffix(".log"), keys)
        process = real_processes().Process(target=train_on_one_gpu, args=arguments)
        process.start()
        return process

    def finish(self, folder: Path, **keys: Any) -> list[float]:
        """Train to the end, and return the loss of each step."""
        process = self.start(folder, **keys)
        process.join()
        assert process.exitcode == 0
        return [float(row["total_loss"]) for row in read_log(folder)]


def train_on_one_gpu(*arguments: Any) -> None:
    """Train in a process that sees one GPU: with several, transformers would use them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    train_in_a_process(*arguments)


@pytest.fixture(scope="module")
def trainings(
    device: torch.device,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_corpus: Path,
    tiny_teacher: Path,
    tiny_student: Path,
) -> Trainings:
    folder = tmp_path_factory.mktemp("bench")
    return Trainings(Bench(folder, tiny_corpus, tiny_teacher, tiny_student), device)


def largest_error(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of a step's loss."""
    return max(abs(f - e) / e for f, e in zip(found, expected, strict=True))


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference of a finished student's weights."""
    mine, theirs = read_weights(one), read_weights(other)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def test_half_precision_has_the_curve_of_float32(
    trainings: Trainings, table: Table, tmp_path: Path
) -> None:
    """On a CPU mixed precision is not used, and the curves are equal."""
    expected = trainings.finish(tmp_path / "fp32", max_steps=6)
    for dtype, tolerance in TOLERANCE.items():
        keys = {"use_mixed_precision": True, "mixed_precision_dtype": dtype}
        error = largest_error(trainings.finish(tmp_path / dtype, max_steps=6, **keys), expected)
        said = f"{error:.2%}, at most {tolerance:.0%}"
        table.add(f"training in {dtype} beside float32: largest difference of a step's loss", said)
        assert error <= tolerance
        assert (error > 0) == (trainings.device.type == "cuda"), "half precision was not used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 8])
def test_sequences_end_to_end_are_read_as_padded_ones(
    dtype: torch.dtype, window: int | None, device: torch.device, table: Table
) -> None:
    """In bfloat16 by PyTorch's variable-length attention, on a GPU."""
    model = make_model("mistral", **SIZES, sliding_window=window, initializer_range=0.3)
    split = split_model(model.to(device=device, dtype=dtype))
    split_attention(split.model)
    assert find_joining_fault(split) is None
    lengths = (13, 40, 7, 1, 39)
    ids = [torch.arange(n, device=device) % VOCABULARY for n in lengths]
    positions_1N = number_positions(lengths)[None].to(device)
    bounds = RowBounds.of(lengths).to(device)
    joined_ND = split.features(
        torch.cat(ids)[None], None, position_ids_BT=positions_1N, bounds=bounds
    )[0]
    alone_ND = torch.cat([split.features(row[None], torch.ones_like(row)[None])[0] for row in ids])
    error = float((joined_ND - alone_ND).abs().max() / alone_ND.abs().max())
    said = f"{error:.1e} of the largest feature"
    name = f"{str(dtype).removeprefix('torch.')}, window {window}"
    table.add(f"sequences end to end beside each alone, {name}: largest difference", said)
    assert error <= (1e-5 if dtype == torch.float32 else 2e-2)
    joined_ND.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_killed_training_goes_on_where_it_was(
    trainings: Trainings, table: Table, tmp_path: Path
) -> None:
    """With dropout: random numbers of the GPU are restored. Not all of CUDA's sums have one order, so two trainings
    may differ in the last bits there; on a CPU they are equal."""
    student = tmp_path / "gpt2.json"
    student.write_text(json.dumps(GPT2_WITH_DROPOUT))
    keys = SAVED | {"student": student}
    whole = trainings.finish(tmp_path / "whole", **keys)
    again = trainings.finish(tmp_path / "again", **keys)
    folder = tmp_path / "killed"
    process = trainings.start(folder, **keys)
    mark = folder / "checkpoint-3" / "complete.json"
    wait_until(lambda: mark.exists() or not process.is_alive())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (folder / "final").exists()
    found = trainings.finish(folder, **keys)
    assert "resuming from checkpoint-" in folder.with_suffix(".log").read_text()
    undisturbed, resumed = largest_error(again, whole), largest_error(found, whole)
    weights = largest_difference(folder, tmp_path / "whole")
    said = f"{resumed:.1e} (without a kill {undisturbed:.1e}); {weights:.1e}"
    table.add("a killed and resumed training: largest difference of a loss; of a weight", said)
    assert resumed <= (1e-4 if trainings.device.type == "cuda" else 0.0)


def train_by_command(trainings: Trainings, folder: Path, *keys: str) -> None:
    """Train with the command that the workflow's rule runs."""
    bench, config = trainings.bench, folder.with_suffix(".yaml")
    dataset = {"name": "json", "data_files": str(bench.folder / "none.jsonl"), "max_length": 48}
    sections = {"dataset": dataset, "teacher": {"model_path": str(bench.teacher_path)}}
    sections["student"] = {"config": str(bench.student_path)}
    config.write_text(yaml.safe_dump(sections))
    script = str(REPOSITORY / "workflow" / "scripts" / "train.py")
    command = [sys.executable, script, "--config", str(config), "--index", str(bench.index_path)]
    command += ["--signal", str(bench.cache.path), "--output", str(folder / "training.json")]
    device = f"device={trainings.device.type}"
    for key in (device, *KEYS, *keys):
        command += ["--set", f"training.{key}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ranks_train_the_student_of_one_gpu(
    trainings: Trainings, table: Table, tmp_path: Path
) -> None:
    """By DDP and by FSDP; on a CPU two ranks by DDP (workflow/test_ranks.py has FSDP)."""
    is_cpu = trainings.device.type == "cpu"
    ranks = 2 if is_cpu else min(4, torch.cuda.device_count())
    if ranks < 2:
        pytest.skip("needs two GPUs")
    one = tmp_path / "one"
    train_by_command(trainings, one)
    expected = [float(row["total_loss"]) for row in read_log(one)]
    for strategy in ("ddp",) if is_cpu else ("ddp", "fsdp"):
        folder = tmp_path / strategy
        train_by_command(trainings, folder, f"gpus={ranks}", f"strategy={strategy}")
        error = largest_error([float(row["total_loss"]) for row in read_log(folder)], expected)
        said = f"{error:.1e}; {largest_difference(folder, one):.1e}"
        what = f"{ranks} ranks by {strategy} beside one: largest difference of a loss; of a weight"
        table.add(what, said)
        assert error <= 1e-4
        shutil.rmtree(folder)
