"""GPUs that were given are used, no others, and no CPU in their place; by numbers of GPUs that PyTorch might see."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from retort.cluster.given import IN_USE, SIMULATED, require_given, visible_gpus
from retort.cluster.leases import lease_teacher, lease_training
from support.gpus import make_generation

require = partial(require_given, build="9.1", has_cuda=True)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
    for name in (*names, IN_USE, SIMULATED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "given", "seen"),
    [("0,1", "0,1", 0), ("0,7", "0,7", 1), ("GPU-5c8,-1,2", "GPU-5c8", 0), ("3", "3", 0)],
)
def test_fewer_than_were_given_is_an_error_with_ids_and_what_to_check(
    text: str, given: str, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert visible_gpus() == tuple(given.split(","))
    with pytest.raises(
        ValueError, match=rf"GPUs {given} .* 9.1 sees {seen or 'none'} .*nvidia-smi"
    ):
        require(seen)
    with pytest.raises(ValueError, match="a build for CPUs: install the CUDA build"):
        require_given(seen, build="9.1+cpu", has_cuda=False)
    require(given.count(",") + 1)


@pytest.mark.parametrize("text", ["", "-1", "NoDevFiles"])
def test_none_given_by_name_is_a_cpu(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    monkeypatch.setenv("SLURM_JOB_GPUS", "2,3")
    require(0)


def test_gpus_of_slurm_whose_variable_was_lost_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_GPUS", "2,3")
    with pytest.raises(ValueError, match=r"SLURM gave GPUs 2,3 to this job.*--nv"):
        require(0)


def test_a_machine_without_gpus_expects_none() -> None:
    require(0)
    with lease_teacher(make_generation(gpus="0,1"), worker=0):
        require(0)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_job_uses_no_gpu_that_nobody_gave_it(
    scheduled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scheduled:
        monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    require(8)  # a program of one's own may use what it finds
    for lease in (lease_training(1), lease_teacher(make_generation(), worker=0)):
        with lease as held:
            assert held == ()
            with pytest.raises(ValueError, match=r"sees 8 GPUs, but neither.*gpu or gres"):
                require(8)
    assert IN_USE not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("RETORT_LOCK_DIR", os.devnull)
    require(2)


def test_gpus_that_the_config_does_not_list_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RETORT_LOCK_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(ValueError, match=r"gpus lists 0, 1, but this machine has 2, 3"):
        lease_training(1, among="0,1").__enter__()
    with lease_training(1, among="1,3") as held:
        assert held == ("3",)


def test_simulated_gpus_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv(SIMULATED, "1")
    require(0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_real_process_with_gpus_that_pytorch_does_not_see_fails(tmp_path: Path) -> None:
    """A lease of an id, as a worker takes it, then the choice of the device."""
    code = (
        "from retort.cluster.leases import lease_training\n"
        "from retort.models.load import choose_device\n"
        "with lease_training(1) as held:\n    print(held, choose_device('auto'))"
    )
    environment = os.environ | {"RETORT_LOCK_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "4,5"}
    given = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert given.returncode == 1 and b"GPUs 4 were given to this job" in given.stderr
    environment["CUDA_VISIBLE_DEVICES"] = ""
    none = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert none.stdout == b"() cpu\n", none.stderr.decode()
